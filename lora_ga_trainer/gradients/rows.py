"""
The rows `(x, dy)` that a layer multiplies its weight by, as a linear layer sees them.

An embedding is a linear layer of one-hot rows: `G = sum dy^T x` adds `dy` to the column of its id. [`OneHot`] keeps
such rows as ids, so that no work grows with `N` times the number of embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# Numbers of unfolded input that are held at once: a patch repeats every pixel `prod(kernel)` times.
_MOST = 2**24


@dataclass(frozen=True)
class OneHot:
    """
    Rows `x (N, in)` that hold one entry of 1 each.

    Args:
        ids: the place of that entry, `(N,)`.
    """

    ids: Tensor

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def __len__(self) -> int:
        return len(self.ids)

    def __matmul__(self, matrix: Tensor) -> Tensor:  # (in, k) -> (N, k)
        return matrix[self.ids]

    def counts(self, features: int) -> Tensor:  # (in,), integers
        """Return the sum of the rows, which is the sum of their squares as well."""
        return torch.bincount(self.ids, minlength=features)

    def add_rows(
        self,
        total: Tensor,  # (in, k)
        values: Tensor,  # (N, k)
        weight: float,
    ) -> None:
        """Add `weight * x^T values` to `total`, in its dtype."""
        values = weight * values.to(total.dtype)
        # Both add in a fixed order, on a CPU and on a GPU. The other way round each lets threads race for a row.
        if total.device.type == "cpu":
            total.index_add_(0, self.ids, values)
        else:
            total.index_put_((self.ids,), values, accumulate=True)


def rows_of(module: nn.Module, x: Tensor, dy: Tensor) -> Iterator[tuple[Tensor | OneHot, Tensor]]:
    """
    Yield `x (N, in)` and `dy (N, out)`, so that the gradient of the weight is the sum of `dy^T x`.

    Args:
        module: a layer that maps `(..., in)` to `(..., out)`; an embedding, whose rows are one-hot; or a convolution
            without groups or dilation, whose rows are patches of `in * prod(kernel)` numbers and come in parts of the
            batch.
        x, dy: as the module sees them.
    """
    if isinstance(module, nn.Embedding):
        yield _looked_up(module, x.reshape(-1), dy.reshape(-1, dy.shape[-1]))
        return
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        yield x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return
    if x.dim() == len(module.kernel_size) + 1:  # without a batch
        x, dy = x[None], dy[None]
    numbers = dy[0, 0].numel() * x.shape[1] * math.prod(module.kernel_size)
    step = max(1, _MOST // max(1, numbers))
    for part, of_part in zip(x.split(step), dy.split(step), strict=True):
        yield _patches(module, part), of_part.movedim(1, -1).reshape(-1, of_part.shape[1])


def _looked_up(
    embedding: nn.Embedding,
    ids: Tensor,  # (N,)
    dy: Tensor,  # (N, out)
) -> tuple[OneHot, Tensor]:
    scale = getattr(embedding, "embed_scale", None)  # of what is looked up; PEFT gives it to the adapter, too
    if scale is not None:
        dy = dy * torch.as_tensor(scale, device=dy.device).to(dy.dtype)
    if embedding.padding_idx is not None:  # a row that gets no gradient
        kept = ids != embedding.padding_idx
        ids, dy = ids[kept], dy[kept]
    return OneHot(ids), dy


def _patches(conv: nn.Module, x: Tensor) -> Tensor:  # (batch, in, *size) -> (batch * places, in * prod(kernel))
    made = cast(Any, conv)
    x = F.pad(x, made._reversed_padding_repeated_twice)
    for axis, (size, stride) in enumerate(zip(made.kernel_size, made.stride, strict=True)):
        x = x.unfold(2 + axis, size, stride)
    # (batch, in, *places, *kernel)
    return x.movedim(1, 1 + len(made.kernel_size)).reshape(-1, x.shape[1] * math.prod(made.kernel_size))
