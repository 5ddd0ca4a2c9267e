"""
LoRA-Pro (arXiv 2407.18242): adapter gradients whose step on `W + s B A` is the nearest one to that of `G = dL/dW`.

The gradients `gA = s B^T G`, `gB = s G A^T` of plain LoRA move the weight along `s (B gA + gB A)`, which depends on
how the product is split between the factors. The corrected ones move it along the point of
`{s (B dA + dB A)}` that is nearest to `G`, which is `P_B G + (I - P_B) G P_A` with the orthogonal projections `P_B`
onto the columns of `B` and `P_A` onto the rows of `A`. They need `gA` and `gB` only, never `G`.

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


class GramEigen(NamedTuple):
    """`B^T B = P diag(l) P^T` and `A A^T = Q diag(m) Q^T`, and which eigenvalues count as zero."""

    P: Tensor  # (*batch, r, r), fp64
    l: Tensor  # (*batch, r)  # noqa: E741, the paper's letter
    l_inverse: Tensor  # (*batch, r), 0 where l counts as zero
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
) -> tuple[Tensor, Tensor]:  # dA (*batch, r, in), dB (*batch, out, r)
    """
    Correct the gradients of LoRA factors (Theorem 2.1), with the `X` of Theorem 2.3 that stays nearest to `gA`, `gB`.

    The inverses are pseudo-inverses: an eigenvalue of `B^T B` or `A A^T` below 1e-6 (fp64: 1e-12) times the largest
    one of its matrix counts as zero. So `B = 0`, rank-deficient and tiny factors need no special case: `G` is then
    projected on what the factors reach.

    The result is linear in `(gA, gB)`: clipping before and after by the same factor is the same.

    Args:
        A, B: the factors; fp64 is kept, anything less is computed in fp32 (the `r x r` part in fp64).
        gA, gB: `dL/dA`, `dL/dB` as autograd gives them.
        s: PEFT's `scaling` of the layer, not 0; one for all or one for each batch entry.

    Returns:
        `dA`, `dB` in the dtypes of `gA`, `gB`. Where a factor or gradient is not finite, neither are they.
    """
    dtype = torch.promote_types(torch.promote_types(A.dtype, gA.dtype), torch.float32)
    with torch.autocast(A.device.type, enabled=False):
        A, B, a, b = (tensor.to(dtype) for tensor in (A, B, gA, gB))
        scaling = torch.as_tensor(s, dtype=torch.float64, device=A.device)
        eigen = decompose(*gram_matrices(A, B), CUTOFF[dtype])
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
) -> GramEigen:
    """Decompose both Gram matrices with a single `eigh`. A matrix that is not finite gives NaN, not an exception."""
    grams = torch.stack([gram_B, gram_A])
    finite = grams.isfinite().all(dim=-1).all(dim=-1)  # (2, *batch)
    values, vectors = torch.linalg.eigh(grams.where(finite[..., None, None], 0.0))
    values = values.clamp(min=0.0)
    kept = values > cutoff * values[..., -1:]
    inverses = torch.where(kept, values, 1.0).reciprocal() * kept
    inverses = inverses.where(finite[..., None], torch.nan)
    return GramEigen(vectors[0], values[0], inverses[0], vectors[1], values[1], inverses[1])


def solve_correction(
    eigen: GramEigen,
    gA_At: Tensor,  # (*batch, r, r): gA A^T
    Bt_gB: Tensor,  # (*batch, r, r): B^T gB
    s: Tensor,  # () or (*batch)
) -> Correction:
    P, l, l_inverse, Q, m, m_inverse = eigen  # noqa: E741
    unscale = s[..., None, None].double() ** -2
    # left = (1/s^2) (B^T B)^-1, right = (A A^T)^-1 / s^2
    left = unscale * (P * l_inverse[..., None, :]) @ P.mT
    right = unscale * (Q * m_inverse[..., None, :]) @ Q.mT
    # inner = (1/s^2) (B^T B)^-1 B^T gB (A A^T)^-1: gB right - B inner = (1/s^2) [I - P_B] gB (A A^T)^-1
    inner = left @ Bt_gB @ right / unscale
    # B^T B X + X A A^T = C with C = -(1/s^2) (B^T B)^-1 gA A^T:  X = P [ (P^T C Q) / (l_i + m_j) ] Q^T
    # Where l_i counts as zero so does that row of P^T C Q, and any other divisor will do.
    divisor = torch.where(l_inverse > 0, l, 1.0)[..., :, None] + m[..., None, :]
    X = P @ ((P.mT @ (-left @ gA_At) @ Q) / divisor) @ Q.mT
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
