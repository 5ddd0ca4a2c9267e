"""Factors of every layer from the gradient estimate, computed once and shared by all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..adapters.layer import AdaptedLayer
from ..adapters.parameter import AdaptedExperts
from ..adapters.storage import split_A
from ..config import LoRAGAConfig
from ..engines.collectives import share_from_owners
from ..engines.parameters import read_parameter
from ..gradients.estimate import GradientEstimate
from ..gradients.second_look import energy_kept, owners_of
from ..maths.factors import random_rows
from ..maths.inits import INITS, LayerGradient
from .directions import Directions, find_directions
from .report import Action, LayerReport, report_experts


if TYPE_CHECKING:
    from transformers import Trainer

Factors = tuple[Tensor, Tensor]  # B0 (E, out, r), A0 (E, r, in), or those of one expert, fp32


@dataclass
class LayerStart:
    """
    The start of one layer, the same on every process.

    Args:
        layer: the layer.
        factors: `B0 (E, out, r)` and `A0 (E, r, in)`; `None` where the layer keeps the plain start that it has.
        report: what was done.
    """

    layer: AdaptedLayer
    factors: Factors | None
    report: LayerReport


def compute_starts(
    trainer: Trainer,
    config: LoRAGAConfig,
    layers: Sequence[AdaptedLayer],
    estimate: GradientEstimate,
    other_half: GradientEstimate | None = None,
) -> tuple[list[LayerStart], int]:
    """
    Compute the start of every layer. Collective: each process computes its share of them and gives it to the others.

    Args:
        trainer, config, layers: see [`start_adapter`].
        estimate: of the gradients; with `config.supported_only` of one half of the samples.
        other_half: of the other half.

    Returns:
        One start a layer, and the bytes that this process sent.

    Raises:
        `ValueError`: naming a layer whose gradient is beyond fp32.
    """
    rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    owners = owners_of(trainer, layers)
    owned_layers = [layer for layer in layers if owners[layer.name] == rank]
    starter = _Starter(config, estimate, layers, find_directions(config, owned_layers, estimate, other_half))
    if other_half is not None:
        starter.unreached &= set(other_half.unreached)
    mine: dict[str, tuple[Factors | None, LayerReport]] = {}
    for layer in layers:
        # Every process reads the weight of every layer: gathering a sharded one takes all of them.
        weights = layer.dense_weights() if config.scale == "weight_svd" else None
        plain = _plain_rows(layer) if INITS[config.init].turns_rows else None
        if owners[layer.name] == rank:
            mine[layer.name] = starter.start(layer, weights, plain)
    reports = dict(gather_object([(name, report) for name, (_, report) in mine.items()]))
    starts = []
    for layer in layers:
        report = reports[layer.name]
        factors = mine[layer.name][0] if layer.name in mine else _empty_factors(layer)
        starts.append(LayerStart(layer, None if report.action.is_plain else factors, report))
    owned: list[list[Tensor]] = [[] for _ in range(size)]
    for start in starts:
        owned[owners[start.layer.name]] += start.factors or ()
    return starts, share_from_owners(trainer, owned)


def _plain_rows(layer: AdaptedLayer) -> Tensor:  # (E, r, in), fp32
    """Read the `A` that PEFT has drawn. Collective where it is sharded."""
    return split_A(read_parameter(layer.stored_A).float().cpu().flatten(1), layer.experts)


def _empty_factors(layer: AdaptedLayer) -> Factors:
    """Make room for the factors that another process sends."""
    E, (out_features, in_features), r = layer.experts, layer.shape, layer.rank
    return torch.empty(E, out_features, r), torch.empty(E, r, in_features)


class _Starter:
    """
    Starts of the layers that this process owns.

    Args:
        config: how to start.
        estimate: of the gradients.
        layers: every layer, which decide the seeds.
        found: directions of the weights that this process computes.

    Attributes:
        unreached: names of layers that the loss never reached.
    """

    def __init__(
        self,
        config: LoRAGAConfig,
        estimate: GradientEstimate,
        layers: Sequence[AdaptedLayer],
        found: dict[str, Directions],
    ) -> None:
        self.config, self.estimate, self.found = config, estimate, found
        self.init = INITS[config.init]
        # Seeds go by the position of a weight among all, never by hash(), which differs between processes.
        names = [name for layer in layers for name in layer.matrices]
        self.seeds = {name: config.probe_seed * 1_000_003 + number for number, name in enumerate(names)}
        self.unreached = set(estimate.unreached)

    def start(
        self,
        layer: AdaptedLayer,
        weights: Tensor | None,  # (E, out, in), for `scale="weight_svd"`
        plain: Tensor | None,  # (E, r, in), for an init that turns rows
    ) -> tuple[Factors | None, LayerReport]:
        """Return the factors of a layer, or `None` for a plain start, and what to report."""
        of_experts = [[None] * layer.experts if given is None else list(given) for given in (weights, plain)]
        matrices = [self._matrix(layer, *entry) for entry in zip(layer.matrices, *of_experts, strict=True)]
        reports = [report for _, report in matrices]
        report = report_experts(layer.name, reports) if isinstance(layer, AdaptedExperts) else reports[0]
        started = [factors for factors, _ in matrices if factors is not None]
        if not started:
            return None, report
        # Experts that no sample reached start as PEFT does, drawn anew unless the rows are at hand: what is stored may
        # be sharded.
        filled = [
            factors or _plain_start(*started[0], self._generator(name), rows)
            for name, rows, (factors, _) in zip(layer.matrices, of_experts[1], matrices, strict=True)
        ]
        B0, A0 = (torch.stack(side) for side in zip(*filled, strict=True))
        return (B0, A0), report

    def _matrix(
        self, layer: AdaptedLayer, name: str, weight: Tensor | None, plain: Tensor | None
    ) -> tuple[Factors | None, LayerReport]:
        """Return `B0 (out, r)`, `A0 (r, in)` of one weight, or `None` for a plain start, and what to report."""
        found = self.found[name]
        top = found.top
        if not torch.isfinite(top.S).all():
            raise ValueError(
                f"{name}: the largest singular value of its gradient is {top.S[0].item()}, beyond fp32. Divide the "
                "loss by a constant, or look for extreme examples among the first of the data."
            )
        action = self._action(layer, found)
        if action.is_plain:
            return None, self._report(layer, name, action, scale=0.0)
        on_device = None if weight is None else weight.to(top.S.device, torch.float32)
        B0, A0 = self.init.factors(
            LayerGradient(
                top=top,
                r=layer.rank,
                s=layer.s,
                gamma=cast(float, self.config.gamma),  # `LoRAGAConfig` has filled a default in
                direction=self.config.direction,
                scale=self.config.scale,
                generator=self._generator(name),
                weight_singular_values=None if on_device is None else torch.linalg.svdvals(on_device),
                moments=self.estimate.moments.get(layer.name),
                whiteners=found.whiteners,
                plain_rows=plain,
                supported=found.supported,
            )
        )
        if self.init.anchored and not self.config.anchored:
            # A is frozen, so the change `s (B - B0) A0` of an anchored adapter is that of a plain one from B = 0.
            B0 = torch.zeros_like(B0)
        return (B0, A0), self._report(layer, name, action, torch.linalg.vector_norm(A0, dim=1).max().item())

    def _action(self, layer: AdaptedLayer, found: Directions) -> Action:
        if layer.name in self.unreached:
            return Action.UNREACHED
        if not found.top.S[0] > 0:
            return Action.ZERO_GRADIENT
        if found.supported is not None and not found.supported.any():
            return Action.UNSUPPORTED
        if layer.rank > min(layer.shape):
            return Action.PADDED
        return Action.OVERLAPPING if self.init.pairs * layer.rank > min(layer.shape) else Action.INITIALISED

    def _report(self, layer: AdaptedLayer, name: str, action: Action, scale: float) -> LayerReport:
        r, found = layer.rank, self.found[name]
        top, kept = found.top, energy_kept(found.found, r)
        return LayerReport(
            name=name,
            shape=layer.shape,
            rank=r,
            scale=scale,
            singular_values=top.S.tolist(),
            energy_share_r=top.share(r),
            energy_share_2r=top.share(2 * r) if self.init.pairs == 2 else None,
            energy_kept=min(kept),
            energy_kept_r=kept[0],
            energy_kept_next_r=kept[1] if len(kept) == 2 else None,
            sketched=self.estimate.estimators[name].sketched,
            action=action,
            shares_weight=layer.name in self.estimate.shared,
            seen_twice=layer.name in self.estimate.seen_twice,
            directions_supported=None if found.supported is None else int(found.supported.sum()),
        )

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seeds[name])


def _plain_start(
    like_B: Tensor,  # (out, r)
    like_A: Tensor,  # (r, in)
    generator: torch.Generator,
    rows: Tensor | None,  # (r, in)
) -> Factors:
    return torch.zeros_like(like_B), random_rows(like_A.shape[0], like_A, generator) if rows is None else rows
