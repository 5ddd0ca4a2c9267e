"""Products `B A` of thin factors: singular values, shares and best approximations, without the product itself."""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(
    B: Tensor,  # (out, k)
    A: Tensor,  # (k, in)
) -> tuple[Tensor, Tensor, Tensor]:  # U (out, m), S (m,), Vt (m, in)
    """
    Compute the singular value decomposition of `B A` from QR decompositions of the factors.

    Exact but for the rounding of the dtype of the factors: `B A = Q_b (R_b R_a^T) Q_a^T`, and the core has k rows at
    most. No matrix is larger than the factors. `S` is descending, and `m = min(k, out, in)`.
    """
    Q_b, R_b = torch.linalg.qr(B)
    Q_a, R_a = torch.linalg.qr(A.T)
    U, S, Vt = torch.linalg.svd(R_b @ R_a.T, full_matrices=False)
    return Q_b @ U, S, (Q_a @ Vt.T).T


def truncate_product(
    B: Tensor,  # (out, k)
    A: Tensor,  # (k, in)
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (out, rank), (rank, in), (m,)
    """
    Replace `B A` by its best approximation of a rank (Eckart-Young).

    Returns:
        The new `B` and `A`, balanced: both carry the root of the singular values. Where the product has fewer than
        `rank` directions they end in zeros. Then all singular values of the old product; what is lost has the energy
        of those behind `rank`.
    """
    U, S, Vt = product_svd(B, A)
    root = S[:rank].sqrt()
    short = rank - root.shape[0]
    kept_B, kept_A = U[:, :rank] * root, root[:, None] * Vt[:rank]
    pad = torch.nn.functional.pad
    return (pad(kept_B, (0, short)), pad(kept_A, (0, 0, 0, short)), S) if short > 0 else (kept_B, kept_A, S)


def share_of_outputs(
    B: Tensor,  # (out, k)
    A: Tensor,  # (k, in)
    U: Tensor,  # (out, m), orthonormal columns
) -> float:
    """Return `||U^T B A||^2 / ||B A||^2`, the share of a change's energy whose outputs lie in the span of `U`."""
    R = torch.linalg.qr(A.T, mode="r").R  # ||X A|| = ||X R^T||
    whole = (torch.linalg.qr(B, mode="r").R @ R.T).square().sum().item()
    return min((U.T @ B @ R.T).square().sum().item() / whole, 1.0) if whole > 0 else 0.0


def share_of_inputs(
    B: Tensor,  # (out, k)
    A: Tensor,  # (k, in)
    V: Tensor,  # (in, m), orthonormal columns
) -> float:
    """Return `||B A V||^2 / ||B A||^2`, the share of a change's energy that is about inputs in the span of `V`."""
    return share_of_outputs(A.T, B.T, V)


def span_of(
    columns: Tensor,  # (n, k)
    noise: float = 1e-6,
) -> Tensor:  # (n, m), m <= k
    """Return orthonormal columns of the same span; directions below `noise` times the strongest one are left out."""
    U, S, _ = torch.linalg.svd(columns, full_matrices=False)
    return U[:, torch.logical_and(noise * S[:1] < S, S > 0)]


def stable_rank(
    S: Tensor,  # (m,), descending
) -> float:
    """Return `sum S^2 / max S^2`; 0 for a matrix of zeros."""
    return (S.square().sum() / S[0].square()).item() if S.numel() and S[0] > 0 else 0.0


def effective_rank(
    S: Tensor,  # (m,), descending
) -> float:
    """Return `exp(-sum p log p)` with `p = S / sum S` (Roy and Vetterli, 2007); 0 for a matrix of zeros."""
    if not S.numel() or S[0] <= 0:
        return 0.0
    return torch.special.entr(S / S.sum()).sum().exp().item()
