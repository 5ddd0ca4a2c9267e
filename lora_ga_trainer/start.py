"""From a gradient estimate to written factors: what a start consists of."""

from __future__ import annotations

import logging
import math
import time
import warnings
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from .anchor import factor_rank, is_anchored
from .borrow import borrowed
from .collectives import mean_over_processes, share_from_owners
from .config import LoRAGAConfig
from .engines import probed_module, write_parameters
from .factors import lora_ga_factors, lora_one_factors
from .layers import AdaptedLayer, require_peft_model
from .probe import GradientEstimate, estimate_gradients
from .probe_file import load_estimate, save_estimate
from .recovery import TopSVD
from .report import (
    INITIALISED,
    OVERLAPPING,
    PADDED,
    PLAIN,
    UNREACHED,
    ZERO_GRADIENT,
    GradientReport,
    LayerReport,
)
from .samples import count_items, mean_loss


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

logger = logging.getLogger(__name__)

Factors = tuple[Tensor, Tensor]  # B0 (out, r), A0 (r, in), fp32


def start_adapter(
    trainer: Trainer,
    config: LoRAGAConfig,
    layers: list[AdaptedLayer],
    probe_dataset: Dataset | None = None,
) -> GradientReport:
    """
    Estimate the gradients, compute the start of every layer and write it.

    All factors are computed before the first is written, so an error leaves the adapter as it was. Each process
    computes those of its share of the layers and gives them to the others, so that all write the same bits.

    Args:
        trainer: a trainer inside `on_train_begin`.
        config: how to start.
        layers: the adapted layers, anchored already for `init="lora_ga"`.
        probe_dataset: see [`estimate_gradients`].
    """
    begin = time.perf_counter()
    estimate = _estimate(trainer, config, layers, probe_dataset)
    starts, sent = _compute_starts(trainer, config, layers, estimate)
    for layer, (factors, _) in zip(layers, starts, strict=True):
        if factors is not None:
            write_parameters(trainer, start_values(layer, *factors))
    loss_after = _loss_after(trainer, estimate)
    return GradientReport(
        init=config.init,
        samples=estimate.samples,
        items=estimate.items,
        tokens=estimate.tokens,
        seconds=time.perf_counter() - begin,
        probe_seconds=estimate.seconds,
        probe_bytes=estimate.nbytes,
        bytes_sent=estimate.bytes_sent + sent,
        loss_before=None if loss_after is None else estimate.first_loss,
        loss_after=loss_after,
        layers=[report for _, report in starts],
    )


def _estimate(
    trainer: Trainer, config: LoRAGAConfig, layers: list[AdaptedLayer], probe_dataset: Dataset | None
) -> GradientEstimate:
    if config.probe_file is None:
        return estimate_gradients(trainer, config, layers, probe_dataset)
    dataset = trainer.train_dataset if probe_dataset is None else probe_dataset
    model = require_peft_model(trainer.accelerator.unwrap_model(trainer.model))
    estimate = load_estimate(config, model, layers, dataset)
    if estimate is None:
        estimate = estimate_gradients(trainer, config, layers, probe_dataset)
        if trainer.is_world_process_zero():
            save_estimate(estimate, config, model, layers, dataset)
    return estimate


def _compute_starts(
    trainer: Trainer, config: LoRAGAConfig, layers: list[AdaptedLayer], estimate: GradientEstimate
) -> tuple[list[tuple[Factors | None, LayerReport]], int]:
    """Return what [`_compute_start`] does for every layer, the same on every process, and the bytes this one sent."""
    rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = []
    for index, layer in enumerate(layers):
        # Reading a sharded weight takes every process.
        weight = layer.dense_weight() if config.scale == "weight_svd" else None
        if index % size == rank:
            mine.append((index, _compute_start(layer, index, estimate, config, weight)))
    reports = dict(gather_object([(index, report) for index, (_, report) in mine]))
    computed = dict(mine)
    factors: list[Factors | None] = []
    owned: list[list[Tensor]] = [[] for _ in range(size)]
    for index, layer in enumerate(layers):
        found = computed[index][0] if index in computed else _empty_factors(layer)
        found = None if reports[index].action in PLAIN else found
        factors.append(found)
        owned[index % size] += found or ()
    sent = share_from_owners(trainer, owned)
    return [(found, reports[index]) for index, found in enumerate(factors)], sent


