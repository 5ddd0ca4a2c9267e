"""Search of the largest rate that a loss bears along a line."""

from __future__ import annotations

import math
from collections.abc import Callable


# Neighbouring rates differ by this factor.
FACTOR = 2.0
# Doublings or halvings before a search gives up: from 1e-2 they reach below 1e-14 and beyond 1e10.
_MOST = 40


class NoRateFound(ValueError):
    """The loss along the line gives no rate to choose."""


def search_rates(loss_at: Callable[[float], float], loss_before: float, guess: float) -> dict[float, float]:
    """
    Evaluate a loss at rates a factor of 2 apart, from one that lowers it less than the best to one that raises it.

    Args:
        loss_at: the loss at a rate. What is not finite counts as infinitely high.
        loss_before: at rate 0.
        guess: the rate to look at first.

    Returns:
        The losses by rate, rates ascending. The last one is above `loss_before`. The least one has a higher one on
        either side.

    Raises:
        `NoRateFound`: if no rate lowers the loss, or none raises it.
    """
    losses: dict[float, float] = {}

    def look(rate: float) -> float:
        loss = loss_at(rate)
        losses[rate] = loss if math.isfinite(loss) else math.inf
        return losses[rate]

    rate = guess
    while look(rate) <= loss_before:
        rate *= FACTOR
        if len(losses) > _MOST:
            raise NoRateFound(
                f"the loss stays at or below {loss_before:.4g} up to a rate of {max(losses):.1e}: nothing bounds it"
            )
    rate = min(losses)
    while min(losses, key=losses.__getitem__) == rate or losses[rate] > loss_before:
        rate /= FACTOR
        look(rate)
        if len(losses) > _MOST:
            raise NoRateFound(
                f"the loss rises from {loss_before:.4g} even at a rate of {min(losses):.1e}: the updates do not "
                "descend"
            )
    return dict(sorted(losses.items()))


def largest_rate(losses: dict[float, float], loss_before: float) -> float:
    """
    Return the rate at which the loss comes back to `loss_before`, between two that were tried.

    It is that of the parabola through these two and the start, so it is exact for a parabola. 2 over it is the
    critical sharpness of arXiv 2601.16979.
    """
    rates = list(losses)
    above = len(rates) - 1
    while losses[rates[above - 1]] > loss_before:
        above -= 1
    low, high = rates[above - 1], rates[above]
    # The mean slope from the start to each of the two; the parabola's is linear in the rate.
    falling, rising = ((losses[rate] - loss_before) / rate for rate in (low, high))
    if not math.isfinite(rising):
        return low
    return low + (high - low) * -falling / (rising - falling)


def best_rate(losses: dict[float, float]) -> float:
    """
    Return the rate at which the loss is least: where the parabola through the best rate and its neighbours is.

    An infinite neighbour leaves the best of the rates that were tried.
    """
    rates = list(losses)
    best = min(range(len(rates)), key=lambda index: losses[rates[index]])
    left, middle, right = rates[best - 1 : best + 2]
    falling = (losses[middle] - losses[left]) / (middle - left)
    rising = (losses[right] - losses[middle]) / (right - middle)
    if not math.isfinite(rising - falling) or rising == falling:
        return middle
    # The slopes are those of the parabola half-way between its points.
    return (left + middle) / 2 + (right - left) / 2 * -falling / (rising - falling)
