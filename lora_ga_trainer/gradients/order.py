"""Order in which the probe reads the training data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils.data import IterableDataset, Sampler
from transformers import Trainer

from ..config import LoRAGAConfig
from .borrow import attribute


if TYPE_CHECKING:
    from torch.utils.data import Dataset

logger = logging.getLogger(__name__)


class _Drawn(Sampler[int]):
    """Every index once, in an order that a seed decides: the same on every process, whatever their number."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed)).tolist()

    def __len__(self) -> int:
        return self.count


@contextmanager
def probe_order(trainer: Trainer, config: LoRAGAConfig) -> Iterator[None]:
    """
    Let the trainer's data loader read in the order of the probe.

    With `probe_order="random"` that is one that `probe_seed` decides. A stream has no other order than its own. A
    trainer that makes its data loader or its sampler by itself may have to: TRL's GRPO repeats prompts in groups. Both
    keep it.
    """
    if config.probe_order != "random":
        yield
    elif not _draws(trainer):
        logger.info(
            "The probe reads the training data in the order of training: %s has a sampler or a data loader of its "
            "own, or the data is a stream.",
            type(trainer).__name__,
        )
        yield
    else:
        with attribute(trainer, "_get_train_sampler", lambda dataset: _Drawn(len(dataset), config.probe_seed)):
            yield


def _draws(trainer: Trainer) -> bool:
    """Tell whether the order is the Trainer's to choose."""
    dataset: Dataset = trainer.train_dataset
    own = any(
        name in vars(trainer) or getattr(type(trainer), name) is not getattr(Trainer, name)
        for name in ("get_train_dataloader", "_get_train_sampler")
    )
    return not own and isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset)
