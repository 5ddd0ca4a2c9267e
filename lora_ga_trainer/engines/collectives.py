"""What processes tell each other, in as few collectives as there are things to say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor


if TYPE_CHECKING:
    from transformers import Trainer

_BUCKET_BYTES = 2**28  # that are sent at once: copies of this size are made


def sum_over_processes(trainer: Trainer, tensors: Sequence[Tensor]) -> int:
    """
    Add up `tensors` over all processes, in place.

    The tensors of one dtype travel in flat buffers of up to 256 MiB, so there are few collectives however many layers
    there are, and the tensors of a process may live on devices of their own.

    Returns:
        Bytes that this process handed to the all-reduce; 0 on a single process.
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
    """Return the mean of every process's `value` by its `weight`; a value of weight 0 may be anything."""
    totals = torch.tensor([value * weight if weight > 0 else 0.0, weight], dtype=torch.float64)
    sum_over_processes(trainer, [totals])
    total, weights = totals.tolist()
    return total / weights if weights > 0 else math.nan


def share_from_owners(trainer: Trainer, owned: Sequence[Sequence[Tensor]]) -> int:
    """
    Overwrite the tensors in place by those of the process that owns them, so that all agree to the bit.

    Args:
        owned: what the processes own, one entry a process, of the same shapes and dtypes on each of them.

    Returns:
        Bytes that this process sent; 0 on a single process.
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
    """Group tensors by dtype, those of one group together within `_BUCKET_BYTES` unless it is a single one."""
    buckets: list[list[Tensor]] = []
    open_ones: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        bucket, filled = open_ones.get(tensor.dtype, ([], 0))
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
    """Return the `values` of every process, one row a rank."""
    if trainer.accelerator.num_processes == 1:
        return [list(values)]
    mine = torch.tensor([values], dtype=torch.int64, device=trainer.accelerator.device)
    return trainer.accelerator.gather(mine).tolist()
