"""A learning rate from the loss along the optimizer's first updates."""

from __future__ import annotations

import logging
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from ..config import LoRAGAConfig
from ..engines.collectives import gather_integers, mean_over_processes
from ..engines.support import probed_module
from ..gradients.borrow import borrowed
from ..gradients.copies import TrainedCopies
from ..gradients.failing import failing_together
from ..gradients.order import probe_order
from ..gradients.samples import MicroBatch, count_items, mean_loss, micro_batches
from ..optimizers.adamw import LoRAProAdamW
from ..starts.tracking import publish
from .apply import apply_rate, require_rate_can_be_found, resumed_rate
from .report import RateReport
from .search import NoRateFound, best_rate, largest_rate, search_rates
from .updates import FirstUpdates


if TYPE_CHECKING:
    from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

REPORT_NAME = "lora_ga_rate.json"
PICTURE_NAME = "train/lora_ga/rate"

# First updates that give the direction. From B = 0 the first moves B alone.
UPDATES = 2
# The rate is this times the one at which a step along the first updates lowers the loss most. With LoRA+ the best rate
# of training is a larger share, the more so the larger its ratio. Both numbers were chosen on one task and judged on
# another: docs/rates.md.
SHARE_OF_BEST, GROWTH_WITH_RATIO = 0.9, 1 / 8
# A step of Muon is as long in every direction. The loss bears two of them for far longer than the many of a training.
SHARE_WITH_MUON = 0.2
_MEASURED = (torch.optim.Adam, torch.optim.AdamW, LoRAProAdamW)
# Where the search begins: the largest change of an entry in a step.
_GUESS = 1e-2


def search_learning_rate(trainer: Trainer, config: LoRAGAConfig, probe_dataset: Dataset | None = None) -> RateReport:
    """
    Choose a rate for a trainer whose adapter has its start and whose optimizer has not stepped. Collective.

    The optimizer takes its first updates on copies of the trained parameters, with a rate that is next to nothing, so
    that only their direction counts. Then the loss is computed along that direction, without gradients. Everything is
    given back; nothing of the model, the optimizer, the data order or the random numbers changes.

    Args:
        trainer: inside `on_train_begin`.
        config: how it was started.
        probe_dataset: examples to use instead of the trainer's `train_dataset`.

    Raises:
        `ValueError`: if the loss is not one of tokens, or if along the updates it gives no rate, naming what it does.
    """
    begin = time.perf_counter()
    model = probed_module(trainer)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with borrowed(trainer, model, probe_dataset), probe_order(trainer, config):
        steps = _batches(trainer)
        _require_tokens(trainer, steps)
        copies = TrainedCopies(model, trained)
        updates = FirstUpdates(trainer, model, copies, steps, config.optimizer)
        line = _Line(trainer, model, copies, updates, steps)
        before = line.loss_at(0.0)
        try:
            losses = search_rates(line.loss_at, before, _GUESS / updates.largest)
        except NoRateFound as error:
            raise ValueError(
                f"find_learning_rate: {error}. Give TrainingArguments a learning_rate, and leave "
                "LoRAGAConfig.find_learning_rate out."
            ) from error
    largest, best = largest_rate(losses, before), best_rate(losses)
    return RateReport(
        learning_rate=share_of_best(updates.optimizer, config.loraplus_lr_ratio) * best,
        best_rate=best,
        largest_rate=largest,
        curvature=2 / largest,
        rates=list(losses),
        losses=list(losses.values()),
        loss_before=before,
        updates=len(steps),
        samples=line.samples,
        forward_passes=len(steps) + line.passes,
        backward_passes=len(steps),
        seconds=time.perf_counter() - begin,
    )


def share_of_best(optimizer: Optimizer, ratio: float | None = None) -> float:
    """
    Return the share of the best rate along the first updates that training takes.

    Args:
        optimizer: that steps, without what is around it. Of one that is neither torch's Adam, AdamW or Muon nor
            LoRA-Pro's AdamW a warning says that its share was not measured.
        ratio: of LoRA+, of the rates of B and A. Below 1, which was not measured, it is as without one.
    """
    muon = getattr(torch.optim, "Muon", None)  # from torch 2.9 on
    if muon is not None and isinstance(optimizer, muon):
        return SHARE_WITH_MUON
    if not isinstance(optimizer, _MEASURED):
        logger.warning(
            "find_learning_rate: what share of the best rate along the first updates training wants was measured with "
            "AdamW and with Muon. For %s it is taken to be that of AdamW, %g. Compare with rates of your own.",
            type(optimizer).__name__,
            SHARE_OF_BEST,
        )
    return SHARE_OF_BEST * max(1.0, ratio or 1.0) ** GROWTH_WITH_RATIO


