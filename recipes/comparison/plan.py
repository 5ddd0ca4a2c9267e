"""Cost of a comparison, estimated before it begins."""

import statistics
from collections.abc import Callable, Sequence

from comparison.arms import Arm
from comparison.run import Result
from comparison.settings import CompareArguments


def planned_runs(arms: Sequence[Arm], compare: CompareArguments) -> int:
    """Count the runs without extensions: every arm over its rates, then the other seeds at the best one."""
    return len(arms) * (len(compare.rates) + len(compare.seeds) - 1)


def run_seconds(results: Sequence[Result], steps: int, points: int) -> float:
    """Return what a run takes by the medians of runs that were made, however few steps they had."""
    step, evaluation, start = (
        statistics.median(value for result in results if (value := getattr(result, name)) is not None)
        for name in ("step_seconds", "eval_seconds", "start_seconds")
    )
    return steps * step + points * evaluation + start


def describe_plan(
    arms: Sequence[Arm], compare: CompareArguments, done: Sequence[Result], steps: int, trial: Callable[[], Result]
) -> str:
    """
    Say how many runs there will be and how long they will take.

    Args:
        arms: what is compared.
        compare: rates, seeds and evaluations.
        done: results that exist already; by their times the rest is judged.
        steps: of each run.
        trial: makes a short run where there is no result yet.
    """
    runs = planned_runs(arms, compare)
    names = {arm.name for arm in arms}
    done = [result for result in done if result.arm in names]
    known = done or [trial()]
    each = run_seconds(known, steps, compare.eval_points)
    judged = f"{len(done)} runs that are done" if done else f"a few steps of {known[0].arm!r}"
    left = max(0, runs - len(done))
    return (
        f"{len(arms)} arms x ({len(compare.rates)} rates + {len(compare.seeds) - 1} further seeds) = {runs} runs of "
        f"{steps} steps, {len(done)} of them done; sweeps may add up to {compare.max_extensions} rates an arm.\n"
        f"About {each:.0f} s a run by {judged}: {clock(each * left)} for the {left} that are left."
    )


def clock(seconds: float) -> str:
    """Write seconds as hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
