"""What is computed of many accumulators at once: those of one shape are stacked, in one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from .precision import narrow
from .recovery import TopSVD, merge
from .sketch import Estimator, SketchedGradient, stack


_STACKED_BYTES = 2**26  # that the work on one stack may take, a single layer more; 2**28 was slower on a CPU
# Bytes of work for every number of an accumulator: fp32 copies and bases of twice the width; fp64 ones.
_TO_TURN, _TO_RECOVER = 16, 48

Item = TypeVar("Item")


def turn(sketches: Sequence[SketchedGradient]) -> None:
    """Make the test matrices of `sketches` anew from what they have seen."""
    for some in _stacks(sketches, lambda sketch: sketch, lambda sketch: sketch.dtype, _TO_TURN):
        for sketch in some:
            sketch.compute_in(sketch.dtype)
        T, L, S = (stack([narrow(sketch.known()[i]) for sketch in some]) for i in range(3))
        Y, Z = (stack([narrow(sketch.since_last_turn()[i]) for sketch in some]) for i in range(2))
        for sketch, *triplets in zip(some, *merge(T, L, S, Y, Z), strict=True):
            sketch.start_anew(*triplets)


def top_svds(estimators: Mapping[str, Estimator], wanted: Mapping[str, int]) -> dict[str, TopSVD]:
    """Return the top `wanted[name]` singular triplets of the gradient of each name in `wanted`."""
    found: dict[str, TopSVD] = {}
    for names in _stacks(list(wanted), estimators.__getitem__, wanted.__getitem__, _TO_RECOVER):
        some = [estimators[name] for name in names]
        found.update(zip(names, some[0].svds(some, wanted[names[0]]), strict=True))
    return found


def _stacks(
    items: Sequence[Item], of: Callable[[Item], Estimator], kind: Callable[[Item], Hashable], work: int
) -> Iterator[list[Item]]:
    """Group items whose accumulators are of one shape, device and `kind`; `work` bytes a number limit a group."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        sums = of(item).sums()
        groups.setdefault((*(part.shape for part in sums), sums[0].device, kind(item)), []).append(item)
    for group in groups.values():
        numbers = sum(part.numel() for part in of(group[0]).sums())
        size = max(1, _STACKED_BYTES // (work * numbers))
        for first in range(0, len(group), size):
            yield group[first : first + size]
