"""Streams, which the probe must be able to start over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..engines.devices import preserved_rng
from .borrow import preserved_state


if TYPE_CHECKING:
    from transformers import Trainer


def require_rewindable(trainer: Trainer) -> None:
    """
    Refuse a stream that the probe would use up.

    A data set without a length is started twice, with its state given back in between, and must give the same first
    batch both times.

    Raises:
        `ValueError`: advising `probe_dataset`.
    """
    if not isinstance(trainer.train_dataset, IterableDataset):
        return
    first, second = _first_batch(trainer), _first_batch(trainer)
    if first is not None and (second is None or not _equal(first, second)):
        raise ValueError(
            f"The train dataset is a stream ({type(trainer.train_dataset).__name__}) that does not start over: a "
            "second pass gave another first batch, so a probe would take samples away from training. Pass a separate "
            "data set as `probe_dataset=`, or make the stream's __iter__ start from the beginning."
        )


def _first_batch(trainer: Trainer) -> Any:
    with preserved_rng(), preserved_state(trainer):
        return next(iter(trainer.get_train_dataloader()), None)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
