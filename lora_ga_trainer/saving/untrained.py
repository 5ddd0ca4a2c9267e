"""
Parts of an adapter that are not trained, under DeepSpeed: `A` with `train_A=False`, or what a user has frozen.

Of a PEFT model transformers lets DeepSpeed save the trained parameters alone. Under ZeRO-3 the others are missing from
the adapter's own file, too. Without them the rest of an adapter would go on with values it was never trained with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType, gather_object
from peft import PeftMixedModel, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from ..adapters.host import WEIGHTS_FILE, AdapterHost, find_host
from ..engines.parameters import is_partitioned, read_parameter, write_whole


if TYPE_CHECKING:
    from transformers import Trainer


def with_untrained(trainer: Trainer, state_dict: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    """
    Add what ZeRO-3 leaves out of the state that a trainer saves. Collective.

    Args:
        trainer: its model is looked at.
        state_dict: of the whole model, by its names, on the process that saves; as it is elsewhere and under other
            engines.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not _leaves_out(trainer, model):
        return state_dict
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    untrained = _untrained(model)
    missing = {names[id(p)]: read_parameter(p).cpu() for p in untrained.values() if is_partitioned(p)}
    return {**state_dict, **missing} if state_dict else state_dict


def folder_of_untrained(trainer: Trainer, resume_from_checkpoint: str | bool | None) -> str | None:
    """Return the checkpoint whose adapter's file is to be read by [`restore_untrained`], if there is one."""
    if not resume_from_checkpoint or trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    if resume_from_checkpoint is not True:
        return resume_from_checkpoint
    output_dir = trainer.args.output_dir
    return get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None


def restore_untrained(trainer: Trainer, folder: str | None) -> None:
    """
    Read what DeepSpeed has not restored from the adapter's file of a checkpoint. Collective.

    Args:
        trainer: after it has loaded a checkpoint; its model is changed in place.
        folder: of the checkpoint, from [`folder_of_untrained`]; `None` if nothing is resumed.

    Raises:
        `ValueError`: on every process, naming the folder and a tensor that is not there.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not _leaves_out(trainer, model) or not any(gather_object([folder is not None])):
        return
    host, untrained = find_host(model), _untrained(model)
    if host is None or not untrained:
        return
    tensors, fault = _read(host, folder, untrained)
    fault = next((found for found in gather_object([fault]) if found), "")
    if fault:
        raise ValueError(
            f"{folder} can't be resumed: DeepSpeed restores no parameters that are not trained, and {fault}. Resume "
            "from a folder in which every process finds the adapter's file."
        )
    for name, parameter in untrained.items():
        write_whole(parameter, tensors[name])


def _leaves_out(trainer: Trainer, model: nn.Module) -> bool:
    """Tell whether transformers lets the engine of a trainer leave out what is not trained."""
    is_peft = isinstance(model, (PeftModel, PeftMixedModel))
    return is_peft and trainer.accelerator.distributed_type == DistributedType.DEEPSPEED


def _untrained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the active adapter that are not trained, by their names in its files."""
    host = find_host(model)
    if host is None or len(host.active_adapters()) != 1:
        return {}
    ours = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    # PEFT looks for all that it saves, and hands parameters back as they are.
    every: dict[str, Tensor] = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    found: dict[str, nn.Parameter] = host.state_dict(every)  # type: ignore[assignment]  # of those that are kept
    return {name: parameter for name, parameter in found.items() if id(parameter) in ours}


def _read(
    host: AdapterHost, folder: str | None, untrained: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of an adapter's file, and what is wrong with it for these parameters."""
    if folder is None:
        return {}, "a process finds no checkpoint"
    path = host.place(folder) / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        return {}, f"{path} can't be read ({error})"
    for name, parameter in untrained.items():
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        if name not in tensors or tensors[name].shape != shape:
            return {}, f"{path} has no {name} of {tuple(shape)}"
    return tensors, ""
