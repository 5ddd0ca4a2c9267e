"""
A second look at the layers whose sketch has kept too little: one more pass over the same samples, for them alone.

It keeps their whole gradients in fp32, the worst layers first, as long as all that it holds takes at most eight times
the bytes that the first pass took for all layers. Such a gradient is exact. For the others the directions that the
first pass found are the test matrices, all 2k of them, which is one step of a power iteration. The backward passes
cost as much as those of the first pass, for one layer as for all.

Energy of the best directions 1 to 4 and 5 to 8 that a sketch keeps, of the worse side, of made gradients of
1024 x 1024 with r = 4, k = 32 and 64 samples, one seed. (The second look takes the whole gradients here.)

| singular values | first pass | sketch with 64 found columns |
|---|---|---|
| of independent tokens | .391, .420 | .674, .712 |
| of independent entries, spread evenly over the samples | .593, .635 | .812, .819 |
| i^-.2 | .664, .512 | .960, .870 |
| i^-.35 | .918, .781 | .998, .982 |
| i^-.5 | .980, .931 | 1.000, .998 |
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.collectives import gather_integers, share_from_owners
from ..maths.recovery import TopSVD
from .accumulator import Accumulator, ExactGradient
from .collector import Collector
from .counting import Counts
from .estimate import GradientEstimate
from .failing import failing_together
from .passes import collect_loss, weighed_loss
from .samples import micro_batches
from .sketch import directions_used, is_sketched, strongest, top_svds
from .sketched import SketchedGradient


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

# Added to the probe's seed: the held-out columns are not those that the first pass may have been sorted by.
_SEEDS = 4
# How far the mean losses of the two passes may differ by rounding.
_ROUNDING = 0.01
# How many bytes the second look may take for each that the first pass took. A whole gradient in fp32 takes 5.3 for
# each of its sketch at 1024 x 1024 and r = 4, 6.4 at 2048 x 2048 and r = 8, and 12.8 at 4096 x 4096; twice as many
# where the sketch is in bf16. Where all of the last ones fail, the worse half is kept whole: 62% of all gradients.
_ROOM = 8
# Shares go from process to process as integers.
_MILLION = 1_000_000


def owners_of(trainer: Trainer, layers: Sequence[AdaptedLayer]) -> dict[str, int]:
    """Return by layer the process that computes its singular triplets and its start."""
    return {layer.name: number % trainer.accelerator.num_processes for number, layer in enumerate(layers)}


def directions_of(config: LoRAGAConfig, layer: AdaptedLayer) -> int:
    """Return how many singular triplets of its gradient the start of a layer takes."""
    return min(directions_used(config, layer.rank), *layer.shape)


def energy_kept(top: TopSVD, rank: int) -> list[float]:
    """Return the energy kept of directions 1 to r and, if there are more, of the next r."""
    count = len(top.S)
    return [top.kept(0, min(rank, count)), *([top.kept(rank, count)] if count > rank else [])]


def find_short(
    trainer: Trainer, config: LoRAGAConfig, layers: Sequence[AdaptedLayer], estimate: GradientEstimate
) -> list[AdaptedLayer]:
    """
    Return the layers that keep less than `config.min_energy_kept`, the worst first. Collective.

    Each process looks at its share of the layers. The triplets of those that keep enough are left in `estimate.tops`,
    for their start.
    """
    least, owners = config.min_energy_kept, owners_of(trainer, layers)
    sketched = [layer for layer in layers if any(estimate.estimators[name].sketched for name in layer.matrices)]
    if least is None or not sketched:
        return []
    mine = [layer for layer in sketched if owners[layer.name] == trainer.accelerator.process_index]
    wanted = {name: directions_of(config, layer) for layer in mine for name in layer.matrices}
    tops = top_svds(estimate.estimators, wanted)
    kept = {
        layer.name: min(share for name in layer.matrices for share in energy_kept(tops[name], layer.rank))
        for layer in mine
    }
    # Rounded up, so that what passes here passes everywhere; the owner of a layer is the only one to say less than 1.
    # What is NaN fails.
    shares = [kept.get(layer.name, 1.0) for layer in sketched]
    codes = gather_integers(trainer, *(0 if math.isnan(share) else math.ceil(_MILLION * share) for share in shares))
    lowest = {layer.name: min(code) for layer, code in zip(sketched, zip(*codes, strict=True), strict=True)}
    short = [layer for layer in sketched if lowest[layer.name] < _MILLION * least]
    short.sort(key=lambda layer: lowest[layer.name])
    again = {name for layer in short for name in layer.matrices}
    estimate.tops = {name: top for name, top in tops.items() if name not in again}
    return short


def kept_whole(layers: Sequence[AdaptedLayer], estimate: GradientEstimate) -> set[str]:
    """
    Return the names of the layers whose whole gradients a second look keeps. All processes come to the same.

    First those for which a sketch of 2k columns is not worth it, see [`is_sketched`]; then as many of the others, in
    their order, as there is room for.
    """
    taken = {name: _bytes_of(estimator) for name, estimator in estimate.estimators.items()}
    # A sketch of 2k columns takes at most twice as much as one of k.
    room = _ROOM * sum(taken.values()) - 2 * sum(taken[name] for layer in layers for name in layer.matrices)
    whole: set[str] = set()
    worth_sketching = {
        layer.name: all(is_sketched(layer.shape, 2 * estimate.estimators[name].directions) for name in layer.matrices)
        for layer in layers
    }
    for layer in sorted(layers, key=lambda layer: worth_sketching[layer.name]):
        more = sum(4 * math.prod(layer.shape) - 2 * taken[name] for name in layer.matrices)
        if more <= room or not worth_sketching[layer.name]:
            whole.add(layer.name)
            room -= more
    return whole


def _bytes_of(estimator: Accumulator) -> int:
    """Count what an accumulator holds, on every process alike: `dtype` is that of all, what is held may be wider."""
    narrow = estimator.sketched and estimator.dtype is torch.bfloat16
    return sum(part.numel() for part in estimator.held()) * (2 if narrow else 4)


def look_again(
    trainer: Trainer,
    model: nn.Module,
    config: LoRAGAConfig,
    layers: Sequence[AdaptedLayer],
    estimate: GradientEstimate,
    loss_scale: float,
    skip: int = 0,
) -> None:
    """
    Run the samples of the probe once more, for `layers`, and put what is seen into `estimate`. Collective.

    Args:
        trainer: lent, in the order of the probe and in the state that the first pass began with.
        model: that runs.
        config: of the probe.
        layers: to look at, the worst first.
        estimate: of the first pass.
        loss_scale, skip: of the first pass.
    """
    begin, counts = time.perf_counter(), Counts()
    again, sent = _second_accumulators(trainer, config, layers, estimate)
    estimate.estimators.update(again)
    collector = Collector(trainer, config, layers, loss_scale, again)
    bar = tqdm(
        total=config.num_samples,
        desc="LoRA-GA probe, second look",
        unit="sample",
        leave=False,
        disable=trainer.args.disable_tqdm or not trainer.is_world_process_zero(),
    )
    with bar, collector.taps():
        for number, micro_batch in enumerate(micro_batches(trainer, config.num_samples, skip)):
            with failing_together(trainer, number):
                loss, weight = weighed_loss(trainer, model, micro_batch, number)
                collect_loss(collector, counts, loss, weight, micro_batch, number)
            bar.update(micro_batch.samples)
    counts.sum_over(trainer)
    _name_others(counts, estimate)
    collector.finish(counts.items)
    estimate.seen_twice = [layer.name for layer in layers]
    estimate.bytes_sent += sent + collector.bytes_sent
    estimate.seconds += time.perf_counter() - begin


def _second_accumulators(
    trainer: Trainer, config: LoRAGAConfig, layers: Sequence[AdaptedLayer], estimate: GradientEstimate
) -> tuple[dict[str, Accumulator], int]:
    """Make an empty accumulator for each matrix, with the directions found so far; return the bytes sent as well."""
    whole = kept_whole(layers, estimate)
    again: dict[str, Accumulator] = {}
    wide: list[tuple[SketchedGradient, SketchedGradient]] = []
    for layer in layers:
        for name in layer.matrices:
            first = estimate.estimators[name]
            if layer.name in whole or not isinstance(first, SketchedGradient):
                again[name] = ExactGradient(layer.shape)
                continue
            second = SketchedGradient(layer.shape, 2 * first.k, config.probe_seed + _SEEDS)
            second.dtype = first.dtype
            second.move_to(first.Y.device)
            again[name] = second
            wide.append((first, second))
    # As at a turning point, one process computes the directions of each and all others take its result.
    rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = wide[rank::size]
    for (_, second), (U, S, V) in zip(mine, strongest([first for first, _ in mine], 2), strict=True):
        second.start_anew(U, S.new_zeros(S.shape), V)
    for number, (_, second) in enumerate(wide):
        if number % size != rank:
            second.await_owner()
    owned = [[part for _, second in wide[owner::size] for part in second.known()] for owner in range(size)]
    return again, share_from_owners(trainer, owned)


def _name_others(counts: Counts, estimate: GradientEstimate) -> None:
    """Say that the second pass saw other samples than the first, where data can't be read twice alike."""
    figures = counts.samples, counts.items, counts.tokens
    same_loss = math.isclose(counts.loss_sum / counts.items, estimate.loss, rel_tol=_ROUNDING, abs_tol=1e-6)
    if figures != (estimate.samples, estimate.items, estimate.tokens) or not same_loss:
        logger.warning(
            "The second look of the probe read other samples than the first: %d samples, %g items and %d tokens with "
            "a mean loss of %g, instead of %d, %g, %d and %g. The layers that it was for start from its samples. "
            "LoRAGAConfig(min_energy_kept=None) leaves it out.",
            *figures,
            counts.loss_sum / counts.items,
            estimate.samples,
            estimate.items,
            estimate.tokens,
            estimate.loss,
        )
