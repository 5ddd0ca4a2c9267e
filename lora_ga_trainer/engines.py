"""All that differs between engines: full values in and out of parameters, what the probe calls, and who steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from .collectives import RowShard


if TYPE_CHECKING:
    from transformers import Trainer

_REPLICATED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_HPU,
)
_SUPPORTED = (*_REPLICATED, DistributedType.FSDP, DistributedType.DEEPSPEED)


def require_supported(trainer: Trainer) -> None:
    """
    Refuse engines on which a layer's input and output-gradient are not those of the whole layer.

    Raises:
        `ValueError`: naming the engine.
    """
    engine = trainer.accelerator.distributed_type
    if engine not in _SUPPORTED:
        raise ValueError(
            f"The engine is {engine.value}; a gradient-aligned start is supported on one process, DDP, FSDP and "
            "DeepSpeed ZeRO. Use one of these, or `LoRAGAConfig(init='none')`."
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1 and not plugin.use_orig_params:
        raise ValueError(
            "FSDP1 with use_orig_params=False flattens an adapter's factors into one parameter, so that no layer has "
            "its own. Set fsdp_use_orig_params: true in the launch file, or use FSDP2."
        )
    size = getattr(trainer.model, "tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"The model is split by tensor parallelism (tp_size={size}), where a layer sees a part of its input or "
            "output only. Shard it with FSDP or ZeRO instead, or use `LoRAGAConfig(init='none')`."
        )


def holds_whole_gradients(trainer: Trainer) -> bool:
    """Tell whether every process holds the whole gradient of every adapter parameter, as in DDP."""
    return trainer.accelerator.distributed_type in _REPLICATED


def require_resumable_engine(trainer: Trainer) -> None:
    """
    Refuse to resume where no checkpoint holds the optimizer's state.

    Raises:
        `ValueError`: with the reason.
    """
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "resume_from_checkpoint: the model is sharded at load time (DistributedConfig), for which transformers "
            "writes no optimizer state, so a resume would start AdamW anew. Load the saved adapter with "
            "`lora_ga_trainer.load_adapter` and train on, or use DDP or DeepSpeed ZeRO to resume."
        )


def require_gradients(trainer: Trainer, what: str, in_parameters: bool, gathers: bool) -> None:
    """
    Refuse an engine that keeps from an optimizer the gradients it works on.

    Args:
        trainer: names the engine.
        what: the setting that asks for the optimizer, for the message.
        in_parameters: whether the optimizer itself looks for gradients in the model's parameters.
        gathers: whether it gathers gradients that are spread over processes.

    Raises:
        `ValueError`: naming the setting and the engine.
    """
    engine = trainer.accelerator.distributed_type
    if in_parameters and steps_by_itself(trainer):
        raise ValueError(
            f"{what} reads gradients of parameters, and {engine.value} shows an optimizer flat partitions only. Use "
            "correction='lora_pro', which corrects them before the engine's step, or DDP or FSDP2."
        )
    flat = engine == DistributedType.FSDP and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2
    if flat or (not gathers and not holds_whole_gradients(trainer)):
        raise ValueError(
            f"{what} needs whole gradients, and this engine ({engine.value}) spreads each over the processes. Use one "
            "process, DDP or ZeRO (FSDP2 for LoRA-Pro), or correction='none'."
        )


def probed_module(trainer: Trainer) -> nn.Module:
    """
    Return the module whose forward the probe calls.

    Under DDP and DeepSpeed that is the bare model: the sketches are summed once at the end, so the engine's own
    reduction has no work to do (and DeepSpeed's would divide, or step). Under FSDP it is the wrapped one, which
    gathers the weights.
    """
    return trainer.model


def plain_name(name: str) -> str:
    """Return a module's name without what FSDP1 puts into it."""
    return name.replace("_fsdp_wrapped_module.", "")


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether this process has a part of the parameter only."""
    return isinstance(parameter, DTensor) or _is_partitioned(parameter)


@torch.no_grad()
def read_parameter(parameter: Tensor) -> Tensor:
    """Return the full value of a parameter, sharded or not: a copy, or the parameter's own storage. Collective."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if _is_partitioned(parameter):
        from deepspeed import zero

        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


@torch.no_grad()
def write_parameters(trainer: Trainer, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """
    Copy full values into parameters in place, in their own dtype and device, master copies included.

    Every process calls this with the same parameters and the same values.
    """
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        _write_deepspeed(trainer.model_wrapped, values)
        return
    values = _write_flat(trainer.model, values)
    for parameter, value in values:
        parameter.copy_(like_parameter(value.to(parameter.dtype), parameter))


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor gathered, anything else as it is. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a full `value`, the same on every process, sharded as `parameter` is. Collective."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def optimizer_groups(trainer: Trainer) -> list[tuple[list[nn.Parameter], dict[str, Any]]]:
    """Return the model's parameters of every param group of the trainer's optimizer, and the group's options."""
    optimizer = trainer.optimizer
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        return [(group["params"], group) for group in optimizer.param_groups]
    zero = optimizer.optimizer  # its groups hold flat fp32 partitions, not the model's parameters
    if hasattr(zero, "trainable_param_groups"):  # ZeRO-3
        return [(group["params"], group) for group in zero.trainable_param_groups]
    return list(zip(zero.bit16_groups, zero.param_groups, strict=True))


def steps_by_itself(trainer: Trainer) -> bool:
    """Tell whether the engine clips and steps inside its backward pass, on flat partitions of its own (ZeRO)."""
    return trainer.accelerator.distributed_type == DistributedType.DEEPSPEED


def read_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return the whole accumulated gradient of a parameter of such an engine, with the loss scale. Collective."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def write_gradient(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace the accumulated gradient of a parameter of such an engine. Collective."""
    from deepspeed.utils import safe_set_full_grad

    safe_set_full_grad(parameter, _partitions(value, parameter) if _is_partitioned(parameter) else value)


def loss_scale(trainer: Trainer) -> float:
    """Return what such an engine has multiplied its gradients by; 1 without fp16."""
    return float(trainer.optimizer.optimizer.loss_scale)


def run_before_steps(trainer: Trainer, hook: Callable[[], None]) -> float:
    """
    Call `hook` before each step of such an engine, with the accumulated gradients in place, and stop it from clipping.

    Returns:
        The norm that the engine would have clipped to; 0 for none.
    """
    engine, zero = trainer.model_wrapped, trainer.optimizer.optimizer
    step = engine.step

    @functools.wraps(step)
    def hooked_step(*args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            hook()
        return step(*args, **kwargs)

    engine.step = hooked_step
    zero.clip_grad = 0.0  # a resumed engine has this already: the config is what remembers
    return float(engine.gradient_clipping())


def row_shard(weight: Tensor) -> RowShard | None:
    """Return how a base weight is spread over the processes; `None` if each has all of it."""
    if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard():
        return None
    mesh = weight.device_mesh
    return RowShard(mesh.get_group(), mesh.get_local_rank(), mesh.size(), weight.shape[0])


def _is_partitioned(parameter: Tensor) -> bool:
    """Tell whether ZeRO-3 has taken the parameter apart; `ds_id` is what DeepSpeed itself goes by."""
    return hasattr(parameter, "ds_id")


def _write_deepspeed(engine: Any, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    from deepspeed import zero
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    # A gathered copy that the probe's forward left behind makes the next gathering fail.
    engine.empty_partition_cache()
    for parameter, value in values:
        if _is_partitioned(parameter):
            with zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)
        else:
            parameter.copy_(value)
        # The master copy, too: the first step starts from it and would undo the write.
        value = value.to(parameter.device, torch.float32)
        if _is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, _partitions(value, parameter)[_partition_rank(parameter)])
        else:
            safe_set_full_fp32_param(parameter, value)


def _partitions(value: Tensor, parameter: nn.Parameter) -> Tensor:  # (processes, numbers of a part)
    """Cut a full value as ZeRO-3 does, padded; DeepSpeed's own setters fail where it does not divide."""
    parts = torch.distributed.get_world_size(parameter.ds_process_group)
    padding = parts * parameter.ds_tensor.numel() - value.numel()
    return torch.nn.functional.pad(value.flatten(), (0, padding)).view(parts, -1)


def _partition_rank(parameter: nn.Parameter) -> int:
    return torch.distributed.get_rank(parameter.ds_process_group)


def _write_flat(
    model: nn.Module, values: Sequence[tuple[nn.Parameter, Tensor]]
) -> Sequence[tuple[nn.Parameter, Tensor]]:
    """Write the parameters that FSDP1 has flattened, one of its units gathered at a time; return the others."""
    left = {id(parameter): (parameter, value) for parameter, value in values}
    for module in model.modules():
        if not isinstance(module, FullyShardedDataParallel) or left.keys().isdisjoint(map(id, module.parameters())):
            continue
        with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=True):
            # Parameters of units inside this one stay flat.
            for parameter, value in [entry for entry in left.values() if entry[0].shape == entry[1].shape]:
                parameter.copy_(value)
                del left[id(parameter)]
    return list(left.values())
