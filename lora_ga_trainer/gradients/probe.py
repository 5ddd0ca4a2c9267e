"""Run training samples through the model and collect the gradient of every adapted weight, leaving no trace."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters.find import find_adapted_layers, require_peft_model
from ..adapters.layer import AdaptedExperts, AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.collectives import gather_integers, mean_over_processes, share_from_owners, sum_over_processes
from ..engines.devices import preserved_rng
from ..engines.support import probed_module
from .accumulator import DTYPES, forget_shared_matrices
from .borrow import borrowed, preserved_attributes
from .estimate import GradientEstimate, NonFiniteGradient
from .samples import IGNORED_LABEL, Piece, count_items, count_tokens, mean_loss, require_rewindable, sample_pieces
from .sketch import SketchedGradient, make_estimators, turn, turning_points
from .tap import tapped, tapped_parameters


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

logger = logging.getLogger(__name__)

# Loss scales tried in turn where gradients are fp16: the first that does not overflow wins.
FP16_LOSS_SCALES = (2.0**16, 2.0**8, 1.0)
_UNCHANGED = "No weight was changed."
_POISON_ADVICE = (
    f"{_UNCHANGED} Look for empty or extreme examples in that batch, or train in bf16 or fp32 instead of fp16."
)


def estimate_gradients(
    trainer: Trainer,
    config: LoRAGAConfig,
    layers: Sequence[AdaptedLayer] | None = None,
    probe_dataset: Dataset | None = None,
) -> GradientEstimate:
    """
    Estimate `G = dL/dW` of every layer over the first `config.num_samples` examples of the training data.

    Batches come from the trainer's own train dataloader and the loss from its own `compute_loss`. Each micro-batch is
    given its own item count (label tokens, or examples where labels are per example) and weighted by it, so `G` is the
    gradient of the mean over all items of all processes, whatever the micro-batch size, the accumulation and the
    number of processes. Sums are kept in fp32. Nothing of the trainer, the model or the data order changes.

    Args:
        trainer: a trainer whose model is prepared (any time after `on_train_begin`).
        config: `num_samples`, `estimator`, `sketch_size`, `probe_seed` and `allow_unreached` are read.
        layers: the layers to look at; default all that the model's active adapter trains.
        probe_dataset: examples to use instead of the trainer's `train_dataset`.

    Raises:
        `ValueError`: if the data is empty, has no labels, or is a stream that can't be rewound; if a layer is never
            reached by the loss (unless `allow_unreached`).
        `NonFiniteGradient`: naming the batch and the layer.
    """
    model = probed_module(trainer)
    if layers is None:
        layers = find_adapted_layers(require_peft_model(trainer.accelerator.unwrap_model(trainer.model)))
    scales = FP16_LOSS_SCALES if _uses_fp16(trainer, layers) else (1.0,)
    for scale in scales:
        with borrowed(trainer, model, probe_dataset):
            require_rewindable(trainer)
            try:
                return _Probe(trainer, model, config, layers, scale).run()
            except NonFiniteGradient:
                if scale == scales[-1]:
                    raise
            finally:
                forget_shared_matrices()
    raise AssertionError("unreachable")


class _Probe:
    """The pass over the samples, with a fixed loss scale."""

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        config: LoRAGAConfig,
        layers: Sequence[AdaptedLayer],
        loss_scale: float,
    ) -> None:
        self.trainer, self.model, self.config, self.layers = trainer, model, config, layers
        self.loss_scale = loss_scale
        shapes = [(name, layer.shape) for layer in layers for name in layer.matrices]
        self.estimators = make_estimators(shapes, config, max(layer.rank for layer in layers))
        self.by_index = [[self.estimators[name] for name in layer.matrices] for layer in layers]
        self.hits = [0] * len(layers)
        self.met: list[int] = []  # layers in the order in which this backward pass reached them
        self.weight = 0.0
        self.items = self.loss_sum = 0.0
        self.samples = self.tokens = self.bytes_sent = 0
        self.first_batch: dict[str, Any] | None = None
        self.first_items, self.first_loss = 0.0, math.nan

    def run(self) -> GradientEstimate:
        start = time.perf_counter()
        with self._progress_bar() as bar, preserved_rng(), preserved_attributes(self.trainer), self._taps():
            self._pass(bar)
        items = self._add_up()
        for estimator in self.estimators.values():
            estimator.divide(items)
        return self._result(items, time.perf_counter() - start)

    @contextmanager
    def _taps(self) -> Iterator[None]:
        bare = [index for index, layer in enumerate(self.layers) if not layer.has_inputs]
        linear = [index for index, layer in enumerate(self.layers) if layer.has_inputs]
        layers = {self.layers[index].name: self.layers[index].base for index in linear}
        fused = [cast(AdaptedExperts, self.layers[index]) for index in bare]
        places = [(layer.base, layer.parameter_name) for layer in fused]
        with (
            tapped(layers, lambda tap, x, dy: self._collect(linear[tap], x, dy)),
            tapped_parameters(places, lambda tap, dW: self._collect_dense(bare[tap], dW)),
        ):
            yield

    def _pass(self, bar: tqdm) -> None:
        """Run every sample once; sketches turn at their turning points."""
        sketches = [estimator for estimator in self.estimators.values() if isinstance(estimator, SketchedGradient)]
        bounds = turning_points(self.config.num_samples) if sketches else [self.config.num_samples]
        part = 0
        for number, piece in enumerate(sample_pieces(self.trainer, bounds)):
            if piece.part > part:
                self._turn(sketches)
                part = piece.part
            self._step_together(number, piece)
            bar.update(piece.samples)

    def _collect(self, index: int, x: Tensor, dy: Tensor) -> None:
        self._meet(index)
        if self.weight > 0:
            (estimator,) = self.by_index[index]
            estimator.place(dy.device)
            estimator.add(x, dy, self.weight / self.loss_scale)

    def _collect_dense(self, index: int, dW: Tensor) -> None:
        """Fold the gradient of all experts of a layer into their accumulators; the caller frees it."""
        self._meet(index)
        if self.weight > 0:
            experts = cast(AdaptedExperts, self.layers[index])
            for estimator, G in zip(self.by_index[index], experts.by_expert(dW), strict=True):
                estimator.place(G.device)
                estimator.add_gradient(G, self.weight / self.loss_scale)

    def _meet(self, index: int) -> None:
        self.hits[index] += 1
        self.met.append(index)

    def _step_together(self, number: int, piece: Piece) -> None:
        """Take a step; where one process fails all do, instead of waiting for it in the next collective."""
        error = None
        try:
            self._step(number, piece)
        except Exception as raised:
            error = _with_advice(raised)
        code = 0 if error is None else 2 if isinstance(error, NonFiniteGradient) else 1
        codes = [row[0] for row in gather_integers(self.trainer, code)]
        if error is not None:
            raise error
        if any(codes):
            kind = NonFiniteGradient if max(codes) == 2 else RuntimeError
            failed = [rank for rank, code in enumerate(codes) if code]
            raise kind(f"Probe batch {number} failed on process {failed[0]}, whose error says why. {_UNCHANGED}")

    def _step(self, number: int, piece: Piece) -> None:
        items = count_items(self.trainer, piece)
        self.weight = items if piece.mine > 0 else 0.0
        loss = mean_loss(self.trainer, self.model, piece.batch, items)
        value = loss.item()
        if self.weight > 0 and not math.isfinite(value):
            raise NonFiniteGradient(f"Probe batch {number}: the loss is {value}. {_POISON_ADVICE}")
        self.met.clear()
        (loss * self.loss_scale).backward()
        if self.weight > 0:
            self._require_finite(number)
        self._count(piece, value)

    def _count(self, piece: Piece, loss: float) -> None:
        self.samples += piece.samples
        if self.first_batch is None:
            self.first_batch, self.first_items, self.first_loss = piece.batch, self.weight, loss
        if self.weight > 0:
            self.items += self.weight
            self.loss_sum += loss * self.weight
            self.tokens += count_tokens(piece.batch)

    def _require_finite(self, number: int) -> None:
        met = list(dict.fromkeys(self.met))
        if not met:
            return
        # A NaN or an infinity anywhere makes the sum of an accumulator non-finite: one small number a layer.
        total = lambda index: sum(
            (part.sum() for e in self.by_index[index] for part in e.sums()), start=torch.zeros(())
        )
        checks = torch.stack([total(index).cpu() for index in met])
        bad = [index for index, check in zip(met, checks.tolist(), strict=True) if not math.isfinite(check)]
        if bad:
            more = f" (the backward pass carried it to {len(bad) - 1} more layers)" if len(bad) > 1 else ""
            raise NonFiniteGradient(
                f"Probe batch {number}: the gradient of {self.layers[bad[0]].name} is not finite{more}. "
                f"{_POISON_ADVICE}"
            )

    def _turn(self, sketches: Sequence[SketchedGradient]) -> None:
        """Turn the sketches that have seen anything, alike everywhere: each process computes its share of them."""
        self._sum([part for sketch in sketches for part in sketch.since_last_turn()])
        sketches = [sketch for sketch in sketches if sketch.since_last_turn()[0].any()]  # an expert may have seen none
        if not sketches:  # no label so far, on any process
            return
        codes = gather_integers(self.trainer, *(DTYPES.index(sketch.dtype) for sketch in sketches))
        rank, size = self.trainer.accelerator.process_index, len(codes)
        for sketch, code in zip(sketches, zip(*codes, strict=True), strict=True):
            sketch.dtype = DTYPES[max(code)]  # a process that had no sample for the layer has not seen it
        turn(sketches[rank::size])
        for number, sketch in enumerate(sketches):
            if number % size != rank:
                sketch.await_owner()
        owned = [[part for sketch in sketches[owner::size] for part in sketch.known()] for owner in range(size)]
        self.bytes_sent += share_from_owners(self.trainer, owned)

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        self.bytes_sent += sum_over_processes(self.trainer, tensors)

    def _add_up(self) -> float:
        """Add up the counts and the sums of all processes; return the number of items."""
        totals = torch.tensor([self.items, self.loss_sum, self.tokens, *self.hits], dtype=torch.float64)
        sum_over_processes(self.trainer, [totals])
        self.items, self.loss_sum, self.tokens, *self.hits = totals.tolist()
        self.first_loss = mean_over_processes(self.trainer, self.first_loss, self.first_items)
        if self.items == 0:
            raise ValueError(
                f"The {self.samples} samples of the probe hold no label to learn from (all are {IGNORED_LABEL}, or "
                "the data is empty). Check the data collator and the labels of the train dataset."
            )
        unreached = self._unreached()
        if unreached and not self.config.allow_unreached:
            raise ValueError(
                f"The loss never reaches {len(unreached)} adapted layers: {', '.join(unreached[:5])}. Leave them out "
                "of `target_modules`, or set LoRAGAConfig(allow_unreached=True) to start them as plain LoRA."
            )
        if self.samples < self.config.num_samples:
            logger.warning(
                "The probe used %d of the %d samples asked for: the data has no more.",
                self.samples,
                self.config.num_samples,
            )
        self._sum([part for estimator in self.estimators.values() for part in estimator.sums()])
        return self.items

    def _unreached(self) -> list[str]:
        return [layer.name for layer, count in zip(self.layers, self.hits, strict=True) if count == 0]

    def _result(self, items: float, seconds: float) -> GradientEstimate:
        return GradientEstimate(
            estimators=self.estimators,
            samples=self.samples,
            items=items,
            tokens=int(self.tokens),
            loss=self.loss_sum / items,
            seconds=seconds,
            bytes_sent=self.bytes_sent,
            unreached=self._unreached(),
            first_batch=self.first_batch,
            first_items=self.first_items,
            first_loss=self.first_loss,
        )

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.num_samples,
            desc="LoRA-GA probe",
            unit="sample",
            leave=False,
            disable=self.trainer.args.disable_tqdm or not self.trainer.is_world_process_zero(),
        )


def _with_advice(error: Exception) -> Exception:
    """Return the error; where memory ran out, one of its type that also says what to change."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
        return error
    # The first sentence is the allocator's: `auto_find_batch_size` looks for its words.
    advice = type(error)(
        f"{text}\nThis was in the probe of LoRA-GA, which holds its sketches, and what one micro-batch of training "
        f"holds. {_UNCHANGED} Lower per_device_train_batch_size (and raise "
        "gradient_accumulation_steps), turn on gradient_checkpointing, or lower LoRAGAConfig.sketch_size; fewer "
        "num_samples do not help."
    )
    advice.__cause__ = error
    return advice


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
