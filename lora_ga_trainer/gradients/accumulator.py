"""Accumulators of a gradient that is only ever seen in parts: the interface, and the one that keeps all of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..engines.devices import to_fp32
from ..engines.products import add_transposed_product, needs_blocks
from ..maths.fidelity import HELD_OUT
from ..maths.recovery import TopSVD, top_svd
from .rows import OneHot


# What products can be computed in; the later one wins where processes differ.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# What sums of sketches can be kept in.
SUMS = (torch.float32, torch.bfloat16)


class Accumulator(ABC):
    """The sum of one layer's gradient `G (out, in)` over the probe. It is linear in what is added."""

    sketched: bool
    dtype: torch.dtype  # that products are computed in; known once something was added

    @property
    @abstractmethod
    def directions(self) -> int:
        """How many singular triplets `svd` can give."""

    @abstractmethod
    def move_to(self, device: torch.device) -> None:
        """Live on `device` from now on."""

    @abstractmethod
    def add(self, x: Tensor | OneHot, dy: Tensor, weight: float) -> None:
        """Add `weight * dy^T x` for `x (N, in)`, `dy (N, out)`."""

    @abstractmethod
    def add_gradient(self, G: Tensor, weight: float) -> None:
        """Add `weight * G` for a `G (out, in)` that was formed elsewhere."""

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """Return what processes add up at the end."""

    @abstractmethod
    def held(self) -> list[Tensor]:
        """Return every tensor that is kept, also those that are shared with others."""

    @abstractmethod
    def divide(self, items: float) -> None:
        """Turn the sum into the mean."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all that `svds` needs, by name."""

    @staticmethod
    @abstractmethod
    def svds(some: Sequence[Any], k: int) -> list[TopSVD]:
        """Return the top `k` singular triplets of each of `some`, all of this kind, of one shape and on one device."""

    def svd(self, k: int) -> TopSVD:
        """Return the top `k` singular triplets."""
        (top,) = self.svds([self], k)
        return top


class ExactGradient(Accumulator):
    """`G` itself, in fp32."""

    sketched = False
    dtype = torch.float32

    def __init__(self, shape: tuple[int, int]) -> None:
        self.G = torch.zeros(shape, dtype=torch.float32)

    def move_to(self, device: torch.device) -> None:
        self.G = self.G.to(device)

    def add(self, x: Tensor | OneHot, dy: Tensor, weight: float) -> None:
        x, dy = to_one_dtype(x, dy)
        if isinstance(x, OneHot):
            add_product(self.G.T, x, dy, weight)
        else:
            add_product(self.G, dy, x, weight)

    def add_gradient(self, G: Tensor, weight: float) -> None:
        self.G.add_(G, alpha=weight)

    @property
    def directions(self) -> int:
        return min(self.G.shape)

    def sums(self) -> list[Tensor]:
        return [self.G]

    def held(self) -> list[Tensor]:
        return [self.G]

    def divide(self, items: float) -> None:
        self.G.div_(items)

    def state(self) -> dict[str, Tensor]:
        return {"G": self.G}

    @staticmethod
    def svds(some: Sequence[ExactGradient], k: int) -> list[TopSVD]:
        G = stack([to_fp32(exact.G) for exact in some])
        # Columns beyond k let subspace iteration converge in few rounds, also where singular values lie close.
        return top_svd(G, k, gaussian(G.shape[-1], min(6 * k, *G.shape[-2:]), 0, G.device))


@lru_cache(maxsize=64)
def gaussian(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:  # (rows, columns)
    """Draw a standard normal matrix on the CPU, the same on every machine; layers of one shape share it."""
    return _draw(rows, columns, seed).to(device)


@lru_cache(maxsize=64)
def drawn_columns(
    rows: int, k: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # (rows, k), (rows, 16)
    """Draw test columns and held-out ones, apart: the first are replaced at a turning point, the others are not."""
    drawn = _draw(rows, k + HELD_OUT, seed).to(device)
    return drawn[:, :k].contiguous(), drawn[:, k:].contiguous()


def _draw(rows: int, columns: int, seed: int) -> Tensor:
    # The seed depends on the shape, so that test matrices of two layers are independent.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rows)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32)


@lru_cache(maxsize=64)
def cast(matrix: Tensor, to: torch.dtype | torch.device) -> Tensor:
    return matrix.to(to)


def forget_shared_matrices() -> None:
    """Free the Gaussian matrices that layers of one shape shared."""
    gaussian.cache_clear()
    drawn_columns.cache_clear()
    cast.cache_clear()


def computed_in(dy: Tensor) -> torch.dtype:
    """Return the dtype of test matrices for gradients like `dy`."""
    return torch.float32 if dy.dtype is torch.float16 else dy.dtype


def to_one_dtype(x: Tensor | OneHot, dy: Tensor) -> tuple[Tensor | OneHot, Tensor]:
    """Bring `x` to the dtype of `dy`; fp16 goes to fp32, where sums over tokens can't overflow."""
    if needs_blocks(*(rows for rows in (x, dy) if isinstance(rows, Tensor))):
        return x, dy  # products of these bring a block at a time to fp32
    dtype = computed_in(dy)
    return x if isinstance(x, OneHot) else x.to(dtype), dy.to(dtype)


def add_product(
    total: Tensor,  # (a, b), fp32
    left: Tensor | OneHot,  # (N, a)
    right: Tensor,  # (N, b)
    weight: float,
) -> None:
    """Add `weight * left^T right` to `total`, see [`add_transposed_product`]."""
    if isinstance(left, OneHot):
        left.add_rows(total, right, weight)
    else:
        add_transposed_product(total, left, right, weight)


def stack(tensors: Sequence[Tensor]) -> Tensor:  # (n, ...)
    """Stack tensors of one shape; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
