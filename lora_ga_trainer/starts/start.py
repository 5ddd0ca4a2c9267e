"""A start, whole: estimate the gradients, compute the factors, write them, report."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.collectives import mean_over_processes
from ..engines.support import probed_module
from ..gradients.borrow import borrowed
from ..gradients.estimate import GradientEstimate
from ..gradients.halves import estimate_halves
from ..gradients.probe_file import load_or_estimate
from ..gradients.samples import mean_loss
from .compute import compute_starts
from .report import Action, GradientReport, LayerReport
from .write import write_start


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

logger = logging.getLogger(__name__)


def start_adapter(
    trainer: Trainer,
    config: LoRAGAConfig,
    layers: list[AdaptedLayer],
    probe_dataset: Dataset | None = None,
    frozen: Sequence[AdaptedLayer] = (),
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
        frozen: layers of the adapter that are not trained now. They keep PEFT's own start; the report and a warning
            say so, because something may let them train later.
    """
    begin = time.perf_counter()
    for layer in layers:
        layer.require_whole(trainer.args.n_gpu)
    if config.supported_only:
        seen = [*estimate_halves(trainer, config, layers, probe_dataset)]
    else:
        seen = [load_or_estimate(trainer, config, layers, probe_dataset)]
    estimate = seen[0]
    starts, sent = compute_starts(trainer, config, layers, *seen)
    for start in starts:
        if start.factors is not None:
            write_start(trainer, start.layer, *start.factors)
    _name_zero_gradients([start.report for start in starts])
    if frozen:
        logger.warning(
            "%d layers of the adapter are frozen as training begins. They get no start and keep PEFT's own, also "
            "where something lets them train later: %s.",
            len(frozen),
            ", ".join(layer.name for layer in frozen),
        )
    loss_after = _loss_after(trainer, estimate)
    return GradientReport(
        init=config.init,
        samples=sum(part.samples for part in seen),
        items=sum(part.items for part in seen),
        tokens=sum(part.tokens for part in seen),
        seconds=time.perf_counter() - begin,
        probe_seconds=sum(part.seconds for part in seen),
        probe_bytes=sum(part.nbytes for part in seen),
        bytes_sent=sum(part.bytes_sent for part in seen) + sent,
        loss_before=None if loss_after is None else estimate.first_loss,
        loss_after=loss_after,
        layers=[*(start.report for start in starts), *map(_report_frozen, frozen)],
        whitening=config.whitening,
    )


def _name_zero_gradients(reports: Sequence[LayerReport]) -> None:
    """Name the layers that the loss reaches and does not depend on, in a warning."""
    names = [report.name for report in reports if report.action is Action.ZERO_GRADIENT]
    if names:
        logger.warning(
            "The gradient of %d of the %d adapted layers is zero on the probe's samples. They keep PEFT's own start, "
            "whose B is zero: %s.",
            len(names),
            len(reports),
            ", ".join(names),
        )


def _loss_after(trainer: Trainer, estimate: GradientEstimate) -> float | None:
    """Return the mean loss of the first batches with the written factors, as the probe computed it before."""
    batch = estimate.first_batch
    if batch is None:
        return None
    model = probed_module(trainer)
    with borrowed(trainer, model), warnings.catch_warnings():
        # Reentrant activation checkpointing warns of every pass without gradients; here none are wanted.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        try:
            with torch.no_grad():
                loss = mean_loss(trainer, model, batch, estimate.first_items).item()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            # A loss that holds a gradient of its own (a gradient penalty) has no value without a graph.
            loss = mean_loss(trainer, model, batch, estimate.first_items).item()
    loss = mean_over_processes(trainer, loss, estimate.first_items)
    if not math.isfinite(loss):
        logger.warning("The loss after the start is %s. Use a larger gamma, or look at the report's scales.", loss)
    return loss


def _report_frozen(layer: AdaptedLayer) -> LayerReport:
    """Report a layer that the probe did not look at, because it was not trained when training began."""
    return LayerReport(
        name=layer.name,
        shape=layer.shape,
        rank=layer.rank,
        scale=0.0,
        singular_values=[],
        energy_share_r=0.0,
        energy_share_2r=None,
        energy_kept=1.0,
        sketched=False,
        action=Action.FROZEN,
        experts=layer.experts,
        experts_plain=layer.experts,
    )
