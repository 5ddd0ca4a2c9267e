"""The first updates that an optimizer would make, taken on copies of what it trains."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engines.support import bare_optimizer, steps_by_itself
from ..gradients.borrow import attribute
from ..gradients.copies import TrainedCopies
from ..gradients.descent import CopyDescent
from ..gradients.failing import failing_together
from ..gradients.samples import MicroBatch
from ..optimizers.wrapper import LoRAProOptimizer


if TYPE_CHECKING:
    from transformers import Trainer

    from ..optimizers.registry import ChosenOptimizer

# The largest change of an entry in a tiny step. From `B = 0` the gradient of `A` is that small, too, and has to be
# large beside the 1e-8 that AdamW adds to its root mean square.
_TINY = 1e-4


class FirstUpdates:
    """
    The change of every trained parameter in the first steps of an optimizer, as its learning rate goes to 0.

    From `B = 0` the first step moves `B` alone, since `A` has no gradient there. So more than one step is taken, with
    a rate so small that nothing but the direction counts. A parameter's mean is over the steps in which it had a
    gradient: `A` moves in most steps of a training, so the one in which it can't does not count. To be made inside
    `borrowed(...)`.

    Args:
        trainer: prepared; its optimizer has not stepped yet.
        model: what its loss calls.
        copies: of the trained parameters, to compute with. They hold the start when this is made.
        steps: the micro-batches of each step's gradient.
        chosen: what the trainer's optimizer was made from.

    Attributes:
        directions: for each copy the mean change of a step in which it had a gradient, divided by the rate.
        largest: the largest change of an entry in the first step, divided by the rate.

    Raises:
        `ValueError`: if the optimizer can't be copied, or if no sample has a label.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        copies: TrainedCopies,
        steps: Sequence[Sequence[MicroBatch]],
        chosen: ChosenOptimizer,
    ) -> None:
        self.copies = copies
        self.start = [value.detach().clone() for value in copies.values]
        self.largest = 0.0
        self._twin = lambda: _Twin(trainer, copies, chosen)
        descent = CopyDescent(trainer, model, copies)
        self._optimizer = self._twin()
        taken, self._moved = 0, [0] * len(copies.values)
        for micro_batches in steps:
            with copies.in_forward():
                for number, micro_batch in enumerate(micro_batches):
                    with failing_together(trainer, number):
                        descent.accumulate(micro_batch)
            taken += descent.step(self._step if taken else self._first_step)
        if not taken:
            raise ValueError("find_learning_rate: the train dataloader gave no sample with a label.")
        rate = self._optimizer.rate
        self.directions = [
            change / (rate * max(moved, 1)) for change, moved in zip(self._changes(), self._moved, strict=True)
        ]
        self.go(0.0)

    def _first_step(self) -> None:
        # Before any step: a correction of gradients overwrites them.
        self._count_moved()
        self._choose_tiny_rate()
        self._optimizer.step()

    def _step(self) -> None:
        self._count_moved()
        self._optimizer.step()

    def _count_moved(self) -> None:
        for index, value in enumerate(self.copies.values):
            self._moved[index] += value.grad is not None and bool(value.grad.any())

    def _choose_tiny_rate(self) -> None:
        """Set a rate that is tiny for this optimizer, from a trial of its first step, which is linear in the rate."""
        trial = self._twin()
        trial.set_rate(1.0)
        trial.step()
        self.largest = max(change.abs().max().item() for change in self._changes())
        with torch.no_grad():
            for value, start in zip(self.copies.values, self.start, strict=True):
                value.copy_(start)
        if not 0 < self.largest < math.inf:
            raise ValueError(
                f"find_learning_rate: the first step of {type(trial.optimizer).__name__} changes no parameter "
                f"by a finite amount (the largest change, divided by the rate, is {self.largest}). Give "
                "TrainingArguments a learning_rate, and leave LoRAGAConfig.find_learning_rate out."
            )
        self._optimizer.set_rate(_TINY / self.largest)

    def _changes(self) -> list[Tensor]:
        return [value.detach() - start for value, start in zip(self.copies.values, self.start, strict=True)]

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that took them, without what corrects its gradients."""
        return _innermost(self._optimizer.optimizer)

    @torch.no_grad()
    def go(self, rate: float) -> None:
        """Let the copies hold what one step at a rate leads to; at 0 that is the start."""
        for value, start, direction in zip(self.copies.values, self.start, self.directions, strict=True):
            value.copy_(start + rate * direction)


class _Twin:
    """A copy of the trainer's optimizer, before its first step, that steps the copies of what it trains."""

    def __init__(self, trainer: Trainer, copies: TrainedCopies, chosen: ChosenOptimizer) -> None:
        self.copies, self.rate = copies, 0.0
        with copies.in_modules():
            made = steps_by_itself(trainer)
            self.optimizer = _make_anew(trainer, chosen) if made else _copy_optimizer(trainer, copies)
        # A schedule has set `lr` to that of its first step, which with a warm-up is 0.
        rates = [float(group.get("initial_lr", group["lr"])) for group in self.optimizer.param_groups]
        self.ratios = [rate / trainer.args.learning_rate for rate in rates]

    def set_rate(self, rate: float) -> None:
        """Set the rate of every group, in the proportions that they have to `TrainingArguments.learning_rate`."""
        self.rate = rate
        for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
            group["lr"] = rate * ratio

    def step(self) -> None:
        with self.copies.in_modules():
            # A schedule has put a method that counts its steps on the optimizer that it is for.
            type(self.optimizer).step(self.optimizer)


