"""One micro-batch of the probe: forward, backward, and what of it counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .collector import POISON_ADVICE, Collector
from .counting import Counts
from .estimate import NonFiniteGradient
from .samples import MicroBatch, count_items, mean_loss


if TYPE_CHECKING:
    from transformers import Trainer


def weighed_loss(trainer: Trainer, model: nn.Module, micro_batch: MicroBatch, number: int) -> tuple[Tensor, float]:
    """
    Return the mean loss of a micro-batch, and the number of its items that count.

    Raises:
        `NonFiniteGradient`: if the loss counts and is not finite.
    """
    items = count_items(trainer, micro_batch)
    loss = mean_loss(trainer, model, micro_batch.batch, items)
    weight = items * micro_batch.share
    if weight > 0 and not math.isfinite(loss.item()):
        raise NonFiniteGradient(f"Probe batch {number}: the loss is {loss.item()}. {POISON_ADVICE}")
    return loss, weight


def collect_loss(
    collector: Collector, counts: Counts, loss: Tensor, weight: float, micro_batch: MicroBatch, number: int
) -> None:
    """Run the backward pass of what [`weighed_loss`] returned, and count the micro-batch."""
    # A batch that does not count runs all the same: sharded models need every process in every pass.
    collector.collect(loss, weight, micro_batch.share, number)
    counts.add(micro_batch, weight, loss.item())
