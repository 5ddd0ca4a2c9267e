"""Lend a training run to the probe, and give everything back to the bit, even after an exception."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..adapters.attention import attention_kept_whole
from ..engines.devices import preserved_rng
from .leaves import preserved_leaves
from .model_state import keep_model
from .state import KeptState


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

logger = logging.getLogger(__name__)

_ABSENT = object()


# What can't be given back is said once a trainer.
_NAMED: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()


@contextmanager
def borrowed(trainer: Trainer, model: nn.Module, dataset: Dataset | None = None) -> Iterator[None]:
    """
    Lend the trainer and its model to passes that are not training, and put everything back.

    Inside: random number generators are free to move, `model` is in train mode (activation checkpointing needs it)
    with every dropout and NEFTune's noise at 0, no parameter has a gradient, compiled code runs eagerly, nothing is
    logged or reported to trackers, each micro-batch is a step of its own, and `dataset`, if given, stands in for the
    training data. Afterwards all of that is what it was. So are the accelerator's data loader bookkeeping, what the
    trainer itself keeps in its attributes, the state of the data set, the sampler, the collator and the data loader
    (see [`KeptState`]), and what a forward pass changes in a model (see [`keep_model`]).

    What was found that can't be given back is named in a warning, before anything runs.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(attention_kept_whole(model))
        stack.enter_context(_preserved_loaders(trainer))
        stack.enter_context(preserved_state(trainer, model, dataset))
        stack.enter_context(_train_mode(model))
        stack.enter_context(_without_noise(model))
        stack.enter_context(preserved_leaves(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Items are weighted and summed over processes by the probe, not by `compute_loss`.
        stack.enter_context(attribute(trainer.args, "average_tokens_across_devices", False))
        # Losses that divide a part of themselves by it (TRL's, the router loss of experts) find it set in a step only.
        stack.enter_context(attribute(trainer, "current_gradient_accumulation_steps", 1))
        stack.enter_context(attribute(trainer, "log", _log_nothing))
        stack.enter_context(attribute(trainer.accelerator, "log", _log_nothing))
        # TRL's trainers send the time that parts of a step took to the trackers themselves.
        stack.enter_context(attribute(trainer.args, "report_to", []))
        if dataset is not None:
            stack.enter_context(attribute(trainer, "train_dataset", dataset))
        yield


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for `log` where nothing is trained."""


@contextmanager
def preserved_state(
    trainer: Trainer, model: nn.Module | None = None, dataset: Dataset | None = None
) -> Iterator[None]:
    """
    Give back what objects of a training run keep in themselves.

    Args:
        trainer: the data set, the collator and the data loader that it trains with are looked at.
        model: if given, what passes through a model change is given back as well, of this one and of others that the
            trainer holds, and what the trainer keeps in its own attributes.
        dataset: another data set that is read.
    """
    kept = KeptState()
    try:
        kept.leave_out(trainer.model, trainer.model_wrapped, trainer.eval_dataset)
        kept.keep(trainer.data_collator, "data_collator")
        kept.keep(trainer.train_dataset if dataset is None else dataset, "train_dataset")
        # Training has its loader already. A trainer may hand out the same one again.
        kept.keep(trainer.callback_handler.train_dataloader, "train_dataloader")
        if model is not None:
            kept.keep(vars(trainer), "trainer", closures=False)
            kept.keep_generators(type(trainer), type(trainer).__name__)
            keep_model(kept, model, "model")
            for name, other in list(kept.models.items()):
                keep_model(kept, other, name)
        _name_lost(trainer, kept)
        yield
    finally:
        kept.give_back()
        _name_written(trainer, kept)


def _name_written(trainer: Trainer, kept: KeptState) -> None:
    """Say once what the probe has changed. That something large is written can't be known before."""
    named = _NAMED.setdefault(trainer, set())
    written = [name for name in kept.watched.written() if name not in named]
    named.update(written)
    if written:
        logger.warning(
            "The probe ran code that writes into what is too large for it to copy, so training goes on from other "
            "values than without it: %s. Use LoRAGAConfig(probe_file=...): write the file in a run of its own, and "
            "train in another one.",
            ", ".join(written),
        )


def _name_lost(trainer: Trainer, kept: KeptState) -> None:
    """Say once what the probe will change."""
    named = _NAMED.setdefault(trainer, set())
    lost = {name: why for name, why in kept.lost.items() if name not in named}
    named.update(lost)
    if lost:
        logger.warning(
            "The probe reads from what it can't give back, so training may see other batches than without it: %s. "
            "Pass a `probe_dataset`, or keep the state in attributes or generators of Python, NumPy or torch.",
            "; ".join(f"{name} ({why})" for name, why in lost.items()),
        )


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
