"""Trainers that let the model write its own samples, and how much of that a probe can undo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config import LoRAGAConfig


if TYPE_CHECKING:
    from transformers import Trainer

# Attributes of TRL's trainers that are set where samples depend on more than the model and the random numbers of this
# process: another server's random numbers, what tools and environments remember, a function of the user's.
_OUTSIDE = ("use_vllm", "rollout_func", "environment_factories", "tools")


def require_repeatable(trainer: Trainer, config: LoRAGAConfig) -> None:
    """
    Refuse a trainer that writes its samples where a probe can't put things back as they were.

    Samples that the model writes in this process are fine: the random numbers, the buffered samples and the counts of
    the trainer are given back, so training writes the same ones as if there had been no probe.

    Raises:
        `ValueError`: naming the setting and the way out, unless there is a probe file to read instead.
    """
    if config.probe_file is not None and Path(config.probe_file).exists() and config.head_warmup_steps == 0:
        return
    for name in _OUTSIDE:
        if getattr(trainer, name, None):
            raise ValueError(
                f"{name} is set: {type(trainer).__name__} lets samples be written by something with a state of its "
                "own, which the probe would change and can't put back. Train one step without it and with "
                "LoRAGAConfig(probe_file=...), which writes the gradients to that file, then name the file here; or "
                "use LoRAGAConfig(init='none')."
            )
