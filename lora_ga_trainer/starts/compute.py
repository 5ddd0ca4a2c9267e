"""Factors of every layer from the gradient estimate, computed once and shared by all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.collectives import share_from_owners
from ..gradients.estimate import GradientEstimate
from ..gradients.sketch import top_svds
from ..maths.factors import random_rows
from ..maths.inits import INITS, Place
from ..maths.recovery import TopSVD
from .report import INITIALISED, OVERLAPPING, PADDED, PLAIN, UNREACHED, ZERO_GRADIENT, LayerReport, report_experts


if TYPE_CHECKING:
    from transformers import Trainer

Factors = tuple[Tensor, Tensor]  # B0 (E, out, r), A0 (E, r, in), or those of one expert, fp32


def compute_starts(
    trainer: Trainer, config: LoRAGAConfig, layers: list[AdaptedLayer], estimate: GradientEstimate
) -> tuple[list[tuple[Factors | None, LayerReport]], int]:
    """Return what [`_compute_start`] does for every layer, the same on every process, and the bytes this one sent."""
    rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    wanted = {name: min(2 * layer.rank, *layer.shape) for layer in layers[rank::size] for name in layer.matrices}
    tops = top_svds(estimate.estimators, wanted)
    mine, place = {}, 0
    for index, layer in enumerate(layers):
        # Reading a sharded weight takes every process.
        weights = layer.dense_weights() if config.scale == "weight_svd" else None
        if index % size == rank:
            mine[index] = _compute_start(layer, place, estimate, tops, config, weights)
        place += layer.experts
    reports = dict(gather_object([(index, report) for index, (_, report) in mine.items()]))
    factors: list[Factors | None] = []
    owned: list[list[Tensor]] = [[] for _ in range(size)]
    for index, layer in enumerate(layers):
        found = mine[index][0] if index in mine else _empty_factors(layer)
        found = None if reports[index].action in PLAIN else found
        factors.append(found)
        owned[index % size] += found or ()
    sent = share_from_owners(trainer, owned)
    return [(found, reports[index]) for index, found in enumerate(factors)], sent


def _empty_factors(layer: AdaptedLayer) -> Factors:
    E, (out_features, in_features), r = layer.experts, layer.shape, layer.rank
    return torch.empty(E, out_features, r), torch.empty(E, r, in_features)


def _compute_start(
    layer: AdaptedLayer,
    index: int,
    estimate: GradientEstimate,
    tops: dict[str, TopSVD],
    config: LoRAGAConfig,
    weights: Tensor | None,
) -> tuple[Factors | None, LayerReport]:
    """
    Return `B0 (E, out, r)`, `A0 (E, r, in)`, or `None` for a plain start, and what to report.

    `weights (E, out, in)` are for `scale="weight_svd"`.
    """
    of_expert = [None] * layer.experts if weights is None else list(weights)
    starts, reports = zip(
        *(_start_matrix(layer, e, index + e, estimate, tops, config, weight) for e, weight in enumerate(of_expert)),
        strict=True,
    )
    report = reports[0] if layer.has_inputs else report_experts(layer.name, reports)
    if all(start is None for start in starts):
        return None, report
    done = next(start for start in starts if start is not None)
    starts = [start or _plain_start(*done, _generator(index + e, config)) for e, start in enumerate(starts)]
    B0, A0 = (torch.stack(side) for side in zip(*starts, strict=True))
    return (B0, A0), report


def _plain_start(
    like_B: Tensor,  # (out, r)
    like_A: Tensor,  # (r, in)
    generator: torch.Generator,
) -> Factors:
    """Start an expert without a gradient as PEFT does, drawn anew: what is stored may be sharded."""
    return torch.zeros_like(like_B), random_rows(like_A.shape[0], like_A, generator)


def _generator(index: int, config: LoRAGAConfig) -> torch.Generator:
    """Seed by the place of the weight, never by hash(), which differs between processes."""
    return torch.Generator().manual_seed(config.probe_seed * 1_000_003 + index)


def _start_matrix(
    layer: AdaptedLayer,
    expert: int,
    index: int,
    estimate: GradientEstimate,
    tops: dict[str, TopSVD],
    config: LoRAGAConfig,
    weight: Tensor | None,
) -> tuple[Factors | None, LayerReport]:
    """Return `B0 (out, r)`, `A0 (r, in)` of one weight, or `None` for a plain start, and what to report."""
    r, (out_features, in_features) = layer.rank, layer.shape
    m = min(out_features, in_features)
    name = layer.matrices[expert]
    top = tops[name]
    report = LayerReport(
        name=name,
        shape=layer.shape,
        rank=r,
        scale=0.0,
        singular_values=top.S.tolist(),
        energy_share_r=top.share(r),
        energy_share_2r=top.share(2 * r),
        energy_kept=top.kept,
        sketched=estimate.estimators[name].sketched,
        action=INITIALISED,
    )
    if not torch.isfinite(top.S).all():
        raise ValueError(
            f"{name}: the largest singular value of its gradient is {top.S[0].item()}, beyond fp32. Divide the loss "
            "by a constant, or look for extreme examples among the first of the data."
        )
    if layer.name in estimate.unreached or not top.S[0] > 0:
        report.action = UNREACHED if layer.name in estimate.unreached else ZERO_GRADIENT
        return None, report
    if r > m:
        report.action = PADDED
    elif INITS[config.init].pairs * r > m:
        report.action = OVERLAPPING
    values = None if weight is None else torch.linalg.svdvals(weight.to(top.S.device, torch.float32))
    place = Place(r, layer.s, _generator(index, config), values)
    factors = INITS[config.init].factors(top, place, config)
    report.scale = torch.linalg.vector_norm(factors[1], dim=1).max().item()
    return factors, report
