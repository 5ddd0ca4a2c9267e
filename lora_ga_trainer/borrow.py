"""What the probe borrows from a training run, given back to the bit even after an exception."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

# Running figures that TRL's trainers keep while they compute a loss.
_COUNTERS = ("_metrics", "_total_train_tokens")
_ABSENT = object()


@contextmanager
def borrowed(trainer: Trainer, model: nn.Module, dataset: Dataset | None = None) -> Iterator[None]:
    """
    Lend the trainer and its model to passes that are not training, and put everything back.

    Inside: random number generators are free to move, `model` is in train mode (activation checkpointing needs it)
    with every dropout at 0, no parameter requires grad, compiled code runs eagerly, and `dataset`, if given, stands in
    for the training data. Afterwards all of that, the accelerator's data loader bookkeeping, running statistics of
    batch norms and the counters of TRL's trainers are what they were.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(_preserved_loaders(trainer))
        stack.enter_context(_preserved_counters(trainer))
        stack.enter_context(_train_mode(model))
        stack.enter_context(_preserved_running_statistics(model))
        stack.enter_context(_without_dropout(model))
        stack.enter_context(_without_grad(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Items are weighted and summed over processes by the probe, not by `compute_loss`.
        stack.enter_context(_attribute(trainer.args, "average_tokens_across_devices", False))
        if dataset is not None:
            stack.enter_context(_attribute(trainer, "train_dataset", dataset))
        yield


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the Python, NumPy and torch generators, those of every accelerator included."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.get_device_module() if torch.accelerator.is_available() else None
    devices = device.get_rng_state_all() if device else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if device:
            device.set_rng_state_all(devices)


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def _preserved_loaders(trainer: Trainer) -> Iterator[None]:
    accelerator, state = trainer.accelerator, trainer.accelerator.gradient_state
    loaders, references = list(accelerator._dataloaders), list(state.dataloader_references)
    sync = state.sync_gradients
    try:
        yield
    finally:
        accelerator._dataloaders[:] = loaders
        state.dataloader_references = references  # a property: it keeps weak references of what is assigned
        state._set_sync_gradients(sync)


@contextmanager
def _preserved_counters(trainer: Trainer) -> Iterator[None]:
    with ExitStack() as stack:
        for name in _COUNTERS:
            if name in vars(trainer):
                stack.enter_context(_attribute(trainer, name, _copy_counter(getattr(trainer, name))))
        yield


def _copy_counter(value: Any) -> Any:
    """Copy nested dicts and lists of numbers; a `defaultdict` keeps its factory."""
    if isinstance(value, dict):
        new = value.copy()
        new.update((key, _copy_counter(item)) for key, item in value.items())
        return new
    return list(value) if isinstance(value, list) else value


@contextmanager
def _train_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _preserved_running_statistics(model: nn.Module) -> Iterator[None]:
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every dropout probability to 0: of dropout modules, and of models that call the functional form."""
    owners: dict[int, Any] = {id(module): module for module in model.modules()}
    for module in list(owners.values()):
        config = getattr(module, "config", None)
        if config is not None:
            owners[id(config)] = config
    with ExitStack() as stack:
        for owner in owners.values():
            for name in _dropout_names(owner):
                stack.enter_context(_attribute(owner, name, 0.0))
        yield


def _dropout_names(owner: Any) -> list[str]:
    """Name the float attributes that hold a dropout probability: `p` of a dropout module, `attention_dropout`, ..."""
    is_dropout = isinstance(owner, nn.modules.dropout._DropoutNd)
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0 and ("drop" in name or (is_dropout and name == "p"))
    ]


@contextmanager
def _without_grad(model: nn.Module) -> Iterator[None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
