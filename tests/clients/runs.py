"""Run a client plainly and with a start, and compare the trainings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from clients.client import Client
from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGAMixin


WAYS = ("mixin", "callback")
# What a log says of the clock. TRL counts tokens a second, too.
TIMES = re.compile(r"runtime|_per_second|step_time|tps")


@dataclass(frozen=True)
class Run:
    """A training that has ended: its trainer, what it logged, and the weights that it trained."""

    trainer: Trainer
    logs: list[dict[str, float]]
    weights: dict[str, Tensor]


class Undo(TrainerCallback):
    """Puts the adapter back to what it was before the start."""

    def __init__(self, trainer: Trainer) -> None:
        self.before = weights_of(trainer)

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        parameters = dict(model.named_parameters())
        changed = [name for name, value in self.before.items() if not torch.equal(parameters[name], value)]
        assert changed, "the start wrote nothing"
        for name in changed:
            parameters[name].copy_(self.before[name])


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def make_trainer(client: Client, way: str, folder: Path, **config: Any) -> Trainer:
    set_seed(11)
    passed = client.make(folder)
    # In the order of training, so that the first losses can be compared.
    start = LoRAGAConfig(**({"num_samples": 4, "probe_order": "train"} | client.config | config))
    if way == "mixin":
        mixed = type("Mine", (LoRAGAMixin, client.trainer), {})
        return mixed(**passed, lora_ga_config=start)
    trainer = client.trainer(**passed)
    if way == "callback":
        trainer.add_callback(LoRAGACallback(trainer, start))
    return trainer


def run(trainer: Trainer) -> Run:
    trainer.train()
    logs = [log for log in trainer.state.log_history if "lora_ga/samples" not in log]
    logs = [{key: value for key, value in log.items() if not TIMES.search(key)} for log in logs]
    return Run(trainer, logs, weights_of(trainer))


def require_no_trace(client: Client, way: str, plain: Run, folder: Path) -> None:
    """With its start undone a training is plain training: each logged figure and each trained weight, to the bit."""
    trainer = make_trainer(client, way, folder, init="lora_one")
    trainer.add_callback(Undo(trainer))
    undone = run(trainer)
    assert undone.logs == plain.logs
    assert undone.weights.keys() == plain.weights.keys()
    assert [name for name, value in undone.weights.items() if not torch.equal(value, plain.weights[name])] == []


def require_start(client: Client, way: str, plain: Run, folder: Path) -> None:
    """
    The probe's loss is the trained one, and an anchored start changes nothing before the first step.

    Logs round to four digits or so.
    """
    started = run(make_trainer(client, way, folder, init="lora_ga"))
    callback = next(c for c in started.trainer.callback_handler.callbacks if isinstance(c, LoRAGACallback))
    report = callback.report
    first, ours = (next(log["loss"] for log in found.logs if "loss" in log) for found in (plain, started))
    if client.same_first_step:
        assert ours == pytest.approx(first, rel=2e-4, abs=1e-4)
    assert sum(layer.action.is_plain for layer in report.layers) == client.unreached
    if client.same_loss:
        assert report.loss_before == pytest.approx(first, rel=2e-4, abs=1e-4)


def verdict(client: Client, way: str, plain: Run, folder: Path) -> str:
    """Try a client in one way and say what came of it, in the words of the table."""
    if client.refused is not None:
        with pytest.raises((ValueError, TypeError), match=client.refused):
            make_trainer(client, way, folder / "refused").train()
        return "refused"
    require_no_trace(client, way, plain, folder / "undone")
    require_start(client, way, plain, folder / "started")
    layers = "1 layer starts" if client.unreached == 1 else f"{client.unreached} layers start"
    return "works" if client.unreached == 0 else f"works; {layers} plain"
