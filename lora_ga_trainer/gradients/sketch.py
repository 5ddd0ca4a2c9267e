"""
Accumulators of a gradient `G = dL/dW (out, in)` that is only ever seen as pairs `(x, dy)` with `G = sum dy^T x`, or,
for fused experts, as the gradient of one micro-batch after the other.

`ExactGradient` keeps `G`. `SketchedGradient` sees every sample once and keeps `Y = G Omega (out, k)` and
`Z = G^T Psi (in, k)` for test matrices `Omega`, `Psi`. For the first sixteenth of the samples these are Gaussian (a
two-sided range finder, Halko, Martinsson, Tropp, arXiv 0909.4061). From each turning point on they are the singular
vectors of all that was seen before. At a turning point the sketches of the samples since the last one are completed to
a matrix. Its sum with what was known is cut to rank k (`recovery.merge`). So the first samples, which a blind sketch
shows least well, weigh least. Both kinds are linear in the data between turning points, so processes add their
accumulators.

The turning points and k, 4 columns for each of the 2r directions of LoRA-GA, were chosen by measuring: SmolLM2-135M,
r = 8, q, o, gate, up and down of layers 1, 15 and 28, fp32, the first GSM8K examples. The numbers are the share of the
energy of the best directions that is kept, of the worse side: mean over the 15 matrices, the worst one in brackets.

| samples, turning points, k                 | top 16        | directions 1-8 | directions 9-16 |
|--------------------------------------------|---------------|----------------|-----------------|
| 64, none, 96                               | .996 (.992)   | .998 (.996)    | .955 (.935)     |
| 64, a second pass over all, 96             | 1.000 (1.000) | 1.000 (1.000)  | 1.000 (.999)    |
| 64, 1/16 1/4 1/2, 96                       | 1.000 (1.000) | 1.000 (1.000)  | .997 (.994)     |
| 64, 1/16 1/8 1/4 1/2, 64                   | 1.000 (1.000) | 1.000 (1.000)  | .995 (.985)     |
| **64, 1/16 1/4 1/2, 64**                   | 1.000 (.999)  | 1.000 (1.000)  | .993 (.985)     |
| 64, 1/8 1/4 1/2, 64                        | .999 (.999)   | 1.000 (.999)   | .991 (.979)     |
| 64, 1/16 1/4, 64                           | 1.000 (.999)  | 1.000 (1.000)  | .989 (.965)     |
| 16, 1/16 1/8 1/4 1/2, 96                   | 1.000 (.999)  | 1.000 (1.000)  | .994 (.983)     |

Over all 150 sketched matrices of the model the marked one keeps 1.000 (.997), 1.000 (.999) and .992 (.967). It has 29%
fewer columns than k = 96, and what it misses of `B`'s directions (9-16) is little beside how far other samples would
have moved them; `recipes/benchmarks/fidelity.py` measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from ..config import LoRAGAConfig
from ..engines.devices import to_fp32
from ..maths.inits import INITS
from ..maths.recovery import TopSVD, merge
from .accumulator import Accumulator, ExactGradient, stack
from .sketched import SketchedGradient


_STACKED_BYTES = 2**26  # that the work on one stack may take, a single layer more; 2**28 was slower on a CPU
# Bytes of work for every number of an accumulator: fp32 copies and bases of twice the width; fp64 ones.
_TO_TURN, _TO_RECOVER = 16, 48
Item = TypeVar("Item")
Triplets = tuple[Tensor, Tensor, Tensor]  # U (out, k), S (k,), V (in, k)
# Shares of the samples after which the test matrices are made anew from what was seen.
_TURNING_POINTS = (1 / 16, 1 / 4, 1 / 2)


def turning_points(samples: int) -> list[int]:
    """Return the numbers of samples after which sketches turn, increasing; the last is `samples` itself."""
    points = {int(samples * share) for share in _TURNING_POINTS} | {samples}
    return sorted(point for point in points if point > 0)


def sketch_columns(config: LoRAGAConfig, rank: int) -> int:
    """Return k: `config.sketch_size`, by default 4 columns for each of [`directions_used`]."""
    return 4 * directions_used(config, rank) if config.sketch_size is None else config.sketch_size


def directions_used(config: LoRAGAConfig, rank: int) -> int:
    """
    Return how many singular pairs of `G` the init uses at this rank; the most that any may where it is none.

    Whitening uses twice as many: what is strong after it may be weak before, see `lora_ga_trainer.starts.directions`.
    """
    used = rank * (INITS[config.init].pairs if config.init in INITS else 2)
    return 2 * used if config.whitening > 0 else used


def is_sketched(shape: tuple[int, int], k: int) -> bool:
    """
    Tell whether a sketch is worth it: `4 k (in + out)` operations a token against `2 in out` for `G`.

    It has to save half of them, which pays for the turning points; in memory it saves half, too. And it has to be a
    small part of the layer: at a width of 6 k (MiniLM's 384, r = 8) it kept .93 of directions 9-16, the worst .81.
    """
    out_features, in_features = shape
    return in_features * out_features > 4 * k * (in_features + out_features) and min(shape) > 6 * k


def make_accumulators(
    layers: Sequence[tuple[str, tuple[int, int]]], config: LoRAGAConfig, rank: int
) -> dict[str, Accumulator]:
    """
    Make one empty accumulator a layer: exact where `config` asks for it or a sketch is not worth it, else a sketch.

    Args:
        layers: name and shape `(out, in)` of each.
        rank: the largest rank that the factors need.

    Raises:
        `ValueError`: if `config.sketch_size` is smaller than [`directions_used`] and a layer would be sketched.
    """
    k, least = sketch_columns(config, rank), directions_used(config, rank)
    accumulators: dict[str, Accumulator] = {}
    for name, shape in layers:
        if config.estimator == "exact" or not is_sketched(shape, k):
            accumulators[name] = ExactGradient(shape)
            continue
        if k < least:
            raise ValueError(
                f"LoRAGAConfig: sketch_size={k} can't hold the {least} directions that init={config.init!r} needs of "
                f"layer {name}. Use at least {least}; the default is {4 * least}."
            )
        accumulators[name] = SketchedGradient(shape, k, config.probe_seed)
    return accumulators


def turn(sketches: Sequence[SketchedGradient]) -> None:
    """Make the test matrices of `sketches` anew from what they have seen."""
    for some in _stacks(sketches, lambda sketch: sketch, lambda sketch: sketch.dtype, _TO_TURN):
        # A process that had no sample for a layer gets its dtype from the others and has not rounded the matrices yet.
        for sketch in some:
            sketch.compute_in(sketch.dtype)
        for sketch, triplets in zip(some, _merged(some, 1), strict=True):
            sketch.start_anew(*triplets)


def strongest(sketches: Sequence[SketchedGradient], times: int) -> list[Triplets]:
    """Return the `times * k` strongest triplets that each of `sketches` tells of; `times` is 1 or 2."""
    found: dict[int, Triplets] = {}
    for numbers in _stacks(
        range(len(sketches)), sketches.__getitem__, lambda number: sketches[number].dtype, _TO_TURN
    ):
        found.update(zip(numbers, _merged([sketches[number] for number in numbers], times), strict=True))
    return [found[number] for number in range(len(sketches))]


def _merged(some: Sequence[SketchedGradient], times: int) -> list[Triplets]:
    """Return the `times * k` strongest triplets of sketches of one shape and dtype."""
    Omega, Psi, S = (stack([to_fp32(sketch.known()[i]) for sketch in some]) for i in range(3))
    Y, Z = (stack([to_fp32(sketch.since_last_turn()[i]) for sketch in some]) for i in range(2))
    return list(zip(*merge(Omega, Psi, S, Y, Z, times * some[0].k), strict=True))


def top_svds(accumulators: Mapping[str, Accumulator], wanted: Mapping[str, int]) -> dict[str, TopSVD]:
    """Return the top `wanted[name]` singular triplets of the gradient of each name in `wanted`."""
    found: dict[str, TopSVD] = {}
    for names in _stacks(list(wanted), accumulators.__getitem__, wanted.__getitem__, _TO_RECOVER):
        some = [accumulators[name] for name in names]
        found.update(zip(names, some[0].svds(some, wanted[names[0]]), strict=True))
    return found


def _stacks(
    items: Iterable[Item], of: Callable[[Item], Accumulator], kind: Callable[[Item], Hashable], work: int
) -> Iterator[list[Item]]:
    """
    Group items whose accumulators are of one shape, device, dtype and `kind`; `work` bytes a number limit a group.

    Small factorisations are all overhead: one call for many layers costs little more than for one.
    """
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        sums = of(item).sums()
        groups.setdefault((*(p.shape for p in sums), sums[0].device, sums[0].dtype, kind(item)), []).append(item)
    for group in groups.values():
        numbers = sum(part.numel() for part in of(group[0]).sums())
        size = max(1, _STACKED_BYTES // (work * numbers))
        for first in range(0, len(group), size):
            yield group[first : first + size]
