"""
From a two-sided sketch of `G` to its strongest singular triplets, and how much of them the sketch holds. Pure maths.

The sketch is `Y = G T`, `Z = G^T L` with orthonormal `T (in, t)`, `L (out, t)`, and 16 Gaussian columns on each side
that the recovery does not see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


# Gaussian columns beside the bases in the second pass: held out of the recovery, they measure what it misses.
HELD_OUT = 16


class TopSVD(NamedTuple):
    """
    The strongest singular triplets of `G` and what they are worth.

    Args:
        U (out, k), S (k,), Vt (k, in): fp32, `S` descending.
        total: `||G||^2`, estimated where the estimator is a sketch.
        kept: energy that the k directions hold, relative to the best k; the smaller of the two sides, 1 if exact.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    total: float
    kept: float

    def share(self, r: int) -> float:
        """Return the share of `||G||^2` that the top r directions hold."""
        return min(self.S[:r].double().square().sum().item() / self.total, 1.0) if self.total > 0 else 0.0


def recover(
    T: Tensor,  # (in, t + 16): t orthonormal columns, then 16 Gaussian ones
    L: Tensor,  # (out, t + 16): the same on the other side
    Y: Tensor,  # (out, t + 16) = G T
    Z: Tensor,  # (in, t + 16) = G^T L
    k: int,
) -> TopSVD:
    """Recover the top `k` singular triplets of `G` from its second-pass sketches; all fp64."""
    scale = max(Y.abs().max().item(), Z.abs().max().item())
    if scale == 0:
        zero = torch.zeros(k, dtype=torch.float32, device=Y.device)
        return TopSVD(L[:, :k].float(), zero, T[:, :k].T.float(), total=0.0, kept=1.0)
    Y, Z = Y / scale, Z / scale
    t = T.shape[1] - HELD_OUT
    (T, w), (L, z) = T.split([t, HELD_OUT], dim=1), L.split([t, HELD_OUT], dim=1)
    (Y, Gw), (Z, Gz) = Y.split([t, HELD_OUT], dim=1), Z.split([t, HELD_OUT], dim=1)
    # One more half step of subspace iteration: Y spans more of U than L, Z more of V than T. Half the columns are
    # kept; the least squares below needs more equations than unknowns.
    m = max(k, t // 2)
    Q = torch.linalg.svd(Y, full_matrices=False).U[:, :m]  # (out, m)
    P = torch.linalg.svd(Z, full_matrices=False).U[:, :m]  # (in, m)
    C = _core(L.T @ Q, Z.T @ P, T.T @ P, Y.T @ Q)
    U_c, S, Vt_c = torch.linalg.svd(C)
    U, S, Vt = Q @ U_c[:, :k], S[:k], (P @ Vt_c[:k].T).T
    # ||U^T G||^2 = ||S||^2 + the part of U^T G outside V, measured on the held-out columns; the same for G V.
    held = S.square().sum()
    of_u = held + (U.T @ Gw - S[:, None] * (Vt @ w)).square().sum() / HELD_OUT
    of_v = held + (Vt @ Gz - S[:, None] * (U.T @ z)).square().sum() / HELD_OUT
    best = torch.maximum(of_u + of_v - held, torch.maximum(of_u, of_v))
    kept = (torch.minimum(of_u, of_v) / best).item()
    total = (_total(Y, Gw, T, w) + _total(Z, Gz, L, z)) / 2 * scale**2
    return TopSVD(U.float(), (S * scale).float(), Vt.float(), total=total.item(), kept=kept)


def _core(
    LQ: Tensor,  # (t, m) = L^T Q
    left: Tensor,  # (t, m) = L^T G P
    TP: Tensor,  # (t, m) = T^T P
    right: Tensor,  # (t, m) = T^T G^T Q
) -> Tensor:  # (m, m)
    """
    Find the `C` with `G ~ Q C P^T` that fits both sketches best.

    Minimising `||LQ C - left||^2 + ||TP C^T - right||^2` gives `LQ^T LQ C + C TP^T TP = LQ^T left + right^T TP`, a
    Sylvester equation with symmetric coefficients: two eigendecompositions solve it.
    """
    a, X = torch.linalg.eigh(LQ.T @ LQ)
    b, W = torch.linalg.eigh(TP.T @ TP)
    rhs = LQ.T @ left + right.T @ TP
    denominator = a.clamp(min=0)[:, None] + b.clamp(min=0)[None, :]
    denominator = denominator.clamp(min=1e-10 * denominator.max().item())
    return X @ ((X.T @ rhs @ W) / denominator) @ W.T


def _total(
    Y: Tensor,  # (out, t) = G T
    Gw: Tensor,  # (out, 16)
    T: Tensor,  # (in, t), orthonormal
    w: Tensor,  # (in, 16), Gaussian
) -> Tensor:  # ()
    """Estimate `||G||^2 = ||G T||^2 + ||G (I - T T^T)||^2`, the second term from the Gaussian columns."""
    return Y.square().sum() + (Gw - Y @ (T.T @ w)).square().sum() / HELD_OUT
