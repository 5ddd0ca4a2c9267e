"""What reports have in common: figures as JSON, and a picture of them."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .atomic import whole_file


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class DrawnReport(ABC):
    """Base of a dataclass of figures: it can be written as JSON and drawn."""

    picture_size: ClassVar[tuple[float, float]]  # inches

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return the figures that trackers get, under `lora_ga/...`."""

    @abstractmethod
    def summary(self) -> str:
        """Say in one line what happened."""

    @abstractmethod
    def _draw(self, axes: Axes) -> None:
        """Draw the report."""

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as plain values."""
        return asdict(self)  # type: ignore[call-overload]  # every report is a dataclass

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the whole report to `path`, whole or not at all."""
        # JSON has no NaN or infinity: they become null.
        content = json.loads(json.dumps(self.to_dict()), parse_constant=lambda name: None)
        with whole_file(path) as partial:
            partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """
        Draw the report, as a picture at `path`.

        Raises:
            `ImportError`: if matplotlib is not installed.
        """
        self._figure().savefig(path)

    def picture(self) -> np.ndarray:  # (height, width, 3)
        """Return what `plot` draws as bytes of red, green and blue; raises as it does."""
        canvas: Any = self._figure().canvas
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def _figure(self) -> Figure:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"{type(self).__name__}.plot draws with matplotlib: pip install matplotlib.") from error
        figure = Figure(figsize=self.picture_size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        self._draw(figure.subplots())
        return figure
