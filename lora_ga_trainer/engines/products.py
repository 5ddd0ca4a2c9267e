"""
Products of matrices of half precision: in their own dtype where the device can, through fp32 in blocks where it can't.

Without bf16 instructions torch multiplies bf16 matrices on a CPU up to several hundred times slower than fp32 ones.
There a product goes through fp32 copies of a block at a time, and its result is in fp32. Elsewhere nothing is done.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


# Bytes of the fp32 copies that are alive at once, unless one row of each factor takes more.
BLOCK_BYTES = 2**24


def lacks_instructions(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether torch has no fast product of this dtype on this device: a half dtype, on some CPUs."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    # torch's fast products of half precision are oneDNN's.
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return True
    name = "_is_mkldnn_bf16_supported" if dtype is torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or not supported()


def needs_blocks(*factors: Tensor) -> bool:
    """Tell whether a product of these factors goes through fp32."""
    return any(lacks_instructions(factor.dtype, factor.device) for factor in factors)


def product(
    left: Tensor,  # (n, a)
    right: Tensor,  # (a, b)
) -> Tensor:  # (n, b)
    """Return `left right`, in the dtype of the factors, or in fp32 where it [`needs_blocks`]."""
    if not needs_blocks(left, right):
        return left @ right
    (n, a), b = left.shape, right.shape[1]
    total = torch.zeros(n, b, dtype=torch.float32, device=left.device)
    # Half of the bytes for each factor.
    inner = max(1, BLOCK_BYTES // (8 * max(b, 1)))
    rows = max(1, BLOCK_BYTES // (8 * min(inner, max(a, 1))))
    for i in range(0, a, inner):
        part = right[i : i + inner].float()
        for j in range(0, n, rows):
            total[j : j + rows].addmm_(left[j : j + rows, i : i + inner].float(), part)
    return total


def fp32_blocks(
    *factors: Tensor,  # (n, any) each
) -> Iterator[tuple[Tensor, ...]]:
    """Yield some rows of all factors at a time, in fp32."""
    # A loop still holds the block before when the next one is made.
    rows = max(1, BLOCK_BYTES // (8 * max(1, sum(factor.shape[1] for factor in factors))))
    for parts in zip(*(factor.split(rows) for factor in factors), strict=True):
        yield tuple(part.float() for part in parts)


def add_transposed_product(
    total: Tensor,  # (a, b), fp32
    left: Tensor,  # (n, a)
    right: Tensor,  # (n, b)
    weight: float,
) -> None:
    """Add `weight * left^T right` to `total`: products in the dtype of the factors, the sum in fp32."""
    if needs_blocks(left, right):
        for of_left, of_right in fp32_blocks(left, right):
            total.addmm_(of_left.T, of_right, alpha=weight)
    # One fused product where it adds in fp32 anyway. With bf16 factors `addmm_` would round the running sum to bf16.
    elif left.dtype is total.dtype:
        total.addmm_(left.T, right, alpha=weight)
    else:
        total.add_(left.T @ right, alpha=weight)