def _empty_factors(layer: AdaptedLayer) -> Factors:
    (out_features, in_features), r = layer.shape, factor_rank(layer)
    return torch.empty(out_features, r), torch.empty(r, in_features)


def _compute_start(
    layer: AdaptedLayer, index: int, estimate: GradientEstimate, config: LoRAGAConfig, weight: Tensor | None
) -> tuple[Factors | None, LayerReport]:
    """Return `(B0, A0)`, or `None` for a plain start, and what to report; `weight (out, in)` is for `weight_svd`."""
    r, (out_features, in_features) = factor_rank(layer), layer.shape
    m = min(out_features, in_features)
    estimator = estimate.estimators[layer.name]
    top = estimator.svd(min(2 * r, m))
    report = LayerReport(
        name=layer.name,
        shape=layer.shape,
        rank=r,
        scale=0.0,
        singular_values=top.S.tolist(),
        energy_share_r=top.share(r),
        energy_share_2r=top.share(2 * r),
        energy_kept=top.kept,
        sketched=estimator.sketched,
        action=INITIALISED,
    )
    if layer.name in estimate.unreached or not top.S[0] > 0:
        report.action = UNREACHED if layer.name in estimate.unreached else ZERO_GRADIENT
        return None, report
    if r > m:
        report.action = PADDED
    elif 2 * r > m and config.init == "lora_ga":
        report.action = OVERLAPPING
    factors = _factors(layer, r, top, index, config, weight)
    report.scale = torch.linalg.vector_norm(factors[1], dim=1).max().item()
    return factors, report


def _factors(
    layer: AdaptedLayer, r: int, top: TopSVD, index: int, config: LoRAGAConfig, weight: Tensor | None
) -> Factors:
    # Seeded by the layer's place, never by hash(), which differs between processes.
    generator = torch.Generator().manual_seed(config.probe_seed * 1_000_003 + index)
    if config.init == "lora_one":
        return lora_one_factors(top.U, top.S, top.Vt, r, gamma=config.gamma, generator=generator)
    weight_values = None if weight is None else torch.linalg.svdvals(weight.to(top.S.device, torch.float32))
    return lora_ga_factors(
        top.U,
        top.S,
        top.Vt,
        r,
        gamma=config.gamma,
        direction=config.direction,
        scale=config.scale,
        s=layer.s,
        weight_singular_values=weight_values,
        generator=generator,
    )


@torch.no_grad()
def start_values(
    layer: AdaptedLayer,
    B0: Tensor,  # (out, r)
    A0: Tensor,  # (r, in)
) -> list[tuple[nn.Parameter, Tensor]]:
    """
    Return what to write into which parameters: `[A0; 0]`, `[0, B0]` in an anchored layer, `A0`, `B0` in a plain one.

    A plain start moves the weight, so DoRA's magnitude becomes `||W + s B0 A0||` of each row.
    """
    device = layer.lora_A.weight.device
    B0, A0 = B0.to(device), A0.to(device)
    if is_anchored(layer):
        A = torch.cat([A0, torch.zeros_like(A0)])
        B = torch.cat([torch.zeros_like(B0), B0], dim=1)
        return [(layer.lora_A.weight, A), (layer.lora_B.weight, B)]
    values = [(layer.lora_A.weight, A0), (layer.lora_B.weight, B0)]
    if layer.uses_dora:
        values.append((layer.dora_parameter, layer.dora_magnitude(layer.s * (B0 @ A0))))
    return values


def _loss_after(trainer: Trainer, estimate: GradientEstimate) -> float | None:
    """Return the mean loss of the first batches with the written factors, as the probe computed it before."""
    batch = estimate.first_batch
    if batch is None:
        return None
    model = probed_module(trainer)
    with borrowed(trainer, model), torch.no_grad(), warnings.catch_warnings():
        # Reentrant activation checkpointing warns of every pass without gradients; here none are wanted.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        loss = mean_loss(trainer, model, batch, count_items(trainer, batch)).item()
    loss = mean_over_processes(trainer, loss, estimate.first_items)
    if not math.isfinite(loss):
        logger.warning("The loss after the start is %s. Use a larger gamma, or look at the report's scales.", loss)
    return loss
