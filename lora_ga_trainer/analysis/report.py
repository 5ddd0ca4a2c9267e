"""Report of an adapter: what training did to each weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..saving.drawn_report import DrawnReport, by_kind


if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class Intruder:
    """
    A direction that a weight did not have before.

    Args:
        index: of the singular vector of `W + s B A`, 0 for the strongest.
        singular_value: its strength.
        similarity: `max_i |u . u0_i|` over the left singular vectors of `W`, below the report's `eps`.
    """

    index: int
    singular_value: float
    similarity: float


@dataclass
class LayerChange:
    """
    What became of one weight `W`.

    Args:
        name: of the layer inside the base model.
        shape: `(out, in)`.
        rank: of the stored factors: 2r of an anchored adapter.
        singular_values: of the change `s B A`, descending; exact but for rounding in fp64.
        norm: `||s B A||`, Frobenius.
        stable_rank: `sum S^2 / max S^2`.
        effective_rank: `exp` of the entropy of `S / sum S` (Roy and Vetterli, 2007).
        start_share_out: share of the change's energy whose outputs lie in the directions that the start came from; a
            random change has `directions / out`. `None` where nothing is known of the start.
        start_share_in: likewise of inputs.
        start_directions: how many these are, of outputs and of inputs.
        relative_norm: `||s B A|| / ||W||`. `None`, as all that follows, where the base was not read.
        base_share_out: share of the change's energy whose outputs lie in the top k left singular vectors of `W`.
        base_share_in: likewise of inputs and right ones.
        top_values: the top k singular values of `W + s B A`.
        intruders: those among these directions.
        least_similarity: the smallest `max_i |u_j . u0_i|` of the top k directions.
        screened: whether the layer was cleared without decomposing its weight; its similarities are then over the
            strongest directions of `W`, and may be higher over all of them.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    singular_values: list[float]
    norm: float
    stable_rank: float
    effective_rank: float
    start_share_out: float | None = None
    start_share_in: float | None = None
    start_directions: tuple[int, int] | None = None
    relative_norm: float | None = None
    base_share_out: float | None = None
    base_share_in: float | None = None
    top_values: list[float] | None = None
    intruders: list[Intruder] | None = None
    least_similarity: float | None = None
    screened: bool | None = None

    @property
    def intruder_share(self) -> float:
        """Share of the energy of the top k directions of `W + s B A` that intruders hold."""
        whole = sum(value**2 for value in self.top_values or [])
        return sum(found.singular_value**2 for found in self.intruders or []) / whole if whole > 0 else 0.0


@dataclass
class AdapterReport(DrawnReport):
    """
    What training did to each adapted weight.

    Args:
        folder: of the adapter.
        k: top directions of `W + s B A` that were looked at for intruders; 0 where the base was not read.
        eps: below which similarity to all directions of `W` one is an intruder.
        directions: what the shares of the start are about: `"the probe's gradient"`, `"the start"`, or `None`.
        seconds: wall time.
        layers: one entry a layer, by name.
    """

    picture_size = (9, 4.5)

    folder: str
    k: int
    eps: float
    directions: str | None
    seconds: float
    layers: list[LayerChange]

    @property
    def intruders(self) -> int:
        """How many intruders there are in all layers."""
        return sum(len(layer.intruders or []) for layer in self.layers)

    def metrics(self) -> dict[str, float]:
        """Return what trackers get: means over layers, under `lora_ga/adapter_...`."""
        figures: dict[str, float | None] = {
            "norm": math.sqrt(sum(layer.norm**2 for layer in self.layers)),
            "stable_rank": _mean([layer.stable_rank for layer in self.layers]),
            "effective_rank": _mean([layer.effective_rank for layer in self.layers]),
            "seconds": self.seconds,
        }
        for name in ("relative_norm", "start_share_out", "start_share_in", "base_share_out", "base_share_in"):
            figures[name] = _mean([getattr(layer, name) for layer in self.layers])
        if self.k:
            figures["intruders"] = self.intruders
            figures["layers_with_intruders"] = sum(bool(layer.intruders) for layer in self.layers)
            figures["intruder_share"] = _mean([layer.intruder_share for layer in self.layers])
            figures["least_similarity"] = min(layer.least_similarity or 0.0 for layer in self.layers)
        return {f"lora_ga/adapter_{name}": value for name, value in figures.items() if value is not None}

    def summary(self) -> str:
        m = {name.removeprefix("lora_ga/adapter_"): value for name, value in self.metrics().items()}
        parts = [f"{len(self.layers)} layers changed, effective rank {m['effective_rank']:.1f}"]
        parts[0] += f" and stable rank {m['stable_rank']:.1f} on average"
        if "relative_norm" in m:
            parts.append(f"||sBA|| is {m['relative_norm']:.2%} of ||W||")
        if self.directions is not None and "start_share_out" in m:
            parts.append(
                f"{m['start_share_out']:.0%} (outputs) and {m['start_share_in']:.0%} (inputs) of the change lie in "
                f"the directions of {self.directions}"
            )
        if self.k:
            parts.append(
                f"{self.intruders} intruders in {m['layers_with_intruders']} of these layers, among the top {self.k} "
                f"directions of each (eps {self.eps:g})"
            )
        return "; ".join(parts)

    def table(self) -> str:
        """Return one line a layer. A column of which nothing is known is left out."""
        columns = {
            "layer": [layer.name for layer in self.layers],
            "rank": [str(layer.rank) for layer in self.layers],
            "sBA/W": [_percent(layer.relative_norm, 2) for layer in self.layers],
            "stable": [f"{layer.stable_rank:.2f}" for layer in self.layers],
            "effective": [f"{layer.effective_rank:.2f}" for layer in self.layers],
            "start out, in": [_pair(layer.start_share_out, layer.start_share_in) for layer in self.layers],
            "base out, in": [_pair(layer.base_share_out, layer.base_share_in) for layer in self.layers],
            "intruders": ["" if layer.intruders is None else str(len(layer.intruders)) for layer in self.layers],
            "their share": [
                "" if layer.intruders is None else _percent(layer.intruder_share, 1) for layer in self.layers
            ],
        }
        shown = {name: cells for name, cells in columns.items() if any(cells)}
        widths = {name: max(map(len, (name, *cells))) for name, cells in shown.items()}
        line = lambda cells: "  ".join(
            cell.ljust(width) if name == "layer" else cell.rjust(width)
            for (name, width), cell in zip(widths.items(), cells, strict=True)
        ).rstrip()
        return "\n".join([line(shown), *(line(row) for row in zip(*shown.values(), strict=True))])

    def _draw(self, axes: Axes) -> None:
        """Draw the effective rank of the change by layer and module kind, and the number of intruders beside it."""
        for i, (kind, layers) in enumerate(by_kind(self.layers).items()):
            depth, colour = range(len(layers)), f"C{i % 10}"
            ranks = [layer.effective_rank for layer in layers]
            axes.plot(depth, ranks, "-o", ms=3, color=colour, label=kind)
            for at, rank, layer in zip(depth, ranks, layers, strict=True):
                if layer.intruders:
                    axes.plot([at], [rank], "o", ms=9, mfc="none", color=colour)
                    axes.annotate(str(len(layer.intruders)), (at, rank), xytext=(5, 5), textcoords="offset points")
        circles = f"; circles: intruders in the top {self.k}" if self.k else ""
        axes.set(
            xlabel="layer",
            ylabel="effective rank of the change",
            title=f"What training changed{circles}",
        )
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small", ncols=2)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _pair(left: float | None, right: float | None) -> str:
    return "" if left is None or right is None else f"{left:.0%}, {right:.0%}"
