"""The next run of an arm, chosen from those that are done: a sweep over rates, then seeds on the winner."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


Run = tuple[float, int]  # learning rate, seed


@dataclass(frozen=True)
class Sweep:
    """
    The budget of one arm.

    Args:
        rates: learning rates to begin with, two or more.
        seeds: the first one is swept over, all of them are run at the winning rate.
        extensions: rates that may be added beyond the ends.
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    extensions: int

    def __post_init__(self) -> None:
        if len(set(self.rates)) < 2 or len(set(self.rates)) < len(self.rates) or min(self.rates) <= 0:
            raise ValueError(f"rates={list(self.rates)}: a sweep needs two or more different rates greater than 0.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: give one or more different seeds.")
        if self.extensions < 0:
            raise ValueError(f"max_extensions={self.extensions} must be at least 0.")


@dataclass(frozen=True)
class Verdict:
    """
    What the runs say so far.

    Args:
        todo: the runs to do next; empty when the arm is finished.
        best: the rate with the least score on the first seed; `None` while the sweep runs, or where every run failed.
        reason: why the arm has no winner, where it has none.
    """

    todo: tuple[Run, ...]
    best: float | None = None
    reason: str | None = None

    @property
    def winner(self) -> float | None:
        """The best rate, if others on both sides of it are worse."""
        return None if self.reason else self.best


def judge(sweep: Sweep, scores: Mapping[Run, float]) -> Verdict:
    """
    Say what to run next and, when the sweep is over, which rate won.

    A best rate at an end of the sweep does not win: the sweep is extended there by the ratio of the two rates at that
    end, until the extensions are used up. A score that is not finite counts as the worst.

    Args:
        sweep: the budget.
        scores: of the runs that are done, smaller is better. Rates that `sweep` has not asked for are left out.
    """
    first = sweep.seeds[0]
    rates, left = sorted(sweep.rates), sweep.extensions
    while True:
        todo = tuple((rate, first) for rate in rates if (rate, first) not in scores)
        if todo:
            return Verdict(todo)
        on_first = [_rank_failed_last(scores[rate, first]) for rate in rates]
        best = min(range(len(rates)), key=on_first.__getitem__)
        if on_first[best] == math.inf:
            return Verdict((), None, f"every rate from {rates[0]:g} to {rates[-1]:g} ended without a finite score")
        if 0 < best < len(rates) - 1:
            break
        if left == 0:
            place = "low" if best == 0 else "high"
            return Verdict((), rates[best], f"its best rate {rates[best]:g} is at the {place} end of its sweep")
        left -= 1
        rates = extend(rates, low=best == 0)
    seeds = [seed for seed in sweep.seeds if (rates[best], seed) not in scores]
    return Verdict(tuple((rates[best], seed) for seed in seeds), rates[best])


def extend(rates: Sequence[float], low: bool) -> list[float]:
    """Return ascending rates with one more at one end, in the ratio of the two there and rounded to two digits."""
    if low:
        return [_round_to_two_digits(rates[0] ** 2 / rates[1]), *rates]
    return [*rates, _round_to_two_digits(rates[-1] ** 2 / rates[-2])]


def _round_to_two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def _rank_failed_last(score: float) -> float:
    return score if math.isfinite(score) else math.inf
