"""One client: a trainer that trains with plain `transformers` and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments


@dataclass(frozen=True)
class Client:
    """
    Attributes:
        name: for the table.
        make: of a folder for outputs; returns what the trainer is made with, new at each call.
        trainer: the class.
        config: fields of `LoRAGAConfig` beside those of every run.
        refused: what the error says where a start is refused, a regular expression; the table shows it as it stands.
        same_loss: whether the probe's loss of the first batch is the one that training logs first. Not where a forward
            pass draws random numbers.
        same_first_step: whether an anchored start leaves the first loss as it is. Not where the loss looks at the
            factors themselves.
        unreached: layers that the loss does not reach; they start as plain LoRA.
    """

    name: str
    make: Callable[[Path], dict[str, Any]]
    trainer: type[Trainer] = Trainer
    config: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    same_loss: bool = True
    same_first_step: bool = True
    unreached: int = 0


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Two steps of four rows in the data's own order, each of them logged."""
    return TrainingArguments(**(settings(folder) | changes))


def settings(folder: Path) -> dict[str, Any]:
    return tiny.settings(folder, max_steps=2, train_sampling_strategy="sequential", remove_unused_columns=False)


def adapted(model: nn.Module, **changes: Any) -> nn.Module:
    """Wrap a model in plain LoRA."""
    return get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes)))
