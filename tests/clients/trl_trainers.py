"""Trainers of TRL."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import tiny_trl
import torch
from peft import LoraConfig

from clients.client import Client, settings
from clients.models import GROUPED, from_config


PAIRS = ("prompt", "chosen", "rejected")
GENERATES = {"num_generations": 4, "max_completion_length": 6, "gradient_accumulation_steps": 2}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") + text.count("e") - len(text) / 20 for text in completions]


def language_model(**sizes: Any) -> torch.nn.Module:
    return from_config("CausalLM", "llama", GROUPED | sizes)


def experts() -> torch.nn.Module:
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return from_config("CausalLM", "qwen3_moe", GROUPED | sizes)


def scorer() -> torch.nn.Module:
    return from_config("SequenceClassification", "llama", GROUPED | {"num_labels": 1})


def trl_client(
    name: str,
    trainer: str,
    columns: tuple[str, ...],
    model: Any = language_model,
    lora: dict[str, Any] | None = None,
    passed: dict[str, Any] | None = None,
    labels: Any = None,
    **more: Any,
) -> Client:
    of_client = {key: more.pop(key) for key in ("config", "refused", "same_loss") if key in more}
    module, _, kind = trainer.rpartition(".")
    library = importlib.import_module(module or "trl")

    def make(folder: Path) -> dict[str, Any]:
        arguments = settings(folder) | {"bf16": False} | more
        del arguments["remove_unused_columns"]  # TRL has defaults of its own
        if kind in ("GRPO", "RLOO", "OnlineDPO"):
            del arguments["train_sampling_strategy"]
        rows = tiny_trl.dataset(24, *columns)
        if labels is not None:
            rows = rows.add_column("label", [bool(i % 2) for i in range(24)])
        return {
            "model": model(),
            "args": getattr(library, f"{kind}Config")(**arguments),
            "train_dataset": rows,
            "processing_class": tiny_trl.tokenizer(),
            "peft_config": LoraConfig(**(tiny_trl.LORA | {"task_type": "CAUSAL_LM"} | (lora or {}))),
            **(passed or {}),
        }

    return Client(name, make, getattr(library, f"{kind}Trainer"), **of_client)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
SCORES = {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}
REWARD = {"reward_funcs": reward}
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
        trl_client("KTO", "KTO", ("prompt", "completion"), labels=True),
        trl_client("GRPO", "GRPO", ("prompt",), passed=REWARD, same_loss=False, **GENERATES),
        trl_client("GRPO, with a reference", "GRPO", ("prompt",), passed=REWARD, same_loss=False, beta=0.1,
                   **GENERATES),
        trl_client("GRPO, a mixture of experts", "GRPO", ("prompt",), experts, EXPERTS, REWARD, same_loss=False,
                   beta=0.1, **GENERATES),
        trl_client("RLOO", "RLOO", ("prompt",), passed=REWARD, same_loss=False, **GENERATES),
        trl_client("Reward model", "Reward", ("chosen", "rejected"), scorer, SCORES),
        trl_client("ORPO (experimental)", "trl.experimental.orpo.ORPO", PAIRS),
        trl_client("CPO (experimental)", "trl.experimental.cpo.CPO", PAIRS),
    ]
}  # fmt: skip
