"""Tiny random models and data that train in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from lora_ga_trainer.adapters.anchor import start_values


VOCABULARY = 97


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "num_labels": 3,
    }
    return BertForSequenceClassification(BertConfig(**(sizes | changes)))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64))


def t5(seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=VOCABULARY)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


_EXPERT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def qwen3_moe(seed: int = 0, **changes: Any) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    sizes = _EXPERT_SIZES | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(sizes | changes)))


def mixtral(seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    sizes = _EXPERT_SIZES | {"num_local_experts": 4, "intermediate_size": 24}
    return MixtralForCausalLM(MixtralConfig(**(sizes | changes)))


def gpt_oss(seed: int = 0, **changes: Any) -> GptOssForCausalLM:
    """Stores its experts as `(E, in, out)`."""
    torch.manual_seed(seed)
    sizes = _EXPERT_SIZES | {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8, "sliding_window": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return GptOssForCausalLM(GptOssConfig(rope_parameters=rope, **(sizes | changes)))


def causal_rows(count: int, length: int = 12, seed: int = 1, ragged: bool = True) -> list[dict[str, torch.Tensor]]:
    """Rows of one length whose labels ignore a prompt of varying length, so that item counts differ by row."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        if ragged:
            labels[: 1 + (i * 5) % (length - 3)] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones(length, dtype=torch.long), "labels": labels})
    return rows


def class_rows(count: int, length: int = 12, seed: int = 1, classes: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        mask[length - i % 4 :] = 0
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": i % classes})
    return rows


def with_lora(model: nn.Module, seed: int = 5, **changes: Any) -> PeftModel:
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes
    return get_peft_model(model, LoraConfig(**settings))


def checkpoint_activations(model: nn.Module, use_reentrant: bool) -> None:
    """Call the method by the name that it has in this release of transformers; the older one is deprecated."""
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})


def settings(folder: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of a short run on the CPU whose every step is logged."""
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    } | changes


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**settings(folder, **changes))


@torch.no_grad()
def write_start(layer: Any, B0: torch.Tensor, A0: torch.Tensor) -> None:
    """Give a layer that no trainer holds its start."""
    for parameter, value in start_values(layer, B0, A0):
        parameter.copy_(value)


def with_lora_seedless(model: nn.Module, **settings: Any) -> PeftModel:
    """Wrap without touching the random numbers, as a trainer given `peft_config` does."""
    return get_peft_model(model, LoraConfig(**settings))