class _Line:
    """The loss along the first updates, on the samples that they were computed on."""

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        copies: TrainedCopies,
        updates: FirstUpdates,
        steps: Sequence[Sequence[MicroBatch]],
    ) -> None:
        self.trainer, self.model, self.copies, self.updates = trainer, model, copies, updates
        self.batches = [micro_batch for step in steps for micro_batch in step]
        self.samples = sum(batch.samples for batch in self.batches)
        self.per_look, self.passes = len(steps), 0

    def loss_at(self, rate: float) -> float:
        """Return the mean loss over all items of all processes. Collective."""
        self.updates.go(rate)
        self.passes += self.per_look
        total = items = 0.0
        with self.copies.in_forward(), torch.no_grad(), warnings.catch_warnings():
            # Reentrant activation checkpointing warns of every pass without gradients; here none are wanted.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            for number, batch in enumerate(self.batches):
                weight = count_items(self.trainer, batch)
                with failing_together(self.trainer, number):
                    loss = mean_loss(self.trainer, self.model, batch.batch, weight).item()
                if weight * batch.share > 0:
                    total, items = total + loss * weight * batch.share, items + weight * batch.share
        return mean_over_processes(self.trainer, total / items if items else 0.0, items)


def _require_tokens(trainer: Trainer, steps: Sequence[Sequence[MicroBatch]]) -> None:
    """
    Refuse a loss that does not predict tokens. Collective.

    With a class an example the rule chose rates of many times the best one: the first updates of a fresh head say
    little of those that follow.
    """
    batch = steps[0][0].batch
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    of_tokens = isinstance(labels, torch.Tensor) and labels.dim() >= 2 and not labels.is_floating_point()
    if not all(row[0] for row in gather_integers(trainer, int(of_tokens))):
        found = "no labels" if labels is None else f"labels of shape {tuple(getattr(labels, 'shape', ()))}"
        raise ValueError(
            f"find_learning_rate: the batches hold {found}, and a rate can be found for losses that predict tokens "
            "only. For others the rule failed where it was measured (docs/rates.md). Give TrainingArguments a "
            "learning_rate, and leave LoRAGAConfig.find_learning_rate out."
        )


def _batches(trainer: Trainer) -> list[list[MicroBatch]]:
    """Draw as many micro-batches as [`UPDATES`] steps of training take, by the step."""
    per_step = trainer._train_batch_size * trainer.args.gradient_accumulation_steps * trainer.accelerator.num_processes
    steps: list[list[MicroBatch]] = [[]]
    seen = 0
    for micro_batch in micro_batches(trainer, UPDATES * per_step):
        if seen >= per_step * len(steps):
            steps.append([])
        steps[-1].append(micro_batch)
        seen += micro_batch.samples
    return steps


class RateChoice:
    """
    The rate that a config asks for: found once for a model, when training begins, and handed to the trainer.

    Args:
        trainer: that trains with it.
        config: `find_learning_rate` says whether one is to be found.
        probe_dataset: examples to use instead of the trainer's `train_dataset`.

    Attributes:
        report: of the search, after it ran.

    Raises:
        `ValueError`: if the loss of this trainer can't tell a rate.
    """

    def __init__(self, trainer: Trainer, config: LoRAGAConfig, probe_dataset: Dataset | None) -> None:
        if config.find_learning_rate:
            require_rate_can_be_found(trainer)
        self.trainer, self.config, self.probe_dataset = trainer, config, probe_dataset
        self.report: RateReport | None = None
        self._model: Callable[[], nn.Module | None] = lambda: None

    def search(self) -> RateReport:
        """Find a rate, and hand it to nobody."""
        return search_learning_rate(self.trainer, self.config, self.probe_dataset)

    def is_due(self, model: nn.Module) -> bool:
        """Tell whether a rate is asked for that this model has not been given."""
        return self.config.find_learning_rate and self._model() is not model

    def begin(self, model: nn.Module) -> None:
        """
        Find the rate and train with it; on a resume, train with the one that the checkpoint has.

        Args:
            model: the bare model, whose adapter has its start.
        """
        if self.trainer.state.global_step > 0:
            apply_rate(self.trainer, resumed_rate(self.trainer))
        else:
            self.report = self.search()
            apply_rate(self.trainer, self.report.learning_rate)
            publish(self.trainer, self.report, REPORT_NAME, PICTURE_NAME)
        self._model = weakref.ref(model)
