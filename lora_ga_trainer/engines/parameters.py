"""Full values in and out of parameters that an engine may have sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor


if TYPE_CHECKING:
    from transformers import Trainer


def plain_name(name: str) -> str:
    """Return a module's name without the parts that FSDP1 adds to it."""
    return name.replace("_fsdp_wrapped_module.", "")


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether this process holds only a part of the parameter."""
    return isinstance(parameter, DTensor) or is_partitioned(parameter)


@torch.no_grad()
def read_parameter(parameter: Tensor) -> Tensor:
    """Return the full value of a parameter, sharded or not. It may be the parameter's own storage. Collective."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if is_partitioned(parameter):
        from deepspeed import zero
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        # Where the input of a module needs no gradient, DeepSpeed lets its parameters go at the optimizer's step only.
        # After a pass without a step they are whole, and it refuses to part them again.
        partitioned: Any = parameter  # DeepSpeed has given it what it keeps of it
        if partitioned.ds_active_sub_modules and partitioned.ds_status == ZeroParamStatus.AVAILABLE:
            return parameter.detach().clone()
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


@torch.no_grad()
def write_parameters(trainer: Trainer, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """
    Copy full values into parameters in place, and into the engine's master copies of them.

    The values take the dtype and the device of the parameters. Every process passes the same parameters and values.
    """
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        _write_deepspeed(trainer.model_wrapped, values)
        return
    values = _write_flat(trainer.model, values)
    for parameter, value in values:
        parameter.copy_(like_parameter(value.to(parameter.dtype), parameter))


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor gathered, and any other tensor as it is. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this process holds, which shares its memory, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a full `value` as `parameter` is sharded. Every process passes the same value. Collective."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def row_shard(weight: Tensor) -> RowShard | None:
    """Return which rows of a base weight this process holds, or `None` if it holds all of them."""
    if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard():
        return None
    mesh = weight.device_mesh
    return RowShard(mesh.get_group(), mesh.get_local_rank(), mesh.size(), weight.shape[0])


def is_partitioned(parameter: Tensor) -> bool:
    """Tell whether ZeRO-3 has partitioned the parameter. DeepSpeed itself looks for `ds_id`."""
    return hasattr(parameter, "ds_id")


def _write_deepspeed(engine: Any, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    # The probe's forward pass may leave a gathered copy behind, and then the next gathering fails.
    engine.empty_partition_cache()
    for parameter, value in values:
        write_whole(parameter, value)
        # The first step starts from the master copy and would undo a write to the parameter alone.
        value = value.to(parameter.device, torch.float32)
        if is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, partitions(value, parameter)[_partition_rank(parameter)])
        else:
            safe_set_full_fp32_param(parameter, value)


@torch.no_grad()
def write_whole(parameter: Tensor, value: Tensor) -> None:
    """Copy a full value into a parameter that ZeRO-3 may have partitioned, and not into master copies. Collective."""
    if not is_partitioned(parameter):
        parameter.copy_(value)
        return
    from deepspeed import zero

    with zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def partitions(value: Tensor, parameter: Any) -> Tensor:  # (processes, numbers of a part)
    """Cut a full value into parts as ZeRO-3 does, with padding. DeepSpeed's own setters fail on an uneven division."""
    parts = torch.distributed.get_world_size(parameter.ds_process_group)
    padding = parts * parameter.ds_tensor.numel() - value.numel()
    return torch.nn.functional.pad(value.flatten(), (0, padding)).view(parts, -1)


def _partition_rank(parameter: Any) -> int:
    return torch.distributed.get_rank(parameter.ds_process_group)


def _write_flat(
    model: nn.Module, values: Sequence[tuple[nn.Parameter, Tensor]]
) -> Sequence[tuple[nn.Parameter, Tensor]]:
    """Write the parameters that FSDP1 has flattened, and return the others. One FSDP unit is gathered at a time."""
    left = {id(parameter): (parameter, value) for parameter, value in values}
    for module in model.modules():
        if not isinstance(module, FullyShardedDataParallel) or left.keys().isdisjoint(map(id, module.parameters())):
            continue
        with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=True):
            # Parameters of nested units stay flat, so their shape differs from that of the value. Their turn comes.
            for parameter, value in [entry for entry in left.values() if entry[0].shape == entry[1].shape]:
                parameter.copy_(value)
                del left[id(parameter)]
    return list(left.values())


@dataclass(frozen=True)
class RowShard:
    """The rows of a weight `(out, in)` that this process holds, where every process holds different ones."""

    group: Any
    rank: int
    size: int
    rows: int  # out

    @property
    def mine(self) -> slice:
        length = -(-self.rows // self.size)  # as torch.chunk does
        return slice(min(self.rank * length, self.rows), min((self.rank + 1) * length, self.rows))

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor of the same shape on every process. Collective."""
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def join(self, tensor: Tensor) -> Tensor:  # (L, rows of this process, n) -> (L, out, n)
        """Put the rows of every process together. Collective."""
        length = -(-self.rows // self.size)
        padded = torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded, group=self.group)
        return torch.cat(parts, dim=1)[:, : self.rows]
