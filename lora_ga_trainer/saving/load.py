"""Load a saved adapter to train it further, anchored if it was."""

from __future__ import annotations

import logging
import os
from typing import Any

from peft import PeftModel
from torch import nn

from ..adapters.anchor import tie_adapter
from ..adapters.find import active_adapter, find_lora_layers, require_peft_model
from .fingerprint import fingerprint_base
from .json_file import short
from .record import attach_record, read_record


logger = logging.getLogger(__name__)

# What says where `PeftModel.from_pretrained` finds a folder, and how it gets there.
_HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def load_adapter(base_model: nn.Module, folder: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """
    Load a saved adapter to train it further, anchored if it was.

    `PeftModel.from_pretrained(..., is_trainable=True)` gives the same function, but as a plain adapter of rank 2r
    whose halves are free. This adds what the folder's `lora_ga.json` says. Without that file the adapter is left as
    plain PEFT loads it, and the log says so. Train it with this package's trainer, mixin or callback: the weight decay
    of a plain Trainer would shrink `B0`.

    Args:
        base_model: the clean base the adapter was trained on.
        folder: an adapter's folder or hub id.
        kwargs: passed to `PeftModel.from_pretrained`; `subfolder`, `revision`, `token` and the like hold for
            `lora_ga.json`, too.

    Raises:
        `ValueError`: if the record is damaged, or was made on another base.
    """
    record = read_record(folder, **{name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None})
    model = PeftModel.from_pretrained(base_model, os.fspath(folder), is_trainable=True, **kwargs)
    if record is None:
        logger.warning("%s has no lora_ga.json: it continues as a plain LoRA adapter of its stored rank.", folder)
        return model
    layers = find_lora_layers(require_peft_model(model))
    base = fingerprint_base(model, layers)
    if base != record.base:
        raise ValueError(
            f"{folder}: the adapter was started on a base with fingerprint {short(record.base)}, this one has "
            f"{base!r}. Load the base (and dtype, and quantisation) that it was trained on, or load it with plain "
            "PEFT."
        )
    adapter = active_adapter(model)
    stored = model.peft_config[adapter].r
    if stored != record.rank * (2 if record.anchored else 1):
        raise ValueError(
            f"{folder}: lora_ga.json says rank={record.rank}, init={record.init!r}, which does not fit the stored "
            f"rank {stored} of adapter_config.json. Restore the two files of one save, or delete lora_ga.json to "
            "continue the adapter as a plain LoRA adapter."
        )
    model.peft_config[adapter] = attach_record(model.peft_config[adapter], record, model)
    if record.anchored:
        tie_adapter(layers)
    return model
