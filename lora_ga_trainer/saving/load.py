"""Load a saved adapter to train it further, anchored if it was."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from ..adapters.anchor import halve_config, tie_adapter
from ..adapters.find import find_lora_layers
from ..adapters.host import AdapterHost, find_hosts, require_adapter
from .fingerprint import fingerprint_base
from .json_file import short
from .record import StartRecord, attach_record, read_record, record_of_model


logger = logging.getLogger(__name__)

# What says where `PeftModel.from_pretrained` finds a folder, and how it gets there.
_HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def load_adapter(base_model: nn.Module, folder: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """
    Load a saved adapter to train it further, anchored if it was.

    `PeftModel.from_pretrained(..., is_trainable=True)` gives the same function, but as a plain adapter of rank 2r
    whose halves are free. This adds what the folder's `lora_ga.json` says. Without that file the adapter is left as
    plain PEFT loads it, and the log says so. Train it with this package's trainer, mixin or callback: the weight decay
    of a plain Trainer would shrink `B0`.

    A model that has the adapter in it already, since transformers or sentence-transformers read it from the folder, is
    anchored in place:

        model = AutoModelForCausalLM.from_pretrained(folder)  # or SentenceTransformer(folder)
        load_adapter(model, folder)

    Args:
        base_model: the clean base the adapter was trained on, or a model with the folder's adapter in place.
        folder: an adapter's folder or hub id; of a model with the adapter in place, a folder.
        kwargs: passed to `PeftModel.from_pretrained`; `subfolder`, `revision`, `token` and the like hold for
            `lora_ga.json`, too. A model with the adapter in place takes none.

    Returns:
        A `PeftModel`; a model with the adapter in place is returned itself.

    Raises:
        `ValueError`: if the record is damaged, or was made on another base; if an adapter that is in place is not the
            one of the folder.
    """
    if find_hosts(base_model):
        return _load_in_place(base_model, Path(folder), **kwargs)
    record = read_record(folder, **{name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None})
    model = PeftModel.from_pretrained(base_model, os.fspath(folder), is_trainable=True, **kwargs)
    _continue(model, record, folder)
    return model


def _load_in_place(model: nn.Module, folder: Path) -> nn.Module:
    """Fill the active adapter of a model from a folder, and let it be trained."""
    host = require_adapter(model)
    if record_of_model(model) is not None:
        raise ValueError(
            f"Adapter {host.adapter!r} has a start of this package already. Load {folder} into a new model."
        )
    host.let_train()
    _continue(model, read_record(folder), folder)
    host.load(folder)
    return model


def _continue(model: nn.Module, record: StartRecord | None, folder: str | os.PathLike[str]) -> None:
    """Make a loaded adapter what its record says."""
    if record is None:
        logger.warning("%s has no lora_ga.json: it continues as a plain LoRA adapter of its stored rank.", folder)
        return
    host, layers = require_adapter(model), find_lora_layers(model)
    base = fingerprint_base(model, layers)
    if base != record.base:
        raise ValueError(
            f"{folder}: the adapter was started on a base with fingerprint {short(record.base)}, this one has "
            f"{base!r}. Load the base (and dtype, and quantisation) that it was trained on, or load it with plain "
            "PEFT."
        )
    _require_rank(host, record, folder)
    host.replace_config(attach_record(host.config, record, host))
    if record.anchored:
        tie_adapter(layers)


def read_lora_config(folder: str | os.PathLike[str]) -> LoraConfig:
    """
    Read the config of a saved adapter, with the ranks that its user means: an anchored one stores 2r.

    Args:
        folder: that holds `adapter_config.json`.
    """
    config = LoraConfig.from_pretrained(os.fspath(folder))
    record = read_record(folder)
    if record is not None and record.anchored:
        halve_config(config)
    return config


def _require_rank(host: AdapterHost, record: StartRecord, folder: str | os.PathLike[str]) -> None:
    stored = host.config.r
    if stored != record.rank * (2 if record.anchored else 1):
        raise ValueError(
            f"{folder}: lora_ga.json says rank={record.rank}, init={record.init!r}, anchored={record.anchored}, which "
            f"does not fit the stored rank {stored} of adapter_config.json. Restore the two files of one save, or "
            "delete lora_ga.json to continue the adapter as a plain LoRA adapter."
        )
