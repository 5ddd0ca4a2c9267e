"""Report of a start: one line for the log, numbers for trackers, JSON and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..saving.drawn_report import DrawnReport, by_kind


if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Action(str, Enum):
    """What a start did to a layer; the value is the sentence in reports and JSON."""

    INITIALISED = "initialised"
    OVERLAPPING = "initialised, halves overlap: 2r > min(out, in)"
    PADDED = "initialised, padded with a plain start: r > min(out, in)"
    ZERO_GRADIENT = "plain start: zero gradient"
    UNREACHED = "plain start: never reached by the loss"
    UNSUPPORTED = "plain start: the other half of the samples supports no direction"
    FROZEN = "plain start: frozen when training began"

    @property
    def is_plain(self) -> bool:
        """Whether the layer was left at PEFT's own start."""
        return self in (Action.ZERO_GRADIENT, Action.UNREACHED, Action.UNSUPPORTED, Action.FROZEN)

    def __str__(self) -> str:
        return self.value


@dataclass
class LayerReport:
    """
    One adapted layer, or all experts of a fused one.

    For experts `singular_values` are root mean squares and the energy shares those of all gradients together, over the
    experts that were started; what `energy_kept` begins with is the smallest of theirs, `scale` the largest.

    Args:
        name: inside the base model.
        shape: `(out, in)` of the weight.
        rank: r of the factors that learn.
        scale: length c of the rows of `A0` and columns of `B0`; where they differ, that of the longest row of `A0`.
        singular_values: of the gradient of the weight, descending; as many as the init uses, at most
            `min(2r, out, in)`. None of a layer that was frozen. These and the shares are of the whitened gradient
            where the config whitens, and of one half of the samples with `supported_only`.
        energy_share_r: share of `||G||^2` that the top r directions hold.
        energy_share_2r: share of `||G||^2` that the top 2r directions hold; `None` for an init that uses r only.
        energy_kept: the smaller one of `energy_kept_r` and `energy_kept_next_r`.
        sketched: whether the estimator was a sketch.
        action: what was done.
        experts: weights of this shape that share the layer; 1 in a linear layer.
        experts_plain: of these, those left at a plain LoRA start because their gradient is zero: the samples never
            reached them.
        shares_weight: whether the weight has other uses in the model (it is tied to another module, or handed to a
            function). The adapter and the start are about the use by this layer alone.
        energy_kept_r: what the estimated directions 1 to r hold of the energy that the best r hold, on the worse side
            of the weight, as the estimator itself judges it; 1 for an exact one.
        energy_kept_next_r: the same of the further directions that the start uses, r + 1 to 2r, with whitening up to
            twice as many as without; `None` where it uses r only. Of a sketch both are figures of the gradient before
            it is whitened.
        seen_twice: whether the layer had kept less than `min_energy_kept` and was seen in a second pass. What the
            report says of it is what it keeps since.
        directions_supported: how many of the `directions_asked` strongest directions of one half of the samples the
            other half has, by two standard errors; of experts the sum. `None` where it was not asked.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scale: float
    singular_values: list[float]
    energy_share_r: float
    energy_share_2r: float | None
    energy_kept: float
    sketched: bool
    action: Action
    experts: int = 1
    experts_plain: int = 0
    shares_weight: bool = False
    energy_kept_r: float = 1.0
    energy_kept_next_r: float | None = None
    seen_twice: bool = False
    directions_supported: int | None = None

    @property
    def directions_asked(self) -> int:
        """How many directions the layer has room for, of all experts together."""
        return self.experts * min(self.rank, *self.shape)

    @property
    def energy_share(self) -> float:
        """Share of `||G||^2` that the directions in use hold: the top 2r, or r for an init that uses no more."""
        return self.energy_share_r if self.energy_share_2r is None else self.energy_share_2r


def report_experts(name: str, reports: Sequence[LayerReport]) -> LayerReport:
    """Sum up the reports of the experts of one layer."""
    started = [report for report in reports if not report.action.is_plain]
    plain = len(reports) - len(started)
    counts = [report.directions_supported for report in reports if report.directions_supported is not None]
    supported = sum(counts) if counts else None
    if not started:
        return replace(
            reports[0], name=name, experts=len(reports), experts_plain=plain, directions_supported=supported
        )
    energies = [[value**2 for value in report.singular_values] for report in started]
    # share = held / total, so each expert's total is what its top directions hold over their share.
    totals = [sum(energy) / report.energy_share for energy, report in zip(energies, started, strict=True)]
    rank = started[0].rank
    return replace(
        started[0],
        name=name,
        scale=max(report.scale for report in started),
        singular_values=[math.sqrt(sum(column) / len(started)) for column in zip(*energies, strict=True)],
        energy_share_r=sum(sum(energy[:rank]) for energy in energies) / sum(totals),
        energy_share_2r=None if started[0].energy_share_2r is None else sum(map(sum, energies)) / sum(totals),
        energy_kept=min(report.energy_kept for report in started),
        energy_kept_r=min(report.energy_kept_r for report in started),
        energy_kept_next_r=min(
            (report.energy_kept_next_r for report in started if report.energy_kept_next_r is not None), default=None
        ),
        experts=len(reports),
        experts_plain=plain,
        directions_supported=supported,
    )


@dataclass
class GradientReport(DrawnReport):
    """
    The initialisation of one adapter.

    Args:
        init: its name, such as `"lora_ga"`.
        samples, items, tokens: used by the probe, over all processes; items are what the loss is a mean over.
        seconds: wall time of the probe, the factors and the write.
        probe_seconds: of these, the probe's.
        probe_bytes: probe state on this process.
        bytes_sent: handed to all-reduces by this process.
        loss_before, loss_after: on this process's first probe batch, dropout off, before and after the write. `None`
            where the probe was read from a file.
        layers: one report a layer that the probe looked at, in the model's order, then one a layer of the adapter that
            was frozen when training began and has no start for that reason.
        whitening: exponent of the config; what the layers say of the gradient is then said of the whitened one.
    """

    picture_size = (9, 4.5)

    init: str
    samples: int
    items: float
    tokens: int
    seconds: float
    probe_seconds: float
    probe_bytes: int
    bytes_sent: int
    loss_before: float | None
    loss_after: float | None
    layers: list[LayerReport]
    whitening: float = 0.0

    def metrics(self) -> dict[str, float]:
        started = [layer for layer in self.layers if not layer.action.is_plain]
        shares_2r = [layer.energy_share_2r for layer in started if layer.energy_share_2r is not None]
        figures: dict[str, Any] = {
            "samples": self.samples,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "probe_bytes": self.probe_bytes,
            "bytes_sent": self.bytes_sent,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "layers_initialised": len(started),
            "layers_plain": len(self.layers) - len(started),
            "energy_share_r": _mean([layer.energy_share_r for layer in started]),
            "energy_share_2r": _mean(shares_2r),
            "energy_kept_min": min((layer.energy_kept for layer in started), default=None),
            "layers_seen_twice": sum(layer.seen_twice for layer in self.layers),
        }
        fused = [layer for layer in self.layers if layer.experts > 1 and layer.action is not Action.FROZEN]
        if fused:
            figures["experts_plain"] = sum(layer.experts_plain for layer in fused)
            figures["experts_initialised"] = sum(layer.experts for layer in fused) - figures["experts_plain"]
        asked = [layer for layer in self.layers if layer.directions_supported is not None]
        if asked:
            figures["directions_supported"] = sum(layer.directions_supported or 0 for layer in asked)
            figures["directions_asked"] = sum(layer.directions_asked for layer in asked)
        return {f"lora_ga/{name}": value for name, value in figures.items() if value is not None}

    def summary(self) -> str:
        m = self.metrics()
        plain = f", {m['lora_ga/layers_plain']} left plain" if m["lora_ga/layers_plain"] else ""
        if m.get("lora_ga/experts_plain"):
            every = m["lora_ga/experts_plain"] + m["lora_ga/experts_initialised"]
            plain += f", {m['lora_ga/experts_plain']} of {every} expert weights left plain (zero gradient)"
        share = ""
        if "lora_ga/energy_share_r" in m:
            top_2r = f", the top 2r {m['lora_ga/energy_share_2r']:.0%}" if "lora_ga/energy_share_2r" in m else ""
            of = f"whitened (w = {self.whitening:g}) gradient's" if self.whitening else "gradient's"
            share = (
                f"; the top r directions hold {m['lora_ga/energy_share_r']:.0%} of the {of} energy{top_2r} (at "
                f"least {m['lora_ga/energy_kept_min']:.1%} of that found)"
            )
        if "lora_ga/directions_asked" in m:
            found, asked = m["lora_ga/directions_supported"], m["lora_ga/directions_asked"]
            share += f"; {self.samples} samples support {found} of {asked} directions"
        twice = f", {m['lora_ga/layers_seen_twice']} of them seen twice" if m["lora_ga/layers_seen_twice"] else ""
        loss = "" if self.loss_before is None else f"; loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
        return (
            f"{self.init}: {m['lora_ga/layers_initialised']} layers initialised{plain}{twice} from "
            f"{self.samples} samples ({self.tokens} tokens) in {self.seconds:.1f} s "
            f"with {self.probe_bytes / 2**20:.1f} MiB{share}{loss}"
        )

    def _draw(self, axes: Axes) -> None:
        """Draw the energy share of the top r and 2r directions by layer and module kind; rings: seen twice."""
        seen = [layer for layer in self.layers if layer.action is not Action.FROZEN]
        used_2r = any(layer.energy_share_2r is not None for layer in seen)
        lines = "top 2r directions (solid), top r (dotted)" if used_2r else "top r directions"
        for i, (kind, layers) in enumerate(by_kind(seen).items()):
            depth, colour = range(len(layers)), f"C{i % 10}"
            axes.plot(depth, [layer.energy_share for layer in layers], "-o", ms=3, color=colour, label=kind)
            twice = [(place, layer.energy_share) for place, layer in enumerate(layers) if layer.seen_twice]
            axes.plot(*zip(*twice or [(0, math.nan)], strict=True), "o", ms=7, mfc="none", color=colour)
            if used_2r:
                axes.plot(depth, [layer.energy_share_r for layer in layers], ":", color=colour)
        axes.set(
            xlabel="layer, in the model's order",
            ylabel="share of the gradient's energy",
            ylim=(0, 1.02),
            title=f"{self.init}: {lines}, {self.samples} samples",
        )
        axes.legend(fontsize="small", ncols=2)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
