"""Plan of ranks: a table and a picture of what each layer gets, and the config that makes such an adapter."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from torch import Tensor

from ..saving.drawn_report import DrawnReport, by_kind
from ..saving.record import plain_config


if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass
class LayerRank:
    """
    What a plan gives one layer.

    Args:
        name: inside the base model.
        shape: `(out, in)` of the weight.
        rank: of its adapter; with 0 it gets none.
        parameters: of its factors.
        scaling: PEFT's `scaling`, whatever the rank.
        expressed: the share of the energy of the probe's gradient that a change of this rank can have in common with
            it: `sum S[:rank]^2 / ||G||^2` (Eckart and Young).
        energy: `||G||^2` of the probe's gradient.
        confirmed: directions that the other half of the samples confirms; `None` unless the rule looks.
        growth: by how much its block raises the intrinsic dimension; `None` unless the rule looks.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    scaling: float
    expressed: float
    energy: float
    confirmed: int | None = None
    growth: int | None = None


@dataclass
class RankPlan(DrawnReport):
    """
    Ranks of all layers under a budget.

    Args:
        rule: by which they were shared out.
        budget: what could be spent.
        spent: what is.
        unit: what both count: `"parameters"` or `"bytes"`.
        samples: that the probe saw.
        seconds: wall time.
        layers: one entry a layer, in the model's order, those without an adapter included.
    """

    picture_size = (9, 4.5)

    rule: str
    budget: int
    spent: int
    unit: str
    samples: int
    seconds: float
    layers: list[LayerRank]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer by name, 0 without an adapter."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def missed(self) -> float:
        """
        The least relative error with which an adapter of these ranks can be the probe's gradient, all layers together.

        It is `||G - D||_F / ||G||_F` of the best `D`: the tails of the singular values (arXiv 2310.17513; for one
        matrix Eckart and Young). No training can come closer. Of a sketched gradient it is an estimate.
        """
        energy = sum(layer.energy for layer in self.layers)
        lost = sum(layer.energy * (1 - layer.expressed) for layer in self.layers)
        return math.sqrt(max(lost, 0.0) / energy) if energy else 0.0

    def lora_config(self, config: LoraConfig) -> LoraConfig:
        """
        Return a copy of a `LoraConfig` that makes an adapter of these ranks.

        `target_modules` becomes the list of the layers that get one, by their full names. `r` and `lora_alpha` are
        those of the largest rank; `rank_pattern` and `alpha_pattern` hold the layers that differ. Every layer keeps
        its scaling: `alpha / r`, or with rsLoRA `alpha / sqrt(r)`, stays what it was.

        Args:
            config: of which everything else is taken.
        """
        chosen = [layer for layer in self.layers if layer.rank > 0]
        alpha = lambda layer: _plain(layer.scaling * (math.sqrt(layer.rank) if config.use_rslora else layer.rank))
        largest = max(chosen, key=lambda layer: layer.rank)
        made = copy.deepcopy(plain_config(config))
        made.target_modules = {layer.name for layer in chosen}
        made.exclude_modules = made.layers_to_transform = made.layers_pattern = None
        made.r, made.lora_alpha = largest.rank, alpha(largest)
        # PEFT reads keys as the ends of names, and as patterns: a number sign of the start makes them whole names.
        made.rank_pattern = {f"^{layer.name}": layer.rank for layer in chosen if layer.rank != made.r}
        made.alpha_pattern = {f"^{layer.name}": alpha(layer) for layer in chosen if alpha(layer) != made.lora_alpha}
        return made

    def express(self, changes: Mapping[str, Tensor]) -> dict[str, float]:
        """
        Return how near an adapter of these ranks can come to given changes of the weights.

        Args:
            changes: `(out, in)` by the name of the layer, such as `W_trained - W`.

        Returns:
            By layer the relative error of the best approximation of its rank, `||tail|| / ||change||` of the singular
            values in fp64: 0 where the rank suffices, 1 without an adapter.

        Raises:
            `ValueError`: naming a layer that the plan does not know, or whose shape differs.
        """
        known = {layer.name: layer for layer in self.layers}
        errors = {}
        for name, change in changes.items():
            if name not in known:
                raise ValueError(f"{name} is not a layer of this plan, which knows {', '.join(list(known)[:5])}, ...")
            if tuple(change.shape) != tuple(known[name].shape):
                raise ValueError(f"{name}: the change is {tuple(change.shape)}, the weight {known[name].shape}.")
            squares = torch.linalg.svdvals(change.double()).square()
            total = squares.sum().item()
            errors[name] = math.sqrt(squares[known[name].rank :].sum().item() / total) if total else 0.0
        return errors

    def metrics(self) -> dict[str, float]:
        ranks = [layer.rank for layer in self.layers]
        return {
            "lora_ga/rank_budget": self.budget,
            "lora_ga/rank_spent": self.spent,
            "lora_ga/rank_largest": max(ranks),
            "lora_ga/rank_smallest": min(ranks),
            "lora_ga/layers_left_out": ranks.count(0),
            "lora_ga/gradient_missed": self.missed,
        }

    def summary(self) -> str:
        ranks = [layer.rank for layer in self.layers if layer.rank]
        left_out = f", {len(self.layers) - len(ranks)} left out" if len(ranks) < len(self.layers) else ""
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        return (
            f"ranks by rule {self.rule!r}: {span} in {len(ranks)} layers{left_out}, {self.spent} of {self.budget} "
            f"{self.unit}, from {self.samples} samples in {self.seconds:.1f} s; no adapter of these ranks comes "
            f"nearer to the probe's gradient than a relative error of {self.missed:.3f}"
        )

    def table(self) -> str:
        """Return the ranks as a Markdown table: a row a block, a column a kind of layer."""
        kinds = by_kind(self.layers)
        depth = max(map(len, kinds.values()))
        rows = [["block", *kinds], ["---"] * (len(kinds) + 1)]
        for block in range(depth):
            cells = [str(of_kind[block].rank) if block < len(of_kind) else "" for of_kind in kinds.values()]
            rows.append([str(block), *cells])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _draw(self, axes: Axes) -> None:
        """Draw the rank by block and kind of layer."""
        for number, (kind, layers) in enumerate(by_kind(self.layers).items()):
            depth = range(len(layers))
            axes.plot(depth, [layer.rank for layer in layers], "-o", ms=3, color=f"C{number % 10}", label=kind)
        axes.set(
            xlabel="block, in the model's order",
            ylabel="rank",
            title=f"rule {self.rule!r}: {self.spent} of {self.budget} {self.unit}, {self.samples} samples",
        )
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small", ncols=2)


def _plain(value: float) -> float:
    """Return a whole number as one, so that files look as those of a `LoraConfig` made by hand."""
    return int(value) if float(value).is_integer() else value
