"""From a gradient estimate to written factors: what a start consists of."""

from __future__ import annotations

import logging
import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from .adapted_layer import AdaptedLayer
from .anchor import factor_rank, is_anchored
from .borrow import borrowed
from .collectives import gather_integers, mean_over_processes, share_from_owners
from .config import LoRAGAConfig
from .engines import is_sharded, probed_module, write_parameters
from .estimate import GradientEstimate
from .experts import join_A, join_B
from .factors import random_rows
from .inits import INITS, Place
from .layers import require_peft_model
from .probe import estimate_gradients
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
    report_experts,
)
from .samples import mean_loss
from .stacks import top_svds


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

logger = logging.getLogger(__name__)

Factors = tuple[Tensor, Tensor]  # B0 (E, out, r), A0 (E, r, in), or those of one expert, fp32


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
        layers: the adapted layers, anchored already for an init that is.
        probe_dataset: see [`estimate_gradients`].
    """
    begin = time.perf_counter()
    _require_whole_experts(trainer, layers)
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
    seen = [row[0] for row in gather_integers(trainer, int(Path(config.probe_file).exists()))]
    if len(set(seen)) > 1:
        raise ValueError(
            f"probe_file={config.probe_file!r} is there for {sum(seen)} of {len(seen)} processes only. Name a file "
            "in a folder that all of them share."
        )
    estimate = load_estimate(config, model, layers, dataset)
    if estimate is None:
        estimate = estimate_gradients(trainer, config, layers, probe_dataset)
        save_estimate(estimate, config, model, layers, dataset, write=trainer.is_world_process_zero())
    return estimate


def _require_whole_experts(trainer: Trainer, layers: list[AdaptedLayer]) -> None:
    for layer in layers:
        if layer.parameter_name is not None and is_anchored(layer) and trainer.args.n_gpu > 1:
            raise ValueError(
                f"{layer.name}: nn.DataParallel, which the Trainer uses on {trainer.args.n_gpu} GPUs without a "
                "launcher, can't copy an anchored parameter. Start with `accelerate launch`, which gives each GPU a "
                "process, or show one GPU with CUDA_VISIBLE_DEVICES."
            )
        if layer.parameter_name is not None and is_sharded(layer.weight):
            raise ValueError(
                f"{layer.name}: this engine spreads the parameter over processes, where PEFT can't adapt it. Leave "
                "it out of `target_parameters`, or use an engine that keeps it whole."
            )


def _compute_starts(
    trainer: Trainer, config: LoRAGAConfig, layers: list[AdaptedLayer], estimate: GradientEstimate
) -> tuple[list[tuple[Factors | None, LayerReport]], int]:
    """Return what [`_compute_start`] does for every layer, the same on every process, and the bytes this one sent."""
    rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
    wanted = {
        name: min(2 * factor_rank(layer), *layer.shape) for layer in layers[rank::size] for name in layer.matrices
    }
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
    E, (out_features, in_features), r = layer.experts, layer.shape, factor_rank(layer)
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
    report = reports[0] if layer.parameter_name is None else report_experts(layer.name, reports)
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
    r, (out_features, in_features) = factor_rank(layer), layer.shape
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


@torch.no_grad()
def start_values(
    layer: AdaptedLayer,
    B0: Tensor,  # (E, out, r), or (out, r)
    A0: Tensor,  # (E, r, in), or (r, in)
) -> list[tuple[nn.Parameter, Tensor]]:
    """
    Return what to write into which parameters: `[A0; 0]`, `[0, B0]` in an anchored layer, `A0`, `B0` in a plain one.

    A plain start moves the weight, so DoRA's magnitude becomes `||W + s B0 A0||` of each row.
    """
    device = layer.stored_A.device
    B0, A0 = (factor.to(device) if factor.dim() == 3 else factor[None].to(device) for factor in (B0, A0))
    if is_anchored(layer):
        A = join_A(torch.cat([A0, torch.zeros_like(A0)], dim=1))
        B = join_B(torch.cat([torch.zeros_like(B0), B0], dim=2))
        return [(layer.stored_A, A), (layer.stored_B, B)]
    values = [(layer.stored_A, join_A(A0)), (layer.stored_B, join_B(B0))]
    if layer.uses_dora:
        values.append((layer.dora_parameter, layer.dora_magnitude(layer.s * (B0[0] @ A0[0]))))
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
        loss = mean_loss(trainer, model, batch, estimate.first_items).item()
    loss = mean_over_processes(trainer, loss, estimate.first_items)
    if not math.isfinite(loss):
        logger.warning("The loss after the start is %s. Use a larger gamma, or look at the report's scales.", loss)
    return loss
