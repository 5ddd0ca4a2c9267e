"""The rows `(x, dy)` that a layer multiplies its weight by, as a linear layer sees them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn


# Numbers of unfolded input that are held at once: a patch repeats every pixel `prod(kernel)` times.
_MOST = 2**24


def rows_of(module: nn.Module, x: Tensor, dy: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Yield `x (N, in)` and `dy (N, out)`, so that the gradient of the weight is the sum of `dy^T x`.

    Args:
        module: a layer that maps `(..., in)` to `(..., out)`, or a convolution without groups or dilation, whose rows
            are patches of `in * prod(kernel)` numbers; they come in parts of the batch.
        x, dy: as the module sees them.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return
    if x.dim() == len(module.kernel_size) + 1:  # without a batch
        x, dy = x[None], dy[None]
    numbers = dy[0, 0].numel() * x.shape[1] * math.prod(module.kernel_size)
    step = max(1, _MOST // max(1, numbers))
    for part, of_part in zip(x.split(step), dy.split(step), strict=True):
        yield _patches(module, part), of_part.movedim(1, -1).reshape(-1, of_part.shape[1])


def _patches(conv: nn.Module, x: Tensor) -> Tensor:  # (batch, in, *size) -> (batch * places, in * prod(kernel))
    made = cast(Any, conv)
    x = F.pad(x, made._reversed_padding_repeated_twice)
    for axis, (size, stride) in enumerate(zip(made.kernel_size, made.stride, strict=True)):
        x = x.unfold(2 + axis, size, stride)
    # (batch, in, *places, *kernel)
    return x.movedim(1, 1 + len(made.kernel_size)).reshape(-1, x.shape[1] * math.prod(made.kernel_size))
