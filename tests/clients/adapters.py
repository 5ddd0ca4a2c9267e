"""Adapters and optimizers that users choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import Trainer

from clients.client import Client, adapted, arguments
from clients.models import causal, classes
from clients.trainers import bert, llama


def with_adapter(name: str, **more: Any) -> Client:
    of_client = {key: more.pop(key) for key in ("config", "refused", "same_loss", "unreached") if key in more}

    def make(folder: Path) -> dict[str, Any]:
        return {"model": adapted(llama(), **more), "args": arguments(folder), "train_dataset": causal()}

    return Client(name, make, **of_client)


def with_optimizer(name: str, **more: Any) -> Client:
    of_client = {key: more.pop(key) for key in ("config", "refused") if key in more}

    def make(folder: Path) -> dict[str, Any]:
        return {"model": adapted(llama()), "args": arguments(folder, **more), "train_dataset": causal()}

    return Client(name, make, **of_client)


def classifier(folder: Path) -> dict[str, Any]:
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    return {"model": get_peft_model(bert(), config), "args": arguments(folder), "train_dataset": classes()}


def native(folder: Path) -> dict[str, Any]:
    """An adapter without a wrapper, as `model.add_adapter` of transformers makes it."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = inject_adapter_in_model(config, llama())
    return {"model": model, "args": arguments(folder), "train_dataset": causal()}


class Inside(nn.Module):
    """A model of the user's own around a `PeftModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = adapted(llama())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def inside(folder: Path) -> dict[str, Any]:
    return {"model": Inside(), "args": arguments(folder), "train_dataset": causal()}


def second(folder: Path) -> dict[str, Any]:
    model = adapted(llama())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    return {"model": model, "args": arguments(folder), "train_dataset": causal()}


class OwnOptimizer(Trainer):
    """Makes its optimizer itself, without weight decay."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        return self.optimizer


def own_optimizer(folder: Path) -> dict[str, Any]:
    return {"model": adapted(llama()), "args": arguments(folder), "train_dataset": causal()}


ADAPTERS = [
    with_adapter("rsLoRA", use_rslora=True),
    with_adapter("DoRA", use_dora=True),
    with_adapter("LoRA with dropout", lora_dropout=0.1, same_loss=False),
    with_adapter("Ranks and alphas by pattern", rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    with_adapter("Biases trained, too", bias="lora_only"),
    with_adapter("An embedding adapted, too", target_modules=["q_proj", "embed_tokens"]),
    with_adapter("DoRA, on an embedding, too", target_modules=["q_proj", "embed_tokens"], use_dora=True),
    with_adapter("Two layers only", layers_to_transform=[1], target_modules=["q_proj", "v_proj"]),
    Client("A head in `modules_to_save`", classifier),
    Client("A second adapter beside another", second),
    Client("An adapter without a wrapper (`inject_adapter_in_model`)", native),
    Client("A `PeftModel` inside a module of one's own", inside),
]
OPTIMIZERS = [
    with_optimizer("AdamW with weight decay", weight_decay=0.1),
    with_optimizer("SGD with momentum", optim="sgd", optim_args="momentum=0.9"),
    with_optimizer("RMSprop", optim="rmsprop"),
    with_optimizer("Adagrad", optim="adagrad"),
    with_optimizer("Adafactor", optim="adafactor", refused="Adafactor"),
    with_optimizer("AdamW in 8 bits (bitsandbytes)", optim="adamw_bnb_8bit", refused="AdamW8bit|8.?bit"),
    with_optimizer("Lion in 32 bits (bitsandbytes)", optim="lion_32bit"),
    with_optimizer("Schedule-free AdamW", optim="schedule_free_adamw"),
    with_optimizer("Cosine schedule with warm-up", lr_scheduler_type="cosine", warmup_steps=1),
    Client("An optimizer of one's own", own_optimizer, OwnOptimizer),
]
CLIENTS = {"Adapters": ADAPTERS, "Optimizers and schedules": OPTIMIZERS}
