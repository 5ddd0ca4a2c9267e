"""Steps on copies of trained parameters, outside training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..engines.collectives import sum_over_processes
from .copies import TrainedCopies
from .leaves import discarded_gradients
from .samples import MicroBatch, count_items, mean_loss


if TYPE_CHECKING:
    from transformers import Trainer


class CopyDescent:
    """
    Gradients of the training loss at the copies, the mean over the items of all processes.

    To be used inside `borrowed(...)` and `copies.in_forward()`.

    Args:
        trainer: whose loss and processes these are.
        model: what its loss calls.
        copies: that get the gradients.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, copies: TrainedCopies) -> None:
        self.trainer, self.model, self.copies = trainer, model, copies
        self._clear()

    def accumulate(self, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch's summed loss; every process runs one, whether it counts or not."""
        items = count_items(self.trainer, micro_batch)
        weight = items * micro_batch.share
        before = [copy.grad for copy in self.copies.values]
        loss = mean_loss(self.trainer, self.model, micro_batch.batch, items)
        # Not autograd.grad: reentrant activation checkpointing refuses it.
        with discarded_gradients(self.model):
            (loss * weight).backward()
        if weight == 0:  # a loss without items may be NaN, and so would be its product with 0
            for copy, gradient in zip(self.copies.values, before, strict=True):
                copy.grad = gradient
        self.items += weight

    def step(self, take: Callable[[], object]) -> bool:
        """
        Take a step on the gradient of the mean over all items that were accumulated, of all processes. Collective.

        Args:
            take: steps the copies by the gradients that it finds in them.

        Returns:
            Whether there was an item; without one no step is taken.
        """
        total = torch.tensor([self.items], dtype=torch.float64)
        gradients = [copy.grad for copy in self.copies.values if copy.grad is not None]
        sum_over_processes(self.trainer, [total, *gradients])
        if total.item() > 0:
            torch._foreach_div_(gradients, total.item())
            take()
        self._clear()
        return total.item() > 0

    def _clear(self) -> None:
        """Begin anew. Every copy has a gradient, so that all processes add up the same ones."""
        self.items = 0.0
        for copy in self.copies.values:
            copy.grad = torch.zeros_like(copy)
