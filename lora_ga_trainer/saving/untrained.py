"""
Parts of an adapter that are not trained, under DeepSpeed: `A` with `train_A=False`, or what a user has frozen.

Of a PEFT model transformers lets DeepSpeed save the trained parameters alone. Under ZeRO-3 the others are missing from
the adapter's own file, too. The rest of an adapter then goes with values that it was never trained with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType, gather_object
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
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        return state_dict
    model = trainer.accelerator.unwrap_model(trainer.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    untrained = _untrained(model)
    missing = {names[id(p)]: read_parameter(p).cpu() for p in untrained.values() if is_partitioned(p)}
    return {**state_dict, **missing} if state_dict else state_dict


def restore_untrained(trainer: Trainer, resume_from_checkpoint: str | bool | None) -> None:
    """
    Read what DeepSpeed does not restore from the adapter's file of a checkpoint, before the Trainer loads. Collective.

    Args:
        trainer: its model is changed in place.
        resume_from_checkpoint: of `Trainer.train`.

    Raises:
        `ValueError`: on every process, naming the folder and a tensor that is not there.
    """
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED or not resume_from_checkpoint:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    host, untrained = find_host(model), _untrained(model)
    if host is None or not untrained:
        return
    folder = get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    if folder is None:
        return  # the Trainer's own error
    tensors, fault = _read(host, folder, untrained)
    fault = next((found for found in gather_object([fault]) if found), "")
    if fault:
        raise ValueError(
            f"{folder} can't be resumed: DeepSpeed keeps no parameters that are not trained, and {fault}. Resume from "
            "a folder that has the adapter's file (under ZeRO-3 with stage3_gather_16bit_weights_on_model_save)."
        )
    for name, parameter in untrained.items():
        write_whole(parameter, tensors[name])


def _untrained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the active adapter that are not trained, by their names in its files."""
    host = find_host(model)
    if host is None or len(host.active_adapters()) != 1:
        return {}
    parameters = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    ours = {id(parameter) for parameter in parameters.values()}
    # PEFT only looks at the names, so what it hands back are the parameters themselves.
    found: dict[str, nn.Parameter] = host.state_dict(parameters)  # type: ignore[assignment]
    return {name: parameter for name, parameter in found.items() if id(parameter) in ours}


def _read(
    host: AdapterHost, folder: str | os.PathLike[str], untrained: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of an adapter's file, and what is wrong with it for these parameters."""
    path = host.place(folder) / WEIGHTS_FILE
    if not path.is_file():
        return {}, f"{path} is not there"
    tensors = load_file(path)
    for name, parameter in untrained.items():
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        if name not in tensors or tensors[name].shape != shape:
            return {}, f"{path} has no {name} of {tuple(shape)}"
    return tensors, ""
