"""Counts of a probe: samples, items, tokens and the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..engines.collectives import mean_over_processes, sum_over_processes
from .samples import IGNORED_LABEL, Piece, count_tokens


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
    first_batch: dict[str, Any] | None = None
    first_items: float = 0.0
    first_loss: float = math.nan

    def add(self, piece: Piece, items: float, loss: float) -> None:
        """Count a piece whose mean loss over `items` items is `loss`; 0 items if it does not count here."""
        self.samples += piece.samples
        if self.first_batch is None:
            self.first_batch, self.first_items, self.first_loss = piece.batch, items, loss
        if items > 0:
            self.items += items
            self.loss_sum += loss * items
            self.tokens += count_tokens(piece.batch)

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
