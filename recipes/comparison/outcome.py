"""Outcome of a comparison: one row an arm, a table, curves."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from comparison.run import Result
from comparison.sweep import Verdict


@dataclass
class Row:
    """
    One arm at its best rate.

    Args:
        arm: its name.
        verdict: of its sweep.
        swept: scores of the first seed, by rate.
        results: at the best rate, one a seed; empty where no run gave a finite score.
    """

    arm: str
    verdict: Verdict
    swept: dict[float, float]
    results: list[Result]

    def at(self, share: float, name: str) -> list[float]:
        """Return a metric after this share of the evaluations, one value a seed."""
        return [result.evals[round(share * len(result.evals)) - 1][name] for result in self.results]

    def steps_to(self, loss: float) -> list[float | None]:
        """Return after how many steps each seed had this eval loss, linear between evaluations; `None` for never."""
        return [_find_step_at(result.evals, loss) for result in self.results]


def _find_step_at(evals: Sequence[dict[str, float]], loss: float) -> float | None:
    before: dict[str, float] | None = None
    for point in evals:
        if point["eval_loss"] <= loss:
            if before is None:
                return point["step"]
            share = (before["eval_loss"] - loss) / (before["eval_loss"] - point["eval_loss"])
            return before["step"] + share * (point["step"] - before["step"])
        before = point
    return None


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Write a mean and, of several values, the least and the greatest."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def to_table(rows: Sequence[Row], metric: str, reference: float | None) -> str:
    """
    Write the rows as a Markdown table.

    Args:
        rows: one an arm.
        metric: shown beside the eval loss; the metric that decides, or the first that is not a loss.
        reference: the final eval loss of tuned LoRA; `None` where `lora` is not among the arms.
    """
    heads = ["arm", "best rate", metric, "eval loss at 1/4", "at 1/2", "at the end"]
    heads += ["steps to tuned LoRA's end", "s a step", "s to start", "peak GiB", "trained", "stored"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        if not row.results:
            lines.append(f"| {row.arm} | none" + " | -" * (len(heads) - 2) + " |")
            continue
        ours = row.results
        cells = [
            row.arm,
            f"{row.verdict.best:g}" + ("" if row.verdict.winner else " (no winner)"),
            mean_and_spread(row.at(1, metric), 3),
            *(mean_and_spread(row.at(share, "eval_loss"), 3) for share in (0.25, 0.5, 1)),
            _show_steps(row.steps_to(reference)) if reference is not None else "-",
            _show_median([result.step_seconds for result in ours], 3),
            _show_median([result.start_seconds for result in ours], 1),
            _show_median([result.peak_bytes and result.peak_bytes / 2**30 for result in ours], 2),
            f"{ours[0].trained:,}",
            f"{ours[0].stored:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"{row.arm}: no winner, {row.verdict.reason}." for row in rows if row.verdict.reason]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _show_steps(reached: Sequence[float | None]) -> str:
    there = [steps for steps in reached if steps is not None]
    if len(there) == len(reached):
        return mean_and_spread(there, 0)
    return f"{len(there)} of {len(reached)} seeds get there" if there else "never"


def _show_median(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.{digits}f}" if known else "-"


def reference_loss(rows: Sequence[Row]) -> float | None:
    """Return the mean final eval loss of the arm `lora` at its best rate."""
    row = next((row for row in rows if row.arm == "lora" and row.results), None)
    return None if row is None else statistics.fmean(row.at(1, "eval_loss"))


def shown_metric(rows: Sequence[Row], deciding: str) -> str:
    """Return the deciding metric, or where it is the loss an accuracy or other metric beside it, if there is one."""
    if deciding != "eval_loss":
        return deciding
    names = [name for row in rows for result in row.results[:1] for name in result.evals[-1]]
    return next((name for name in names if name.startswith("eval_") and name != "eval_loss"), "eval_loss")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw eval loss against steps at each arm's best rate, and the score of the first seed against the rate."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    curves, sweeps = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "marker": "o", "markersize": 3}
        if row.results:
            steps = [point["step"] for point in row.results[0].evals]
            columns = zip(*([point["eval_loss"] for point in result.evals] for result in row.results), strict=True)
            curves.plot(steps, [statistics.fmean(column) for column in columns], label=row.arm, **style)
        finite = {rate: score for rate, score in sorted(row.swept.items()) if math.isfinite(score)}
        sweeps.plot(list(finite), list(finite.values()), label=row.arm, **style)
    curves.set(xlabel="step", ylabel="eval loss, mean over seeds", title="at each arm's best rate")
    sweeps.set(xlabel="learning rate", ylabel="score of the first seed, less is better", xscale="log", title="sweeps")
    curves.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=120)


def to_json(rows: Sequence[Row], metric: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was found as plain values; what is not finite becomes a word."""
    return {
        "settings": settings,
        "metric": metric,
        "arms": [
            {
                "arm": row.arm,
                "best_rate": row.verdict.best,
                "winner": row.verdict.winner is not None,
                "reason": row.verdict.reason,
                "swept": {f"{rate:g}": _make_json_value(score) for rate, score in row.swept.items()},
                "runs": [
                    {**r.to_dict(), "evals": [_make_json_values(point) for point in r.evals]} for r in row.results
                ],
            }
            for row in rows
        ],
    }


def _make_json_values(point: dict[str, float]) -> dict[str, float | str]:
    return {name: _make_json_value(value) for name, value in point.items()}


def _make_json_value(score: float) -> float | str:
    return score if math.isfinite(score) else repr(score)
