"""What the probe borrows from a training run, given back to the bit even after an exception."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..engines.devices import preserved_rng
from .leaves import preserved_leaves


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

_ABSENT = object()


@contextmanager
def borrowed(trainer: Trainer, model: nn.Module, dataset: Dataset | None = None) -> Iterator[None]:
    """
    Lend the trainer and its model to passes that are not training, and put everything back.

    Inside: random number generators are free to move, `model` is in train mode (activation checkpointing needs it)
    with every dropout and NEFTune's noise at 0, no parameter has a gradient, compiled code runs eagerly, nothing is
    reported to trackers, each micro-batch is a step of its own, and `dataset`, if given, stands in for the training
    data. Afterwards all of that, the accelerator's data loader bookkeeping, running statistics of batch norms and
    what the trainer itself counts are what they were.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(_preserved_loaders(trainer))
        stack.enter_context(preserved_attributes(trainer))
        stack.enter_context(_train_mode(model))
        stack.enter_context(_preserved_running_statistics(model))
        stack.enter_context(_without_noise(model))
        stack.enter_context(preserved_leaves(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Items are weighted and summed over processes by the probe, not by `compute_loss`.
        stack.enter_context(attribute(trainer.args, "average_tokens_across_devices", False))
        # Losses that divide a part of themselves by it (TRL's, the router loss of experts) find it set in a step only.
        stack.enter_context(attribute(trainer, "current_gradient_accumulation_steps", 1))
        # TRL's trainers send the time that parts of a step took to the trackers themselves.
        stack.enter_context(attribute(trainer.args, "report_to", []))
        if dataset is not None:
            stack.enter_context(attribute(trainer, "train_dataset", dataset))
        yield


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object for a while, also one that it lacks."""
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
def preserved_attributes(trainer: Trainer) -> Iterator[None]:
    """
    Give a trainer back its attributes, and the entries of containers that are its own.

    Trainer classes keep running figures, buffers and step counts while they compute a loss (TRL's do), in private
    attributes, which are lent as copies, and in the count of tokens seen of their state.
    """
    before = vars(trainer).copy()
    for name, value in before.items():
        if name.startswith("_"):
            setattr(trainer, name, copy_containers(value))
    try:
        with attribute(trainer.state, "num_input_tokens_seen", trainer.state.num_input_tokens_seen):
            yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)


def copy_containers(value: Any) -> Any:
    """Copy dicts, lists, tuples, deques and sets inside each other, not what they hold; a `defaultdict` stays one."""
    if type(value) is tuple:
        return tuple(map(copy_containers, value))
    if not isinstance(value, (dict, list, deque, set)):
        return value
    new: Any = copy.copy(value)
    if isinstance(value, dict):
        new.update((key, copy_containers(item)) for key, item in value.items())
    elif not isinstance(value, set):
        for index, item in enumerate(value):
            new[index] = copy_containers(item)
    return new


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
def _without_noise(model: nn.Module) -> Iterator[None]:
    """
    Set every dropout probability to 0, of dropout modules and of models that call the functional form, and the length
    of the noise that `neftune_noise_alpha` makes a hook add to embeddings.
    """
    owners: dict[int, Any] = {id(module): module for module in model.modules()}
    for module in list(owners.values()):
        config = getattr(module, "config", None)
        if config is not None:
            owners[id(config)] = config
    with ExitStack() as stack:
        for owner in owners.values():
            for name in _noise_names(owner):
                stack.enter_context(attribute(owner, name, 0.0))
        yield


def _noise_names(owner: Any) -> list[str]:
    """Name what holds NEFTune's alpha or a dropout probability: `p` of a dropout module, `attention_dropout`, ..."""
    is_dropout = isinstance(owner, nn.modules.dropout._DropoutNd)
    is_probability = lambda name, value: isinstance(value, float) and ("drop" in name or (is_dropout and name == "p"))
    return [
        name
        for name, value in vars(owner).items()
        if (name == "neftune_noise_alpha" or is_probability(name, value)) and value
    ]
