"""What reports have in common: figures as JSON, and a picture of them."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from .atomic import whole_file


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Named(Protocol):
    """A part of a report that is about one layer."""

    name: str


Layer = TypeVar("Layer", bound=Named)


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


def by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """
    Group the layers whose names differ in their numbers only, under what tells the groups apart.

    The last word of a name is not enough: BERT calls four kinds of its layers `dense`.
    """
    words = [[word for word in layer.name.split(".") if not word.isdigit()] for layer in layers]
    columns = zip(*(name[:-1] for name in words), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    kinds: dict[str, list[Layer]] = {}
    for name, layer in zip(words, layers, strict=True):
        kinds.setdefault(".".join(name[shared:]), []).append(layer)
    return kinds
