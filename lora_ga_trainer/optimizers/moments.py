"""Pure maths of LoRA-Pro's AdamW: from factors to the weight and back (arXiv 2407.18242, Algorithm 1)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..engines.parameters import RowShard
from ..maths.lora_pro import GramEigen, apply_correction, cross_products, solve_correction
from ..maths.rounding import round_to_bf16
from .batches import PairBatch, correct_batch, stored_factors


def equivalent_gradient(
    batch: PairBatch, eigen: GramEigen, rows: slice | None = None
) -> Tensor:  # (L, out or the number of `rows`, in)
    """Return `G~ = s (B dA + dB A) = P_B G + (I - P_B) G P_A` of the pairs' gradients."""
    factors = batch.A, batch.B, batch.gA, batch.gB
    correction = solve_correction(eigen, *cross_products(*factors), batch.s)
    # s (B (dA + X A) + (dB - B X) A) has no X left in it. Leaving it out spares rounding.
    dA, dB = apply_correction(correction._replace(X=torch.zeros_like(correction.X)), *factors)
    s = batch.s[:, None, None].to(dA.dtype)
    # B dA + dB A = [B, dB] [dA; A]: one product writes the large matrix once instead of twice.
    left = torch.cat([batch.B, dB], dim=2)
    return (left if rows is None else left[:, rows]) @ (s * torch.cat([dA, batch.A], dim=1))


def project_step(
    batch: PairBatch,
    eigen: GramEigen,
    U: Tensor,  # (L, out, in), or the rows of `shard`
    scale: Tensor,  # (L, 1, 1)
    weight_decay: float,
    shard: RowShard | None = None,
) -> tuple[Tensor, Tensor]:  # dA (L, r, in), dB (L, out, r)
    """Return the factors' step along the `s (B dA + dB A)` nearest to `scale U + weight_decay D`, D the net delta."""
    A, B, s = batch.A, batch.B, batch.s[:, None, None].to(U.dtype)
    # The nearest point is LoRA-Pro's correction once more, of the gradients that U would give: s B^T U and s U A^T.
    if shard is None:
        gA, gB = s * scale * (B.mT @ U), s * scale * (U @ A.mT)
    else:
        # Each process has some rows of U. They add up in B^T U and lie below each other in U A^T.
        gA, gB = s * scale * shard.sum(B[:, shard.mine].mT @ U), s * scale * shard.join(U @ A.mT)
    if weight_decay != 0:
        # D = s B A, in delta form s (B A - B0 A0), is `s stored_B stored_A`. Multiplied from the thin side it is never
        # formed: s B^T D = s^2 (B^T stored_B) stored_A, s D A^T = s^2 stored_B (stored_A A^T).
        stored_A, stored_B = stored_factors(batch)
        gA += weight_decay * s**2 * (B.mT @ stored_B @ stored_A)
        gB += weight_decay * s**2 * (stored_B @ (stored_A @ A.mT))
    return correct_batch(replace(batch, gA=gA, gB=gB), eigen)


def store_moment(
    kept: Tensor,  # (L, out, in)
    value: Tensor,  # (L, out, in), of another dtype or device; used up
    counts: list[float],  # steps of each pair
) -> None:
    """Write a moment back. To bf16 it is rounded up as often as it is far from the lower neighbour, not to nearest."""
    if kept.dtype == torch.bfloat16:
        # In int32 the product with a count above 53,020 would wrap, by a multiple of 2^16 that falls away again.
        steps = torch.tensor([int(count) for count in counts], dtype=torch.int32, device=value.device)
        value = round_to_bf16(value.float(), steps.view(-1, 1, 1))
    kept.copy_(value)
