"""Runs of a comparison in their order: sweeps first, then the further seeds."""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from comparison.arms import Arm
from comparison.outcome import Row
from comparison.run import Result, Task, run_arm
from comparison.settings import CompareArguments, metric_of
from comparison.store import Store
from comparison.sweep import Sweep, Verdict, judge


class Comparison:
    """
    All arms on one task: what is done, what is left, what came out.

    Args:
        arms: what is compared.
        compare: the budget.
        task: what all runs share.
        store: where results are kept.
    """

    def __init__(self, arms: Sequence[Arm], compare: CompareArguments, task: Task, store: Store) -> None:
        self.arms, self.compare, self.task, self.store = arms, compare, task, store
        self.metric, self.sign = metric_of(task.args)
        self.sweeps = {
            arm.name: Sweep(
                tuple(float(f"{rate * arm.rate_factor:.6g}") for rate in compare.rates),
                tuple(compare.seeds),
                compare.max_extensions,
            )
            for arm in arms
        }
        self.is_main = task.args.process_index == 0
        self.results = _share_value(store.load() if self.is_main else None)

    def score(self, result: Result) -> float:
        """Return what decides between rates: less is better."""
        last = result.evals[-1]
        if self.metric not in last:
            known = ", ".join(name for name in last if name.startswith("eval_"))
            raise ValueError(f"metric_for_best_model: there is no {self.metric!r} among {known}.")
        return self.sign * last[self.metric]

    def scores(self, arm: Arm) -> dict[tuple[float, int], float]:
        return {(r.rate, r.seed): self.score(r) for r in self.results if r.arm == arm.name}

    def verdict(self, arm: Arm) -> Verdict:
        return judge(self.sweeps[arm.name], self.scores(arm))

    def todo(self) -> list[tuple[Arm, float, int]]:
        """List the runs that can be told now, all sweeps before the further seeds."""
        runs = [(arm, rate, seed) for arm in self.arms for rate, seed in self.verdict(arm).todo]
        return sorted(runs, key=lambda run: run[2] != self.compare.seeds[0])

    def run(self, arm: Arm, rate: float, seed: int, points: int, steps: int | None = None) -> Result:
        """Make one run; every process gets the result of the first one, so that all decide alike."""
        return _share_value(run_arm(self.task, arm, rate, seed, points, steps))

    def finish(self) -> list[Row]:
        """Make every run that is left and return one row an arm."""
        with tqdm(desc="runs", disable=not self.is_main, initial=len(self.results)) as bar:
            while todo := self.todo():
                bar.total = len(self.results) + len(todo)
                arm, rate, seed = todo[0]
                bar.set_postfix_str(f"{arm.name}, rate {rate:g}, seed {seed}")
                result = self.run(arm, rate, seed, self.compare.eval_points)
                if self.is_main:
                    self.store.add(arm.slug, result)
                self.results.append(result)
                bar.update()
        return [self._make_row(arm) for arm in self.arms]

    def _make_row(self, arm: Arm) -> Row:
        verdict, first = self.verdict(arm), self.compare.seeds[0]
        swept = {rate: score for (rate, seed), score in self.scores(arm).items() if seed == first}
        seeds = self.compare.seeds  # the folder may hold more, of a run that was asked for more
        at_best = [r for r in self.results if r.arm == arm.name and r.rate == verdict.best and r.seed in seeds]
        return Row(arm.name, verdict, swept, sorted(at_best, key=lambda r: r.seed))


def _share_value(value: Any) -> Any:
    """Return the value of the first process on every one."""
    held = [value]
    broadcast_object_list(held)
    return held[0]
