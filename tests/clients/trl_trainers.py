"""Trainers of TRL."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import tiny_trl
import torch
from datasets import Dataset
from peft import LoraConfig

from clients.client import Client, adapted, settings
from clients.models import GROUPED, from_config


PAIRS = ("prompt", "chosen", "rejected")
GENERATES = {"num_generations": 4, "max_completion_length": 6, "gradient_accumulation_steps": 2}


# Trainers that have a sampler of their own.
WRITES = ("GRPO", "GMPO", "RLOO", "Distillation", "SDPO", "SDFT", "IWOPD", "GOLD")


DISTILS = {"num_generations": 4, "max_completion_length": 6, "distillation_topk": 20}
SUCCEEDS = DISTILS | {"success_reward_threshold": -5.0}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") + text.count("e") - len(text) / 20 for text in completions]


def right_or_wrong(completions: list[str], **_: Any) -> list[float]:
    return [float("a" in text or "e" in text) for text in completions]


def language_model(**sizes: Any) -> torch.nn.Module:
    return from_config("CausalLM", "llama", GROUPED | sizes)


def experts() -> torch.nn.Module:
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return from_config("CausalLM", "qwen3_moe", GROUPED | sizes)


def wrapped() -> torch.nn.Module:
    return adapted(language_model())


def scorer() -> torch.nn.Module:
    return from_config("SequenceClassification", "llama", GROUPED | {"num_labels": 1})


def labelled() -> list[dict[str, Any]]:
    rows = tiny_trl.rows(24, "prompt", "completion")
    return [row | {"label": bool(i % 2)} for i, row in enumerate(rows)]


def asked() -> list[dict[str, Any]]:
    """Questions with a hint that only the teacher sees."""
    rows = tiny_trl.rows(24, "prompt")
    return [{"prompt": [message("user", row["prompt"])], "privileged_context": "a b"} for row in rows]


def talks() -> list[dict[str, Any]]:
    rows = tiny_trl.rows(24, "prompt", "completion")
    return [{"messages": [message("user", r["prompt"]), message("assistant", r["completion"])]} for r in rows]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def teacher(folder: Path) -> dict[str, Any]:
    """A larger model, and its tokenizer where trainers look for it."""
    model = from_config("CausalLM", "llama", GROUPED | {"num_hidden_layers": 3})
    model.config._name_or_path = str(folder / "teacher")
    tiny_trl.tokenizer().save_pretrained(folder / "teacher")
    return {"teacher_model": model}


def teacher_in_bytes(folder: Path) -> dict[str, Any]:
    return {**teacher(folder), "processing_class": tiny_trl.byte_tokenizer()}


def trl_client(
    name: str,
    trainer: str,
    columns: tuple[str, ...],
    model: Any = language_model,
    lora: dict[str, Any] | None = None,
    passed: Any = None,
    rows: Any = None,
    **more: Any,
) -> Client:
    of_client = {key: more.pop(key) for key in ("config", "refused", "same_loss", "same_first_step") if key in more}
    module, _, kind = trainer.rpartition(".")
    library = importlib.import_module(module or "trl")

    def make(folder: Path) -> dict[str, Any]:
        arguments = settings(folder) | {"bf16": False} | more
        del arguments["remove_unused_columns"]  # TRL has defaults of its own
        if kind in WRITES:
            del arguments["train_sampling_strategy"]
        made = {
            "model": model(),
            "args": getattr(library, f"{kind}Config")(**arguments),
            "train_dataset": tiny_trl.dataset(24, *columns) if rows is None else Dataset.from_list(rows()),
            "processing_class": tiny_trl.tokenizer(),
            "peft_config": LoraConfig(**(tiny_trl.LORA | {"task_type": "CAUSAL_LM"} | (lora or {}))),
            **(passed(folder) if callable(passed) else passed or {}),
        }
        return {key: value for key, value in made.items() if value is not None}

    return Client(name, make, getattr(library, f"{kind}Trainer"), **of_client)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
SCORES = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
REWARD = {"reward_funcs": reward}
BINARY = {"reward_funcs": right_or_wrong, "peft_config": None}
CLIENTS = {
    "TRL": [
        trl_client("SFT", "SFT", ("text",)),
        trl_client("SFT, prompts and completions", "SFT", ("prompt", "completion")),
        trl_client("SFT, packed", "SFT", ("text",), packing=True, max_length=24),
        trl_client("SFT, padding-free", "SFT", ("text",), padding_free=True, max_length=None),
        trl_client("SFT, a mixture of experts", "SFT", ("text",), experts, EXPERTS),
        trl_client("DPO", "DPO", PAIRS),
        trl_client("DPO, reference computed before", "DPO", PAIRS, precompute_ref_log_probs=True),
        trl_client("DPO, a mixture of experts", "DPO", PAIRS, experts, EXPERTS),
        trl_client("KTO", "KTO", (), rows=labelled),
        trl_client("GRPO", "GRPO", ("prompt",), passed=REWARD, same_loss=False, **GENERATES),
        trl_client("GRPO, with a reference", "GRPO", ("prompt",), passed=REWARD, same_loss=False, beta=0.1,
                   **GENERATES),
        trl_client("GRPO, a mixture of experts", "GRPO", ("prompt",), experts, EXPERTS, REWARD, same_loss=False,
                   beta=0.1, **GENERATES),
        trl_client("RLOO", "RLOO", ("prompt",), passed=REWARD, same_loss=False, **GENERATES),
        trl_client("Reward model", "Reward", ("chosen", "rejected"), scorer, SCORES),
        trl_client("Distillation", "Distillation", ("prompt",), passed=teacher, same_loss=False,
                   max_completion_length=6),
        trl_client("ORPO (experimental)", "trl.experimental.orpo.ORPO", PAIRS),
        trl_client("CPO (experimental)", "trl.experimental.cpo.CPO", PAIRS),
        trl_client("TPO (experimental)", "trl.experimental.tpo.TPO", (*PAIRS, "reference")),
        trl_client("GMPO (experimental)", "trl.experimental.gmpo.GMPO", ("prompt",), passed=REWARD, same_loss=False,
                   **GENERATES),
        trl_client("A*-PO (experimental)", "trl.experimental.a2po.A2PO", ("prompt",), wrapped, passed=BINARY,
                   same_loss=False, max_completion_length=6, num_value_samples=2),
        trl_client("Online DPO (experimental)", "trl.experimental.online_dpo.OnlineDPO", ("prompt",), passed=REWARD,
                   same_loss=False, max_new_tokens=6),
        trl_client("GKD (experimental)", "trl.experimental.gkd.GKD", (), rows=talks, passed=teacher, same_loss=False,
                   max_new_tokens=6),
        trl_client("GOLD (experimental)", "trl.experimental.gold.GOLD", (), rows=talks, passed=teacher_in_bytes,
                   same_loss=False, max_completion_length=6),
        trl_client("IW-OPD (experimental)", "trl.experimental.iw_opd.IWOPD", (), rows=talks, passed=teacher,
                   same_loss=False, max_completion_length=6),
        trl_client("SDFT, the base as teacher (experimental)", "trl.experimental.sdft.SDFT", (), rows=asked,
                   same_loss=False, teacher_model_kind="base", **DISTILS),
        trl_client("SDFT, a moving average as teacher (experimental)", "trl.experimental.sdft.SDFT", (), rows=asked,
                   same_loss=False, teacher_model_kind="ema", **DISTILS),
        trl_client("SDPO, the base as teacher (experimental)", "trl.experimental.sdpo.SDPO", (), rows=asked,
                   passed=REWARD, same_loss=False, teacher_model_kind="base", **SUCCEEDS),
        trl_client("SDPO, a moving average as teacher (experimental)", "trl.experimental.sdpo.SDPO", (), rows=asked,
                   passed=REWARD, same_loss=False, same_first_step=False, teacher_model_kind="ema", **SUCCEEDS),
    ]
}  # fmt: skip
