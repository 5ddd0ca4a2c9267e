"""Accumulators of a gradient that is only ever seen in parts: the interface, and the one that keeps all of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..engines.devices import to_fp32
from ..maths.recovery import TopSVD, top_svd
from .rows import OneHot


# What products can be computed in; the later one wins where processes differ.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


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
    # The seed depends on the shape, so that test matrices of two layers are independent.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rows)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32).to(device)


@lru_cache(maxsize=64)
def cast(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype)


def forget_shared_matrices() -> None:
    """Free the Gaussian matrices that layers of one shape shared."""
    gaussian.cache_clear()
    cast.cache_clear()


def to_one_dtype(x: Tensor | OneHot, dy: Tensor) -> tuple[Tensor | OneHot, Tensor]:
    """Bring `x` to the dtype of `dy`; fp16 goes to fp32, where sums over tokens can't overflow."""
    dtype = torch.float32 if dy.dtype is torch.float16 else dy.dtype
    return x if isinstance(x, OneHot) else x.to(dtype), dy.to(dtype)


def add_product(
    total: Tensor,  # (a, b), fp32
    left: Tensor | OneHot,  # (N, a)
    right: Tensor,  # (N, b)
    weight: float,
) -> None:
    """Add `weight * left^T right` to `total`: products in the dtype of the factors, the sum in fp32."""
    if isinstance(left, OneHot):
        left.add_rows(total, right, weight)
        return
    # One fused product where it adds in fp32 anyway. With bf16 factors `addmm_` would round the running sum to bf16.
    if left.dtype is total.dtype:
        total.addmm_(left.T, right, alpha=weight)
    else:
        total.add_(left.T @ right, alpha=weight)


def stack(tensors: Sequence[Tensor]) -> Tensor:  # (n, ...)
    """Stack tensors of one shape; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
