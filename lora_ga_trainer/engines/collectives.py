"""Communication between processes, batched into few collectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from transformers import Trainer

# Sent at once. The tensors are copied into a buffer of this size, so it bounds the extra memory.
_BUCKET_BYTES = 2**28


def sum_over_processes(trainer: Trainer, tensors: Sequence[Tensor]) -> int:
    """
    Add up `tensors` over all processes, in place.

    Tensors of one dtype are sent in flat buffers of up to 256 MiB, so the number of collectives does not grow with the
    number of layers. What is kept in less than fp32 is sent and added up in fp32, so processes may keep it in
    different dtypes. The tensors of a process may lie on different devices.

    Returns:
        Bytes that this process handed to the all-reduce. It is 0 on a single process.
    """
    if trainer.accelerator.num_processes == 1:
        return 0
    sent = 0
    for dtype, group in _buckets(tensors, _added_in):
        flat = _flatten(group, trainer.accelerator.device, dtype)
        torch.distributed.all_reduce(flat)
        sent += flat.numel() * flat.element_size()
        _unflatten(flat, group)
    return sent


def mean_over_processes(trainer: Trainer, value: float, weight: float) -> float:
    """Return the weighted mean of the processes' values. The value of a process with weight 0 is ignored, even NaN."""
    totals = torch.tensor([value * weight if weight > 0 else 0.0, weight], dtype=torch.float64)
    sum_over_processes(trainer, [totals])
    total, weights = totals.tolist()
    return total / weights if weights > 0 else math.nan


def share_from_owners(trainer: Trainer, owned: Sequence[Sequence[Tensor]]) -> int:
    """
    Overwrite tensors in place with those of the process that owns them. All processes then agree to the bit.

    Args:
        owned: one entry for each process, with the tensors that it owns. Shapes and dtypes are the same everywhere.

    Returns:
        Bytes that this process sent. It is 0 on a single process.
    """
    if trainer.accelerator.num_processes == 1:
        return 0
    sent = 0
    for owner, tensors in enumerate(owned):
        for dtype, group in _buckets(tensors, lambda tensor: tensor.dtype):
            flat = _flatten(group, trainer.accelerator.device, dtype)
            torch.distributed.broadcast(flat, src=owner)
            _unflatten(flat, group)
            sent += flat.numel() * flat.element_size() if owner == trainer.accelerator.process_index else 0
    return sent


def _added_in(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype


def _buckets(
    tensors: Iterable[Tensor], sent_in: Callable[[Tensor], torch.dtype]
) -> list[tuple[torch.dtype, list[Tensor]]]:
    """Group tensors by the dtype they are sent in. A group holds at most `_BUCKET_BYTES`, or one tensor with more."""
    buckets: list[tuple[torch.dtype, list[Tensor]]] = []
    open_ones: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        dtype = sent_in(tensor)
        size = tensor.numel() * dtype.itemsize
        bucket, filled = open_ones.get(dtype, ([], 0))
        # Every process sees the same sizes in the same order, so all of them make the same buckets.
        if not bucket or filled + size > _BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append((dtype, bucket))
        bucket.append(tensor)
        open_ones[dtype] = bucket, filled + size
    return buckets


def _flatten(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(device, dtype) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))


def gather_integers(trainer: Trainer, *values: int) -> list[list[int]]:
    """Return the `values` of every process, one row for each rank."""
    if trainer.accelerator.num_processes == 1:
        return [list(values)]
    mine = torch.tensor([values], dtype=torch.int64, device=trainer.accelerator.device)
    return trainer.accelerator.gather(mine).tolist()
