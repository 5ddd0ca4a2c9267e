"""
The adapter's part of a checkpoint, where the trainer does not write or read it.

`transformers.Trainer` writes and reads the adapter of a `PeftModel`. Of other models it falls short, with or without
this package:

* an adapter in place of a transformers model is written, but a resume asks for the files of a whole model;
* of any other module it saves the whole state and nothing that says what adapter is in it;
* sentence-transformers resumes by making a new model of the checkpoint, which has no `PeftModel` in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType
from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers import Trainer

from ..adapters.host import WEIGHTS_FILE, AdapterHost, require_adapter
from .record import record_of_model, recorded_config
from .untrained import with_untrained


if TYPE_CHECKING:
    from collections.abc import Callable


def save_with_adapter(
    trainer: Trainer,
    save: Callable[[Mapping[str, Tensor] | None], None],
    folder: str | None,
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """
    Let a trainer save its model, and add the adapter's files where it has written the model's whole state alone.

    With them plain PEFT can load the folder on the clean base, and a resume knows the start. What an engine leaves out
    of the state is added. Collective under DeepSpeed.

    Args:
        trainer: its model is looked at.
        save: the trainer's own saving, of a state dict.
        folder: that it saves to; default `output_dir`.
        state_dict: of the whole model, where an engine has gathered it.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = recorded_config(model)
    before = 0 if config is None else config.saves
    state_dict = with_untrained(trainer, state_dict)
    save(state_dict)
    if config is None or config.record is None or not config.record.initialised or config.saves > before:
        return
    if trainer.args.should_save:
        host = require_adapter(model)
        host.save(host.place(trainer.args.output_dir if folder is None else folder), state_dict)


def load_with_adapter(trainer: Trainer, load: Callable[[], None], folder: str | os.PathLike[str], best: bool) -> None:
    """
    Load a checkpoint into a trainer's model: by the trainer's own loading, or the adapter alone where that would fail.

    Args:
        trainer: its model is changed in place.
        load: the trainer's own loading.
        folder: of the checkpoint.
        best: whether it is loaded as the best one at the end of training.

    Raises:
        `ValueError`: if the adapter would have to be loaded alone and other parameters are trained, too.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if record_of_model(model) is None or not _lacks_loading(trainer, model, Path(folder), best):
        load()
        return
    host = require_adapter(model)
    _require_all_saved(model, host, folder)
    host.load(host.place(folder))


def _lacks_loading(trainer: Trainer, model: nn.Module, folder: Path, best: bool) -> bool:
    """Tell whether a trainer's own loading is known to fail for its model."""
    if trainer.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        return False  # each reads a layout of its own
    host = require_adapter(model)
    if not (host.place(folder) / WEIGHTS_FILE).is_file():
        return False
    if not best and _makes_new_models(trainer):
        # transformers puts the adapter into the new model, so it is like this one only where transformers put it in.
        return not vars(host.owner).get("_hf_peft_config_loaded", False)
    if isinstance(model, PeftModel):
        return False
    if isinstance(model, PeftMixedModel) and best:
        return True  # the Trainer takes it for a PeftModel and loads nothing
    return not any(folder.glob("model*.safetensors"))


def _makes_new_models(trainer: Trainer) -> bool:
    """Tell whether the trainer's loading is that of sentence-transformers."""
    definers = [kind for kind in type(trainer).__mro__ if "_load_from_checkpoint" in vars(kind)]
    return any(kind.__module__.startswith("sentence_transformers.") for kind in definers)


def _require_all_saved(model: nn.Module, host: AdapterHost, folder: str | os.PathLike[str]) -> None:
    inside = f"{host.name}." if host.name else ""
    others = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)]
    if others:
        raise ValueError(
            f"{folder} can't be loaded into this {type(model).__name__}: {others[0]} is trained beside the adapter "
            f"({len(others)} parameters), and the trainer has no way to load both. Freeze it, or name its module in "
            "`modules_to_save` of the LoraConfig of an adapter over the whole model."
        )
