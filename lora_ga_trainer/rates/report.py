"""Report of a search for a learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..saving.drawn_report import DrawnReport
from .apply import RATE_METRIC


if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class RateReport(DrawnReport):
    """
    What a search for a learning rate found.

    Args:
        learning_rate: the choice: the largest rate after warm-up, of the group whose rate is
            `TrainingArguments.learning_rate`.
        best_rate: at which one step along the optimizer's first updates lowers the loss most.
        largest_rate: at which such a step leaves the loss as it was.
        curvature: the critical sharpness along that step, `2 / largest_rate` (arXiv 2601.16979).
        rates, losses: what was tried, and the loss there; infinite where it was not finite.
        loss_before: at the start.
        updates: first updates that were taken.
        samples: that the loss and the gradients were computed on, over all processes.
        forward_passes: over the samples of one training step, those of the updates included.
        backward_passes: likewise.
        seconds: wall time.
    """

    picture_size = (7, 4.5)

    learning_rate: float
    best_rate: float
    largest_rate: float
    curvature: float
    rates: list[float]
    losses: list[float]
    loss_before: float
    updates: int
    samples: int
    forward_passes: float
    backward_passes: float
    seconds: float

    def metrics(self) -> dict[str, float]:
        return {
            RATE_METRIC: self.learning_rate,
            "lora_ga/best_rate": self.best_rate,
            "lora_ga/largest_rate": self.largest_rate,
            "lora_ga/curvature": self.curvature,
            "lora_ga/rate_forward_passes": self.forward_passes,
            "lora_ga/rate_seconds": self.seconds,
        }

    def summary(self) -> str:
        return (
            f"learning rate {self.learning_rate:.2e}: of one step along the first {self.updates} updates the loss "
            f"{self.loss_before:.4f} falls furthest at {self.best_rate:.2e}, to {min(self.losses):.4f}, and comes "
            f"back at {self.largest_rate:.2e} ({self.forward_passes:.0f} forward passes of a training step, "
            f"{self.seconds:.1f} s)"
        )

    def _draw(self, axes: Axes) -> None:
        drawn = [(rate, loss) for rate, loss in zip(self.rates, self.losses, strict=True) if math.isfinite(loss)]
        axes.semilogx(*zip(*drawn, strict=True), "-o", ms=4)
        axes.axhline(self.loss_before, color="grey", lw=1)
        lowest = min(self.losses)
        # What is far above the start tells nothing more, and would hide the dip.
        axes.set_ylim(lowest - 0.1 * (self.loss_before - lowest), 2 * self.loss_before - lowest)
        axes.axvline(self.learning_rate, color="C1", label=f"chosen: {self.learning_rate:.2e}")
        axes.axvline(self.largest_rate, color="C2", ls=":", label=f"largest: {self.largest_rate:.2e}")
        axes.set(xlabel="learning rate", ylabel="loss after one step along the first updates")
        axes.legend()
