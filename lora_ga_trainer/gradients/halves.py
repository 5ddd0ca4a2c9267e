"""Two halves of the probe, on samples of which none is in both, for what one half says of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from .estimate import GradientEstimate
from .probe import estimate_gradients


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer


def estimate_halves(
    trainer: Trainer, config: LoRAGAConfig, layers: Sequence[AdaptedLayer], probe_dataset: Dataset | None = None
) -> tuple[GradientEstimate, GradientEstimate]:
    """
    Estimate the whole gradient of each half of `config.num_samples`, in fp32. Collective.

    Args:
        trainer, config, layers, probe_dataset: see [`estimate_gradients`]; the estimator is exact.

    Raises:
        `ValueError`: if the data has no more samples than the first half takes.
    """
    half = replace(config, num_samples=-(-config.num_samples // 2), estimator="exact", sketch_size=None)
    first = estimate_gradients(trainer, half, layers, probe_dataset)
    return first, estimate_gradients(trainer, half, layers, probe_dataset, skip=first.samples)
