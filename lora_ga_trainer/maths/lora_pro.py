"""
LoRA-Pro (arXiv 2407.18242): adapter gradients whose step on `W + s B A` is the nearest one to that of `G = dL/dW`.

The gradients `gA = s B^T G`, `gB = s G A^T` of plain LoRA move the weight along `s (B gA + gB A)`, which depends on
how the product is split between the factors. The corrected ones move it along the point of
`{s (B dA + dB A)}` that is nearest to `G`, which is `P_B G + (I - P_B) G P_A` with the orthogonal projections `P_B`
onto the columns of `B` and `P_A` onto the rows of `A`. They need `gA` and `gB` only, never `G`.

`dA` goes as `1 / |B|`, so near `B = 0` the theorem is not well posed. Here `B` counts as no shorter than `A`: an
eigenvalue of `B^T B` below the smallest one of `A A^T` is inverted as if it were that. This makes `P_B` a soft
projection `H = sum_i min(1, l_i / floor) u_i u_i^T`, and the step `H G + (I - H) G P_A`: what `A` leaves undone `B`
does in the rows of `A`. At `B = 0` it is plain LoRA's `dA = 0`. Where `B` is as long as `A` it is the theorem's.

Everything that is inverted is `r x r`. These matrices are formed and decomposed in fp64 whatever the dtype of the
factors: a Gram matrix squares the condition number, and TF32 or bf16 sums would make its inverse noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


# An eigenvalue of a Gram matrix below this share of the largest one counts as zero: a direction in which the factor is
# 1e-3 (fp64: 1e-6) of its largest. Below it, the rounding of the gradient, divided by the eigenvalue, outweighs it.
CUTOFF = {torch.float32: 1e-6, torch.float64: 1e-12}

# An eigenvalue of `B^T B` counts as no less than this share of the smallest one of `A A^T`. Measured from `B = 0`
# (docs/lora_pro.md): the smaller it is, the more the first steps slow down an AdamW that is wrapped. Above 1 the
# paper's own AdamW gets slow. At 1 the starts of LoRA-GA and LoRA-One, whose factors are equally long, are not damped.
FLOOR = 1.0


class GramEigen(NamedTuple):
    """`B^T B = P diag(l) P^T` and `A A^T = Q diag(m) Q^T`, and what their inverses are taken to be."""

    P: Tensor  # (*batch, r, r), fp64
    l: Tensor  # (*batch, r)  # noqa: E741, the paper's letter
    l_inverse: Tensor  # (*batch, r), 1 / floor below the floor, 0 where l counts as zero
    missing: Tensor  # (*batch, r), 1 - l / floor below the floor, else 0
    Q: Tensor  # (*batch, r, r)
    m: Tensor  # (*batch, r)
    m_inverse: Tensor  # (*batch, r)


class Correction(NamedTuple):
    """The `r x r` matrices that make `dA = left gA + X A` and `dB = gB right - B (inner + X)`; fp64."""

    left: Tensor  # (*batch, r, r)
    right: Tensor  # (*batch, r, r)
    inner: Tensor  # (*batch, r, r)
    X: Tensor  # (*batch, r, r)


def correct_gradients(
    A: Tensor,  # (*batch, r, in)
    B: Tensor,  # (*batch, out, r)
    gA: Tensor,  # (*batch, r, in)
    gB: Tensor,  # (*batch, out, r)
    s: float | Tensor,  # () or (*batch)
    floor: float = FLOOR,
) -> tuple[Tensor, Tensor]:  # dA (*batch, r, in), dB (*batch, out, r)
    """
    Correct the gradients of LoRA factors (Theorem 2.1), with the `X` of Theorem 2.3 that stays nearest to `gA`, `gB`.

    Ours, not the paper's: an eigenvalue of `B^T B` below the smallest one of `A A^T`, `a^2`, is inverted as if it were
    `a^2`. So the result is continuous at `B = 0` and never longer than `2 + 1 / (s a)^2` times `(gA, gB)`. The slope
    `<gA, dA> + <gB, dB>` is at least the square of the step. Where no eigenvalue is that small it is the theorem's.

    The inverses are pseudo-inverses: an eigenvalue of `A A^T` (of `B^T B`, where `A = 0`) below 1e-6 (fp64: 1e-12)
    times the largest one of its matrix counts as zero. So rank-deficient factors need no special case: `G` is
    projected on what the factors reach.

    The result is linear in `(gA, gB)`: clipping before and after by the same factor is the same.

    Args:
        A, B: the factors; fp64 is kept, anything less is computed in fp32 (the `r x r` part in fp64).
        gA, gB: `dL/dA`, `dL/dB` as autograd gives them.
        s: PEFT's `scaling` of the layer, not 0; one for all or one for each batch entry.
        floor: the share of `a^2` that an eigenvalue of `B^T B` counts as at least. 0 is the theorem without damping.

    Returns:
        `dA`, `dB` in the dtypes of `gA`, `gB`. Where a factor or gradient is not finite, neither are they.
    """
    dtype = torch.promote_types(torch.promote_types(A.dtype, gA.dtype), torch.float32)
    with torch.autocast(A.device.type, enabled=False):
        A, B, a, b = (tensor.to(dtype) for tensor in (A, B, gA, gB))
        scaling = torch.as_tensor(s, dtype=torch.float64, device=A.device)
        eigen = decompose(*gram_matrices(A, B), CUTOFF[dtype], floor)
        dA, dB = apply_correction(solve_correction(eigen, *cross_products(A, B, a, b), scaling), A, B, a, b)
    return dA.to(gA.dtype), dB.to(gB.dtype)


def gram_matrices(
    A: Tensor,  # (*batch, r, in)
    B: Tensor,  # (*batch, out, r)
) -> tuple[Tensor, Tensor]:  # A A^T, B^T B (*batch, r, r), fp64
    A, B = A.double(), B.double()
    return A @ A.mT, B.mT @ B


def cross_products(
    A: Tensor,  # (*batch, r, in)
    B: Tensor,  # (*batch, out, r)
    gA: Tensor,  # (*batch, r, in)
    gB: Tensor,  # (*batch, out, r)
) -> tuple[Tensor, Tensor]:  # gA A^T, B^T gB (*batch, r, r), fp64
    """Both are `s B^T G A^T`, to the rounding of the gradients; each is used where its own factor is projected."""
    return gA.double() @ A.double().mT, B.double().mT @ gB.double()


def decompose(
    gram_A: Tensor,  # (*batch, r, r)
    gram_B: Tensor,  # (*batch, r, r)
    cutoff: float,
    floor: float = FLOOR,
) -> GramEigen:
    """Decompose both Gram matrices with a single `eigh`. A matrix that is not finite gives NaN, not an exception."""
    grams = torch.stack([gram_B, gram_A])
    finite = grams.isfinite().all(dim=-1).all(dim=-1)  # (2, *batch)
    values, vectors = torch.linalg.eigh(grams.where(finite[..., None, None], 0.0))
    values = values.clamp(min=0.0)
    kept = values > cutoff * values[..., -1:]
    inverses = torch.where(kept, values, 1.0).reciprocal() * kept
    inverses = inverses.where(finite[..., None], torch.nan)
    l_inverse, missing = _raise_to_floor(
        values[0], inverses[0], floor * values[1].where(kept[1], torch.inf).amin(dim=-1, keepdim=True)
    )
    return GramEigen(vectors[0], values[0], l_inverse, missing, vectors[1], values[1], inverses[1])


def _raise_to_floor(
    l: Tensor,  # (*batch, r)  # noqa: E741
    l_inverse: Tensor,  # (*batch, r)
    floor: Tensor,  # (*batch, 1), not finite where A = 0
) -> tuple[Tensor, Tensor]:  # l_inverse, missing (*batch, r)
    """Invert an eigenvalue of `B^T B` below the smallest one of `A A^T` as if it were that."""
    # With A = 0 there is nothing to measure B by.
    low = (l < floor) & floor.isfinite() & ~l_inverse.isnan()
    return torch.where(low, 1 / floor, l_inverse), torch.where(low, 1 - l / floor, 0.0)


def solve_correction(
    eigen: GramEigen,
    gA_At: Tensor,  # (*batch, r, r): gA A^T
    Bt_gB: Tensor,  # (*batch, r, r): B^T gB
    s: Tensor,  # () or (*batch)
) -> Correction:
    P, l, l_inverse, missing, Q, m, m_inverse = eigen  # noqa: E741
    unscale = s[..., None, None].double() ** -2
    # left = (1/s^2) (B^T B)^-1, right = (A A^T)^-1 / s^2
    left = unscale * (P * l_inverse[..., None, :]) @ P.mT
    right = unscale * (Q * m_inverse[..., None, :]) @ Q.mT
    # inner = (1/s^2) (B^T B)^-1 B^T gB (A A^T)^-1: gB right - B inner = (1/s^2) [I - P_B] gB (A A^T)^-1
    inner = left @ Bt_gB @ right / unscale
    # B^T B X + X A A^T = C with C = -(1/s^2) (B^T B)^-1 gA A^T:  X = P [ (P^T C Q) / (l_i + m_j) ] Q^T
    # Below the floor B^T (gB right - B inner), the X-free part of B^T dB, is not zero and belongs to C.
    C = P.mT @ (-left @ gA_At) @ Q + missing[..., :, None] * (P.mT @ Bt_gB @ right @ Q)
    divisor = l[..., :, None] + m[..., None, :]
    # Where both count as zero so does the entry of C, and any X will do.
    solvable = (l_inverse * (missing == 0) > 0)[..., :, None] | (m_inverse > 0)[..., None, :]
    X = P @ (C / divisor.where(solvable, 1.0)).where(solvable | C.isnan(), 0.0) @ Q.mT
    return Correction(left, right, inner, X)


def apply_correction(
    correction: Correction,
    A: Tensor,  # (*batch, r, in)
    B: Tensor,  # (*batch, out, r)
    gA: Tensor,  # (*batch, r, in)
    gB: Tensor,  # (*batch, out, r)
) -> tuple[Tensor, Tensor]:  # dA (*batch, r, in), dB (*batch, out, r), in the dtype of A
    left, right, inner, X = (matrix.to(A.dtype) for matrix in correction)
    # dA = (1/s^2) (B^T B)^-1 gA + X A
    dA = left @ gA + X @ A
    # dB = (1/s^2) [I - B (B^T B)^-1 B^T] gB (A A^T)^-1 - B X
    dB = gB @ right - B @ (inner + X)
    return dA, dB
