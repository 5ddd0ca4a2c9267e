"""How full values get into parameters, and which module the probe calls: all that differs between engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn


if TYPE_CHECKING:
    from transformers import Trainer

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.MULTI_XPU)


def require_supported(trainer: Trainer) -> None:
    """
    Refuse engines that shard parameters.

    Raises:
        `ValueError`: naming the engine.
    """
    engine = trainer.accelerator.distributed_type
    if not clips_plain_gradients(trainer):
        raise ValueError(
            f"The parameters are sharded ({engine.value}); a gradient-aligned start is supported on one process and "
            "under DDP. Use one of these, or `LoRAGAConfig(init='none')`."
        )


def clips_plain_gradients(trainer: Trainer) -> bool:
    """Tell whether every process holds whole gradients that it can clip by itself."""
    return trainer.accelerator.distributed_type in SUPPORTED and not _is_sharded_at_load(trainer)


def _is_sharded_at_load(trainer: Trainer) -> bool:
    return getattr(trainer, "is_distributed_loading_by_transformers", False)


def probed_module(trainer: Trainer) -> nn.Module:
    """
    Return the module whose forward the probe calls.

    Under DDP that is the bare model: the sketches are summed once at the end, so DDP's own reduction has no work to
    do.
    """
    return trainer.model


@torch.no_grad()
def write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a full `value` into `parameter` in place, in its own dtype and device. Every rank passes the same value."""
    parameter.copy_(value)


def sum_over_processes(trainer: Trainer, tensors: list[Tensor]) -> int:
    """
    Add up `tensors` over all processes, in place.

    The tensors of one dtype and device travel as one flat buffer, so the number of collectives does not grow with the
    number of layers.

    Returns:
        Bytes that this process handed to the all-reduce; 0 on a single process.
    """
    if trainer.accelerator.num_processes == 1:
        return 0
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    sent = 0
    for (_, device), group in groups.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in group]).to(trainer.accelerator.device)
        torch.distributed.all_reduce(flat)
        sent += flat.numel() * flat.element_size()
        for tensor, total in zip(group, flat.to(device).split([t.numel() for t in group]), strict=True):
            tensor.copy_(total.view_as(tensor))
    return sent


def gather_integers(trainer: Trainer, *values: int) -> list[list[int]]:
    """Return the `values` of every process, one row a rank."""
    if trainer.accelerator.num_processes == 1:
        return [list(values)]
    mine = torch.tensor([values], dtype=torch.int64, device=trainer.accelerator.device)
    return trainer.accelerator.gather(mine).tolist()
