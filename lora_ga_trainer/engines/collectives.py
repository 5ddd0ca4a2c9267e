"""Communication between processes, batched into few collectives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    number of layers. The tensors of a process may lie on different devices.

    Returns:
        Bytes that this process handed to the all-reduce. It is 0 on a single process.
    """
    if trainer.accelerator.num_processes == 1:
        return 0
    sent = 0
    for group in _buckets(tensors):
        flat = _flatten(group, trainer.accelerator.device)
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
        for group in _buckets(tensors):
            flat = _flatten(group, trainer.accelerator.device)
            torch.distributed.broadcast(flat, src=owner)
            _unflatten(flat, group)
            sent += flat.numel() * flat.element_size() if owner == trainer.accelerator.process_index else 0
    return sent


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors by dtype. A group holds at most `_BUCKET_BYTES`, or a single tensor that is larger."""
    buckets: list[list[Tensor]] = []
    open_ones: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        bucket, filled = open_ones.get(tensor.dtype, ([], 0))
        # Every process sees the same sizes in the same order, so all of them make the same buckets.
        if not bucket or filled + size > _BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        open_ones[tensor.dtype] = bucket, filled + size
    return buckets


def _flatten(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(device) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))


def gather_integers(trainer: Trainer, *values: int) -> list[list[int]]:
    """Return the `values` of every process, one row for each rank."""
    if trainer.accelerator.num_processes == 1:
        return [list(values)]
    mine = torch.tensor([values], dtype=torch.int64, device=trainer.accelerator.device)
    return trainer.accelerator.gather(mine).tolist()