def _copy_optimizer(trainer: Trainer, copies: TrainedCopies) -> Optimizer:
    """
    Copy the trainer's optimizer with `copies` in the place of the parameters.

    Raises:
        `ValueError`: naming the optimizer, if it holds what can't be copied.
    """
    own = bare_optimizer(trainer)
    shared: dict[int, Any] = {id(part): part for part in (*trainer.model.modules(), *trainer.model.parameters())}
    shared |= dict(zip(map(id, copies.parameters), copies.values, strict=True))
    try:
        return _copy_with(own, shared)
    except Exception as error:
        raise ValueError(
            f"find_learning_rate: {type(own).__name__} holds what can't be copied ({error}), and its first steps "
            "are tried on a copy. Give TrainingArguments a learning_rate, and leave LoRAGAConfig.find_learning_rate "
            "out."
        ) from error


def _copy_with(own: Optimizer, shared: dict[int, Any]) -> Optimizer:
    """
    Copy an optimizer, and another one inside it. Its hooks stay behind: what a step does elsewhere is not to happen.

    Args:
        own: to copy.
        shared: by id, what the copy holds in the place of objects.
    """
    # Not `copy.deepcopy(own)`: of a torch optimizer that copies the groups and the state, and nothing a class adds.
    twin = object.__new__(type(own))
    for name, value in vars(own).items():
        if name == "step":  # put there by a schedule, which counts the steps of its own optimizer
            continue
        if name.startswith("_optimizer_"):
            vars(twin)[name] = OrderedDict()
        elif isinstance(value, Optimizer):
            vars(twin)[name] = _copy_with(value, shared)
        else:
            vars(twin)[name] = copy.deepcopy(value, shared)
    return twin


def _innermost(optimizer: Optimizer) -> Optimizer:
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return _innermost(inner[0]) if inner else optimizer


def _make_anew(trainer: Trainer, chosen: ChosenOptimizer) -> Optimizer:
    """Make an optimizer where the engine's own holds flat partitions of the parameters."""
    with attribute(trainer, "optimizer", None):
        made = trainer.create_optimizer()
    # The engine corrects gradients before its own step, so what the Trainer made does not.
    return LoRAProOptimizer(made, trainer.model) if chosen.entry.wraps else made
