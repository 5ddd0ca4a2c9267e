"""Tell whether a checkpoint continues the start that a model was prepared for, before anything is loaded."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from ..adapters.find import find_adapted_layers, require_peft_model
from ..engines.support import require_resumable_engine
from .fingerprint import fingerprint_base
from .intact import newest_complete_checkpoint, require_complete
from .json_file import short
from .record import adapter_folder, record_of_model, require_record


if TYPE_CHECKING:
    pass


def require_resumable(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """
    Refuse a checkpoint that can't be resumed on `model`.

    Args:
        folder: the checkpoint's folder.
        model: a prepared `PeftModel`.

    Raises:
        `ValueError`: naming the folder, what it holds and what was expected: another rank, another start, another
            base, or no `lora_ga.json`.
    """
    expected = record_of_model(model)
    if expected is None or not Path(folder).is_dir():  # a missing folder is the Trainer's own error
        return
    model = require_peft_model(model)
    place = adapter_folder(folder, model)
    found = require_record(place, expected)
    base = fingerprint_base(model, find_adapted_layers(model))
    for what, theirs, ours in (
        ("init", found.init, expected.init),
        ("rank", found.rank, expected.rank),
        ("base", found.base, base),
    ):
        if theirs != ours:
            raise ValueError(
                f"{place} was trained with {what}={short(theirs)}, this run has {what}={ours!r}. Resume with the "
                "LoraConfig, LoRAGAConfig and base model (dtype and quantisation included) of the run that wrote it."
            )


def check_checkpoints(trainer: Trainer) -> None:
    """Make this trainer's `train` look at a checkpoint, and choose the newest, before anything of it is loaded."""
    train = trainer.train

    @functools.wraps(train)
    def checked_train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        if folder:
            require_resumable_engine(trainer)
            folder = _require_newest(trainer) if folder is True else folder
            require_complete(trainer, folder)
            require_resumable(folder, trainer.accelerator.unwrap_model(trainer.model))
        return train(folder, *args, **kwargs)

    trainer.train = checked_train  # type: ignore[method-assign]


def _require_newest(trainer: Trainer) -> str:
    folder = newest_complete_checkpoint(trainer)
    if folder is None:
        raise ValueError(
            f"No valid checkpoint found in output directory ({trainer.args.output_dir}): there is none that was "
            "written to its end. Train without resume_from_checkpoint, or name another folder."
        )
    return folder
