"""Every way to put a LoRA adapter into a tiny model, with and without a `PeftModel` on top."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, __version__, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.integrations import peft as integration


def let_transformers_take_this_peft(patch: Any) -> None:
    """
    Skip a check of versions in transformers where no PEFT passes it.

    transformers 5.24 asks for PEFT 0.22 in `add_adapter` and kin, which was not released with it. What follows the
    check runs with 0.21, as it did in transformers 5.23.
    """
    if Version(__version__) < Version(integration.MIN_PEFT_VERSION):
        patch.setattr(integration, "check_peft_version", lambda min_version: None)


class Outer(nn.Module):
    """A module of the user's own around an adapted model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def wrapped(base: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    return get_peft_model(base, config, adapter_name=name)


def native(base: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    base.add_adapter(config, name)
    return base


def injected(base: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    return inject_adapter_in_model(config, base, name)


def mixed(base: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    return get_peft_model(base, config, adapter_name=name, mixed=True)


def tuner(base: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    return LoraModel(base, config, name)


def inner_wrapped(base: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    return Outer(wrapped(base, config, name))


def inner_native(base: nn.Module, config: LoraConfig, name: str = "default") -> nn.Module:
    return Outer(native(base, config, name))


WITHOUT_WRAPPER = {make.__name__: make for make in (native, injected, mixed, tuner, inner_wrapped, inner_native)}
WAYS = {"wrapped": wrapped} | WITHOUT_WRAPPER


def adapted(way: str, base: nn.Module | None = None, name: str = "default", **changes: Any) -> nn.Module:
    """A tiny model with an adapter; the same numbers whichever way it was added."""
    base = tiny.llama() if base is None else base
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | changes
    torch.manual_seed(5)
    return WAYS[way](base, LoraConfig(**settings), name)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    rows = tiny.causal_rows(3, seed=5)
    return model.eval()(input_ids=torch.stack([row["input_ids"] for row in rows])).logits


def by_peft(folder: Any, base: nn.Module | None = None) -> PeftModel:
    """What stock PEFT reads from a folder, on the clean base."""
    return PeftModel.from_pretrained(tiny.llama() if base is None else base, folder)
