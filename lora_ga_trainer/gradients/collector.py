"""Collector of gradients: from the taps on the layers into their accumulators, over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.layer import AdaptedLayer
from ..adapters.parameter import AdaptedParameter
from ..config import LoRAGAConfig
from ..engines.collectives import gather_integers, share_from_owners, sum_over_processes
from ..engines.support import probed_module
from .accumulator import DTYPES, Accumulator, forget_shared_matrices
from .estimate import NonFiniteGradient
from .failing import UNCHANGED
from .leaves import discarded_gradients
from .moments import LayerMoments, make_moment_sums
from .rows import OneHot
from .sketch import make_accumulators, turn
from .sketched import SketchedGradient
from .tap import tapped, tapped_parameters


if TYPE_CHECKING:
    from transformers import Trainer

POISON_ADVICE = (
    f"{UNCHANGED} Look for empty or extreme examples in that batch, or train in bf16 or fp32 instead of fp16."
)


class Collector:
    """
    The accumulators of all layers and what fills them.

    Args:
        trainer: whose processes share the work.
        config: `init`, `estimator`, `sketch_size` and `probe_seed` are read.
        layers: the layers to look at.
        loss_scale: factor of the loss that a backward pass starts from.
        again: accumulators of all matrices of `layers`, to be filled instead of new ones. Nothing else is gathered.

    Attributes:
        accumulators: one per adapted layer, of fused experts one each, by name.
        weight: of the backward pass that runs, 0 where none runs that counts. The loss is a mean over items, so a
            micro-batch weighs as much as it has items.
        share: of the samples of that pass that counts, with or without a label.
        bytes_sent: bytes that this process handed to collectives.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: LoRAGAConfig,
        layers: Sequence[AdaptedLayer],
        loss_scale: float,
        again: dict[str, Accumulator] | None = None,
    ) -> None:
        self.trainer, self.layers, self.loss_scale = trainer, layers, loss_scale
        if again is None:
            shapes = [(name, layer.shape) for layer in layers for name in layer.matrices]
            again = make_accumulators(shapes, config, max(layer.rank for layer in layers))
            self.moment_sums = make_moment_sums(config, layers)
        else:
            self.moment_sums = {}
        self.accumulators = again
        self.weight = self.share = 0.0
        self.bytes_sent = 0
        self._looking = self._running = False
        self._hits = dict.fromkeys((layer.name for layer in layers), 0)
        self._met: dict[str, AdaptedLayer] = {}  # in the order in which the backward pass reached them

    @property
    def sketches(self) -> list[SketchedGradient]:
        return [found for found in self.accumulators.values() if isinstance(found, SketchedGradient)]

    def _of(self, layer: AdaptedLayer) -> list[Accumulator]:
        return [self.accumulators[name] for name in layer.matrices]

    @contextmanager
    def taps(self) -> Iterator[None]:
        """Collect from every backward pass while the context is open."""
        linear = [layer for layer in self.layers if layer.has_inputs]
        bare = [layer for layer in self.layers if isinstance(layer, AdaptedParameter)]
        modules = {layer.name: layer.base for layer in linear}
        parameters = [(layer.user, layer.base, layer.parameter_name) for layer in bare]
        with (
            tapped(
                modules,
                lambda index, x, dy, own: self._collect(linear[index], x, dy, own),
                counts=lambda index: linear[index].acts,
            ),
            tapped_parameters(
                parameters,
                lambda index, dW: self._collect_dense(bare[index], dW),
                counts=lambda index: bare[index].acts,
            ),
        ):
            yield

    def _collect(self, layer: AdaptedLayer, x: Tensor | OneHot, dy: Tensor, own: bool) -> None:
        if not self._running:
            return
        self._meet(layer)
        (accumulator,) = self._of(layer)
        if self._counts(accumulator):
            # The layers of a model that is spread over devices compute on their own: the sums live beside them.
            accumulator.move_to(dy.device)
            accumulator.add(x, dy, self.weight / self.loss_scale)
        if own and self.share > 0 and self.moment_sums:
            # Rows without a label have an input all the same, wherever the data is cut into micro-batches.
            self.moment_sums[layer.name].add(x, dy, self.weight / self.share / self.loss_scale, self.share)

    def _collect_dense(self, layer: AdaptedParameter, dW: Tensor) -> None:
        """Fold the gradient of a parameter, all experts of a layer say, into its accumulators; the caller frees it."""
        if not self._running:
            return
        self._meet(layer)
        for accumulator, G in zip(self._of(layer), layer.by_expert(dW), strict=True):
            if self._counts(accumulator):
                accumulator.move_to(G.device)
                accumulator.add_gradient(G, self.weight / self.loss_scale)

    def _counts(self, accumulator: Accumulator) -> bool:
        return self.weight > 0 and (accumulator.sketched or not self._looking)

    def _meet(self, layer: AdaptedLayer) -> None:
        # Passes that do not count are met as well: every process tells the same of which layers the loss reaches.
        self._hits[layer.name] += 1
        self._met[layer.name] = layer

    def collect(self, loss: Tensor, weight: float, share: float, number: int) -> None:
        """
        Run the backward pass of the mean `loss` of one batch.

        Args:
            loss: with the graph attached.
            weight: items that it is a mean over and that count.
            share: of its samples that counts; 0 where it runs for the sake of the other processes.
            number: of the batch, for messages.

        Raises:
            `NonFiniteGradient`: naming the batch and the layer that the backward pass reached first.
        """
        self.weight, self.share = weight, share
        self._met.clear()
        self._running = True  # a backward pass inside a loss is not that of the loss
        try:
            with discarded_gradients(probed_module(self.trainer)):
                (loss * self.loss_scale).backward()
        finally:
            self._running = False
        self.weight = self.share = 0.0
        if weight > 0:
            self._require_finite(number)

    def _require_finite(self, number: int) -> None:
        if not self._met:
            return
        # A NaN or an infinity anywhere makes the sum of an accumulator non-finite. One small number a layer is moved
        # to the CPU, in a single transfer, instead of a look at every tensor.
        parts = lambda layer: [p.sum(dtype=torch.float32) for found in self._of(layer) for p in found.sums()]
        checks = torch.stack([torch.stack(parts(layer)).sum().cpu() for layer in self._met.values()])
        bad = [name for name, check in zip(self._met, checks.tolist(), strict=True) if not math.isfinite(check)]
        if bad:
            more = f" (the backward pass carried it to {len(bad) - 1} more layers)" if len(bad) > 1 else ""
            raise NonFiniteGradient(
                f"Probe batch {number}: the gradient of {bad[0]} is not finite{more}. {POISON_ADVICE}"
            )

    def turn(self) -> None:
        """
        Turn the sketches that have seen anything. Collective: each process computes its share of them.

        Factorisations of the same matrix differ in the last bits between machines, and sketches with different test
        matrices can't be added up. So one process computes each and all others take its result.
        """
        self._sum([part for sketch in self.sketches for part in sketch.since_last_turn()])
        # An expert may have seen nothing. The sums are the same everywhere, so all processes leave out the same ones.
        sketches = [sketch for sketch in self.sketches if sketch.since_last_turn()[0].any()]
        if not sketches:  # no label so far, on any process
            return
        codes = gather_integers(self.trainer, *(DTYPES.index(sketch.dtype) for sketch in sketches))
        rank, size = self.trainer.accelerator.process_index, len(codes)
        for sketch, of_processes in zip(sketches, zip(*codes, strict=True), strict=True):
            sketch.dtype = DTYPES[max(of_processes)]  # a process that had no sample for the layer has not seen it
        turn(sketches[rank::size])
        for number, sketch in enumerate(sketches):
            if number % size != rank:
                sketch.await_owner()
        owned = [[part for sketch in sketches[owner::size] for part in sketch.known()] for owner in range(size)]
        self.bytes_sent += share_from_owners(self.trainer, owned)
        # Sketches that have turned hold matrices of their own. Those that have not share what they hold.
        forget_shared_matrices()

    @contextmanager
    def only_looking(self) -> Iterator[None]:
        """Show sketches, and nothing else, what passes while the context is open; [`forget`] it afterwards."""
        self._looking = True
        try:
            yield
        finally:
            self._looking = False

    def forget(self) -> None:
        """Let the sketches keep the directions they found, and nothing of what they have seen."""
        for sketch in self.sketches:
            for part in (sketch.S, *sketch.sums()):
                part.zero_()

    def unreached(self) -> list[str]:
        """Name the layers that no backward pass has reached on any process. Collective."""
        hits = torch.tensor(list(self._hits.values()), dtype=torch.float64)
        sum_over_processes(self.trainer, [hits])
        return [name for name, count in zip(self._hits, hits.tolist(), strict=True) if count == 0]

    def finish(self, items: float) -> None:
        """Turn the sums of all processes into the mean over `items`. Collective."""
        self._sum([part for total in self.accumulators.values() for part in total.sums()])
        self._sum([part for total in self.moment_sums.values() for part in total.sums()])
        for accumulator in self.accumulators.values():
            accumulator.divide(items)

    def moments(self) -> dict[str, LayerMoments]:
        """
        Return what the init asks for beside `G`, by the name of the layer; after [`finish`].

        Raises:
            `NonFiniteGradient`: naming a layer whose squares are beyond fp32.
        """
        found = {name: total.finish() for name, total in self.moment_sums.items()}
        for name, moments in found.items():
            if not all(torch.isfinite(value).all() for value in moments.state().values()):
                raise NonFiniteGradient(f"The second moments of {name} are beyond fp32. {POISON_ADVICE}")
        return found

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        self.bytes_sent += sum_over_processes(self.trainer, tensors)
