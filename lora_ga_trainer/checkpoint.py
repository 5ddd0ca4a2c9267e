"""Tell whether a checkpoint continues the start that a model was prepared for, before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftModel
from torch import nn

from .fingerprint import fingerprint_base
from .json_file import short
from .layers import active_adapter, find_adapted_layers, require_peft_model
from .record import FILE_NAME, StartRecord, read_record, record_of_model


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


def adapter_folder(folder: str | os.PathLike[str], model: PeftModel) -> Path:
    """Return where PEFT keeps the active adapter of a model that was saved to `folder`."""
    adapter = active_adapter(model)
    return Path(folder) if adapter == "default" else Path(folder) / adapter


def require_record(place: Path, expected: StartRecord) -> StartRecord:
    """
    Read the record of an adapter's folder that a run with the start `expected` is to continue.

    Raises:
        `ValueError`: if it is missing or damaged.
    """
    found = read_record(place)
    if found is None:
        raise ValueError(
            f"{place} has no {FILE_NAME}: it was not written by a run with init={expected.init!r}, or the file was "
            "lost, and its factors can't be continued as that start. Resume it with LoRAGAConfig(init='none') on a "
            f"plain adapter of its stored rank, or restore {FILE_NAME} from another checkpoint of the same run."
        )
    return found
