"""The next run of a comparison: every rate, further ones while the best lies at an end, then the seeds."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from comparison.sweep import Sweep, extend, judge


RATES = (1e-4, 3e-4, 1e-3)


def play(sweep: Sweep, score) -> tuple[dict, object]:
    """Do whatever `judge` asks for until it asks for nothing."""
    scores = {}
    for _ in range(100):
        verdict = judge(sweep, scores)
        if not verdict.todo:
            return scores, verdict
        rate, seed = verdict.todo[0]
        assert (rate, seed) not in scores
        scores[rate, seed] = score(rate, seed)
    raise AssertionError("the sweep does not end")


def bowl(best: float):
    return lambda rate, seed: abs(math.log(rate / best))


def test_a_best_rate_inside_the_sweep_wins_and_is_run_with_every_seed():
    scores, verdict = play(Sweep(RATES, (0, 1, 2), 3), bowl(3e-4))
    assert verdict.winner == 3e-4
    assert scores.keys() == {(rate, 0) for rate in RATES} | {(3e-4, 1), (3e-4, 2)}


def test_a_best_rate_at_the_high_end_is_no_winner_until_a_larger_one_is_worse():
    scores, verdict = play(Sweep(RATES, (0,), 3), bowl(3.3e-3))
    assert verdict.winner == 3.3e-3
    assert sorted(rate for rate, _ in scores) == [*RATES, 3.3e-3, 1.1e-2]


def test_a_best_rate_at_the_low_end_is_no_winner_until_a_smaller_one_is_worse():
    scores, verdict = play(Sweep(RATES, (0,), 3), bowl(3.3e-5))
    assert verdict.winner == 3.3e-5
    assert sorted(rate for rate, _ in scores) == [1.1e-5, 3.3e-5, *RATES]


def test_where_extensions_run_out_no_winner_is_named_and_no_seed_is_spent():
    scores, verdict = play(Sweep(RATES, (0, 1), 2), lambda rate, seed: -rate)
    assert verdict.winner is None
    assert verdict.best == max(rate for rate, _ in scores)
    assert "high end" in verdict.reason
    assert len(scores) == len(RATES) + 2
    assert {seed for _, seed in scores} == {0}


@pytest.mark.parametrize("failed", [math.nan, math.inf])
def test_a_run_that_failed_is_the_worst_and_never_wins(failed):
    _, verdict = play(Sweep(RATES, (0,), 2), lambda rate, seed: failed if rate > 5e-4 else -rate)
    assert verdict.winner == 3e-4
    _, verdict = play(Sweep(RATES, (0,), 2), lambda rate, seed: failed)
    assert verdict.winner is None
    assert verdict.best is None


def test_the_seeds_that_follow_do_not_change_the_rate():
    """They are many runs at one rate: choosing again among all would favour it for its luck alone."""
    _, verdict = play(Sweep(RATES, (0, 1, 2), 0), lambda rate, seed: bowl(3e-4)(rate, 0) if seed == 0 else 99.0)
    assert verdict.winner == 3e-4


def test_a_run_of_another_comparison_does_not_count():
    """A rate that was run once and is not among the rates any more must not win."""
    sweep = Sweep(RATES, (0,), 0)
    scores = {(rate, 0): bowl(3e-4)(rate, 0) for rate in RATES} | {(7e-4, 0): -5.0}
    assert judge(sweep, scores).winner == 3e-4


@settings(deadline=None)
@given(
    rates=st.lists(st.sampled_from([1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]), min_size=2, unique=True),
    best=st.floats(-14, -4),
    extensions=st.integers(0, 4),
)
def test_a_winner_is_better_than_a_smaller_and_a_larger_rate(rates, best, extensions):
    scores, verdict = play(Sweep(tuple(rates), (0, 1), extensions), bowl(math.exp(best)))
    tried = sorted(rate for rate, seed in scores if seed == 0)
    assert len(tried) <= len(rates) + extensions
    if verdict.winner is not None:
        assert tried[0] < verdict.winner < tried[-1]
        assert all(scores[verdict.winner, 0] <= scores[rate, 0] for rate in tried)
        assert (verdict.winner, 1) in scores
    else:
        assert verdict.best in (tried[0], tried[-1])


def test_extending_keeps_the_ratio_of_that_end():
    assert extend([1e-4, 1e-3, 3e-3], low=True)[0] == 1e-5
    assert extend([1e-4, 1e-3, 3e-3], low=False)[-1] == 9e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (((1e-3,), (0,), 1), "two or more different rates"),
        (((1e-3, 1e-3), (0,), 1), "two or more different rates"),
        (((1e-3, 0.0), (0,), 1), "greater than 0"),
        (((1e-3, 1e-2), (0, 0), 1), "different seeds"),
        (((1e-3, 1e-2), (), 1), "one or more"),
        (((1e-3, 1e-2), (0,), -1), "max_extensions"),
    ],
)
def test_an_impossible_budget_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sweep(*values)
