"""Check that a checkpoint continues the start a model was prepared for, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..adapters.find import find_lora_layers
from ..adapters.host import require_adapter
from ..engines.support import require_resumable_engine
from .fingerprint import fingerprint_base
from .intact import newest_complete_checkpoint, require_complete
from .json_file import short
from .record import record_of_model, require_record


if TYPE_CHECKING:
    from transformers import Trainer


def require_resumable(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """
    Refuse a checkpoint that can't be resumed on `model`.

    Args:
        folder: the checkpoint's folder.
        model: whose adapter is prepared.

    Raises:
        `ValueError`: naming the folder, what it holds and what was expected: another rank, another start, another
            base, or no `lora_ga.json`.
    """
    expected = record_of_model(model)
    if expected is None or not Path(folder).is_dir():  # a missing folder is the Trainer's own error
        return
    place = require_adapter(model).place(folder)
    found = require_record(place, expected)
    base = fingerprint_base(model, find_lora_layers(model))
    for what, theirs, ours in (
        ("init", found.init, expected.init),
        ("rank", found.rank, expected.rank),
        ("anchored", found.anchored, expected.anchored),
        ("base", found.base, base),
    ):
        if theirs != ours:
            raise ValueError(
                f"{place} was trained with {what}={short(theirs)}, this run has {what}={ours!r}. Resume with the "
                "LoraConfig, LoRAGAConfig and base model (dtype and quantisation included) of the run that wrote it."
            )


def checked_checkpoint(trainer: Trainer, resume_from_checkpoint: str | bool | None) -> str | bool | None:
    """
    Look at a checkpoint, and choose the newest where none is named, before anything of it is loaded. Collective.

    Args:
        trainer: its model and `output_dir` are looked at.
        resume_from_checkpoint: of `Trainer.train`.

    Returns:
        What to hand to `Trainer.train`: the folder, or the argument itself where nothing is resumed or the model
        carries no start of this package.

    Raises:
        `ValueError`: naming the folder, if it was cut short or can't be resumed on this model or engine.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not resume_from_checkpoint or record_of_model(model) is None:
        return resume_from_checkpoint
    require_resumable_engine(trainer)
    folder = _require_newest(trainer) if resume_from_checkpoint is True else resume_from_checkpoint
    require_complete(trainer, folder)
    require_resumable(folder, model)
    return folder


def checkpoint_to_resume(trainer: Trainer, resume_from_checkpoint: str | bool | None) -> str | None:
    """
    Return the folder that a run goes on from, the newest whole one where none is named; `None` for a new run.

    Raises:
        `ValueError`: if there is none.
    """
    if resume_from_checkpoint is True:
        return _require_newest(trainer)
    return resume_from_checkpoint or None


def _require_newest(trainer: Trainer) -> str:
    folder = newest_complete_checkpoint(trainer)
    if folder is None:
        raise ValueError(
            f"No valid checkpoint found in output directory ({trainer.args.output_dir}): there is none that was "
            "written to its end. Train without resume_from_checkpoint, or name another folder."
        )
    return folder
