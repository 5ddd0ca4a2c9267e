"""Probe: training samples run through the model, for the gradient of every adapted weight, without leaving a trace."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters.find import find_adapted_layers
from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.support import probed_module
from .accumulator import forget_shared_matrices
from .borrow import borrowed
from .collector import Collector
from .counting import Counts
from .estimate import GradientEstimate, NonFiniteGradient, require_reached
from .failing import failing_together
from .order import probe_order
from .passes import collect_loss, weighed_loss
from .samples import MicroBatch, micro_batches
from .second_look import find_short, look_again
from .sharing import WeightUses, name_shared
from .sketch import turning_points
from .streams import require_rewindable


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

logger = logging.getLogger(__name__)

# Loss scales tried in turn where gradients are fp16: the first that does not overflow wins.
FP16_LOSS_SCALES = (2.0**16, 2.0**8, 1.0)
# A first round of micro-batches that is a larger share of the samples is run twice where layers are sketched. Of
# directions 9-16 of SmolLM2 (k = 64, as in `sketch`) a round of 16 of 64 samples keeps .986 (worst layer .974), one of
# 32 .962 (.918) and one of 64 .923 (.852); run twice, .996 (.990), .997 (.992) and .998 (.995).
LOOK_SHARE = 1 / 4


def estimate_gradients(
    trainer: Trainer,
    config: LoRAGAConfig,
    layers: Sequence[AdaptedLayer] | None = None,
    probe_dataset: Dataset | None = None,
    skip: int = 0,
) -> GradientEstimate:
    """
    Estimate `G = dL/dW` of every layer over `config.num_samples` examples of the training data.

    They are drawn at random by `config.probe_seed`, or are the first that training reads: see [`probe_order`]. Batches
    come from the trainer's own train dataloader and the loss from its own `compute_loss`. Each micro-batch is
    given its own item count (label tokens, or examples where labels are per example) and weighted by it: `G` is the
    gradient of `sum items_i loss_i / sum items_i` over the micro-batches of all processes. Micro-batches are never
    cut, so the last ones may hold a few samples more than asked for. Where the loss of a row does not depend on the
    other rows, `G` is the same for every micro-batch size, accumulation and number of processes. Where it does
    (in-batch negatives, batch norms), `G` is that of the batches that are trained on. A micro-batch that
    `even_batches` filled up with repeats counts by the share of its own samples. Sums are kept in fp32. Nothing of the
    trainer, the model or the data order changes.

    `G` is the gradient through the calls of the layer, which is what the adapter changes. Where a weight has other
    uses (it is tied to an embedding, or handed to a function), the gradient of a full fine-tuning would add theirs.
    The estimate and a warning name such layers.

    A layer of which the sketch has kept less than `config.min_energy_kept` is seen in a second pass over the same
    samples, see `lora_ga_trainer.gradients.second_look`; the estimate names it in `seen_twice`.

    Args:
        trainer: a trainer whose model is prepared (any time after `on_train_begin`).
        config: `num_samples`, `estimator`, `sketch_size`, `min_energy_kept`, `probe_order`, `probe_seed` and
            `allow_unreached` are read.
        layers: the layers to look at; default all that the model's active adapter trains.
        probe_dataset: examples to use instead of the trainer's `train_dataset`.
        skip: examples at the beginning of that order to pass over, in whole micro-batches. With the `samples` of an
            estimate before, this one is of other examples.

    Raises:
        `ValueError`: if the data is empty, has no labels, or is a stream that can't be rewound; if the loss reaches no
            layer, or not all of them and `allow_unreached` is `False`.
        `NonFiniteGradient`: naming the batch and the layer.
    """
    model = probed_module(trainer)
    if layers is None:
        layers = find_adapted_layers(trainer.accelerator.unwrap_model(trainer.model))
    scales = FP16_LOSS_SCALES if _uses_fp16(trainer, layers) else (1.0,)
    for scale in scales:
        try:
            with _lent(trainer, model, config, probe_dataset):
                estimate = _Probe(trainer, model, config, layers, scale, skip).run()
            short = find_short(trainer, config, layers, estimate)
            if short:
                # Lent anew: everything is as it was before the first pass, so the second one reads the same samples.
                with _lent(trainer, model, config, probe_dataset):
                    look_again(trainer, model, config, short, estimate, scale, skip)
            return estimate
        except NonFiniteGradient:
            if scale == scales[-1]:
                raise
        finally:
            forget_shared_matrices()
    raise AssertionError("unreachable")


@contextmanager
def _lent(trainer: Trainer, model: nn.Module, config: LoRAGAConfig, probe_dataset: Dataset | None) -> Iterator[None]:
    """Lend the trainer to one pass over the samples of the probe."""
    with borrowed(trainer, model, probe_dataset):
        require_rewindable(trainer)
        with probe_order(trainer, config):
            yield


class _Probe:
    """The pass over the samples, with a fixed loss scale."""

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        config: LoRAGAConfig,
        layers: Sequence[AdaptedLayer],
        loss_scale: float,
        skip: int = 0,
    ) -> None:
        self.trainer, self.model, self.config, self.skip = trainer, model, config, skip
        self.collector = Collector(trainer, config, layers, loss_scale)
        self.uses = WeightUses(model, layers)
        self.counts = Counts()

    def run(self) -> GradientEstimate:
        start = time.perf_counter()
        with self._progress_bar() as bar, self.collector.taps():
            self._pass(bar)
        self.counts.sum_over(self.trainer)
        unreached = self.collector.unreached()
        require_reached(unreached, self.collector.layers, self.config)
        if self.counts.samples < self.config.num_samples:
            logger.warning(
                "The probe used %d of the %d samples asked for: the data has no more.",
                self.counts.samples,
                self.config.num_samples,
            )
        self.collector.finish(self.counts.items)
        estimate = self._result(unreached, time.perf_counter() - start)
        name_shared(estimate.shared)
        return estimate

    def _pass(self, bar: tqdm) -> None:
        """Run every sample once; sketches turn at the first end of a round at or after a turning point."""
        points = turning_points(self.config.num_samples) if self.collector.sketches else []
        for number, micro_batch in enumerate(micro_batches(self.trainer, self.config.num_samples, self.skip)):
            passed = [point for point in points if point <= self.counts.samples]
            if passed:
                # Several points may lie in one micro-batch. Nothing was seen between them, so one turn does for all.
                self.collector.turn()
                points = points[len(passed) :]
            if number == 0 and self.collector.sketches and micro_batch.samples > LOOK_SHARE * self.config.num_samples:
                self._look(micro_batch)
            with failing_together(self.trainer, number):
                self._step(number, micro_batch)
            bar.update(micro_batch.samples)

    def _look(self, micro_batch: MicroBatch) -> None:
        """
        Run the first round once more beforehand, for the directions that it will be sketched with.

        A round that is a large part of all samples would otherwise be seen through Gaussian columns alone.
        """
        with failing_together(self.trainer, 0), self.collector.only_looking():
            loss, weight = self._loss(0, micro_batch)
            self.collector.collect(loss, weight, 0.0, 0)
        self.collector.turn()
        self.collector.forget()

    def _step(self, number: int, micro_batch: MicroBatch) -> None:
        loss, weight = self._loss(number, micro_batch)
        collect_loss(self.collector, self.counts, loss, weight, micro_batch, number)

    def _loss(self, number: int, micro_batch: MicroBatch) -> tuple[Tensor, float]:
        # Every micro-batch uses the weights alike, and watching takes time.
        with self.uses.watched() if number == 0 else nullcontext():
            return weighed_loss(self.trainer, self.model, micro_batch, number)

    def _result(self, unreached: list[str], seconds: float) -> GradientEstimate:
        counts = self.counts
        return GradientEstimate(
            estimators=self.collector.accumulators,
            moments=self.collector.moments(),
            samples=counts.samples,
            items=counts.items,
            tokens=counts.tokens,
            loss=counts.loss_sum / counts.items,
            seconds=seconds,
            bytes_sent=self.collector.bytes_sent,
            unreached=unreached,
            shared=[name for name in self.uses.found if name not in unreached],
            first_batch=counts.first_batch,
            first_items=counts.first_items,
            first_loss=counts.first_loss,
        )

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.num_samples,
            desc="LoRA-GA probe",
            unit="sample",
            leave=False,
            disable=self.trainer.args.disable_tqdm or not self.trainer.is_world_process_zero(),
        )


def _uses_fp16(trainer: Trainer, layers: Sequence[AdaptedLayer]) -> bool:
    """
    Tell whether gradients may be fp16, whose smallest normal number is 6e-5.

    Integer codes of a quantised weight don't show what the layer computes in. They count as fp16: the loss scale is a
    power of two, which changes no bit of a gradient in fp32 or bf16.
    """
    if trainer.accelerator.mixed_precision == "fp16":
        return True
    dtypes = {parameter.dtype for layer in layers for parameter in layer.base.parameters()}
    return any(dtype is torch.float16 or not dtype.is_floating_point for dtype in dtypes)
