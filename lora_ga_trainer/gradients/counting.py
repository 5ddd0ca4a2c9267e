"""Counts of a probe: samples, items, tokens and the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..engines.collectives import mean_over_processes, sum_over_processes
from .samples import IGNORED_LABEL, MicroBatch, count_tokens


if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class Counts:
    """
    What has passed through the model so far.

    Args:
        samples: of all processes.
        items: what the loss is a mean over; of this process until [`sum_over`], of all of them afterwards, as are
            `tokens` and `loss_sum`.
        tokens: of the inputs.
        loss_sum: the loss summed over the items.
        first_batch: the first prepared inputs of this process.
        first_items: its items.
        first_loss: its mean loss; after [`sum_over`] that of the first batches of all processes.
    """

    samples: int = 0
    items: float = 0.0
    tokens: int = 0
    loss_sum: float = 0.0
    first_batch: Any = None
    first_items: float = 0.0
    first_loss: float = math.nan

    def add(self, micro_batch: MicroBatch, weight: float, loss: float) -> None:
        """Count a micro-batch of the mean loss `loss` over its items, of which `weight` count."""
        self.samples += micro_batch.samples
        if self.first_batch is None:
            self.first_batch, self.first_items, self.first_loss = micro_batch.batch, weight, loss
        if weight > 0:
            self.items += weight
            self.loss_sum += loss * weight
            self.tokens += round(count_tokens(micro_batch.batch) * micro_batch.share)

    def sum_over(self, trainer: Trainer) -> None:
        """
        Add up the counts of all processes. Collective.

        Raises:
            `ValueError`: if there is not one item.
        """
        totals = torch.tensor([self.items, self.loss_sum, self.tokens], dtype=torch.float64)
        sum_over_processes(trainer, [totals])
        self.items, self.loss_sum, tokens = totals.tolist()
        self.tokens = int(tokens)
        self.first_loss = mean_over_processes(trainer, self.first_loss, self.first_items)
        if self.items == 0:
            raise ValueError(
                f"The {self.samples} samples of the probe hold no label to learn from (all are {IGNORED_LABEL}, or "
                "the data is empty). Check the data collator and the labels of the train dataset."
            )
