"""
Recovery of the strongest singular triplets of `G` from two-sided sketches, and of how much was found. Pure maths.

Leading dimensions are a batch of matrices of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .fidelity import HELD_OUT, NOISE, Measured, measure


# Eigenvalues of a covariance below this times the first are rounding of fp32 sums.
_COVARIANCE_NOISE = 1e-6
# Gaussian columns are as long as they have entries; found directions have length 1, or nearly so in bf16.
_LONGEST_DIRECTION = 2.0


class TopSVD(NamedTuple):
    """
    The strongest singular triplets of `G` and what they are worth.

    Args:
        U (out, k), S (k,), Vt (k, in): fp32, `S` descending.
        total: `||G||^2`, estimated where the estimator is a sketch.
        measured: what held-out columns tell of a sketch; `None` where `G` is known.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    total: float
    measured: Measured | None = None

    def kept(self, low: int, high: int) -> float:
        """Return the energy of directions `low` to `high`, relative to the best of these ranks; 1 where exact."""
        return 1.0 if self.measured is None else self.measured.kept(self.S, low, high)

    def share(self, r: int) -> float:
        """Return the share of `||G||^2` that the top r directions hold."""
        return min(self.S[:r].double().square().sum().item() / self.total, 1.0) if self.total > 0 else 0.0


def merge(
    Omega: Tensor,  # (..., in, k)
    Psi: Tensor,  # (..., out, k)
    S: Tensor,  # (..., k)
    Y: Tensor,  # (..., out, k) = G Omega
    Z: Tensor,  # (..., in, k) = G^T Psi
    count: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # U (..., out, count), S (..., count), V (..., in, count)
    """
    Find the strongest singular triplets of `Psi diag(S) Omega^T + G`, of a `G` that only its sketches tell of.

    The bases are orthonormal. They begin with the spans of `Omega` and `Psi` and go on with those of `Z` and `Y`. In
    them the sketches are the blocks `a, b, c` of `G = [[a, b], [c, d]]`. No sketch has seen the block `d`. It is
    completed to `c a^+ b`, which it is if `G` has rank k (generalised Nystrom: Nakatsukasa, arXiv 2009.11392). The
    pseudo-inverse takes the stronger half of `a`, because the weaker half would divide noise by noise.

    Args:
        Omega, Psi: test matrices of full rank.
        S: what is known already, `Psi diag(S) Omega^T`.
        count: of triplets, at most 2k; default k.
    """
    k = Omega.shape[-1]
    count = k if count is None else count
    # Divided by the largest number: squares of tiny or huge gradients would leave fp32.
    scale = largest(Y, Z, S[..., None])
    Q, of_Y = torch.linalg.qr(torch.cat([Psi, Y / scale], dim=-1))  # (..., out, q), (..., q, 2k)
    P, of_Z = torch.linalg.qr(torch.cat([Omega, Z / scale], dim=-1))  # (..., in, p), (..., p, 2k)
    # The test matrices need not be orthonormal: their triangular factors take `Y`, `Z` to the orthonormal bases.
    R_Psi, R_Omega = of_Y[..., :k, :k], of_Z[..., :k, :k]
    right = torch.linalg.solve_triangular(R_Omega, of_Y[..., k:], upper=True, left=False)  # [a; c] = Q^T G P_k
    left = torch.linalg.solve_triangular(R_Psi, of_Z[..., k:], upper=True, left=False).mT  # [a, b] = Q_k^T G P
    # Both sketches have seen the block `a`; rounding apart they agree.
    a, b, c = (right[..., :k, :] + left[..., :, :k]) / 2, left[..., :, k:], right[..., k:, :]
    d = c @ _stronger_half_inverse(a) @ b
    # What was known lies in the spans of `Psi` and `Omega`, so all of it goes into the first block.
    known = R_Psi @ (S[..., None] / scale * R_Omega.mT)
    core = torch.cat([torch.cat([a + known, b], dim=-1), torch.cat([c, d], dim=-1)], dim=-2)
    U, S, Vt = torch.linalg.svd(core)
    return Q @ U[..., :count], S[..., :count] * scale[..., 0], P @ Vt[..., :count, :].mT


def _stronger_half_inverse(
    a: Tensor,  # (..., k, k)
) -> Tensor:  # (..., k, k)
    """Return the pseudo-inverse of the stronger half of `a`."""
    m = (a.shape[-1] + 1) // 2
    U, S, Vt = torch.linalg.svd(a)
    U, S, V = U[..., :m], S[..., :m], Vt[..., :m, :].mT
    signal = torch.gt(S, NOISE * S[..., :1])
    return V @ (torch.where(signal, 1 / torch.where(signal, S, 1.0), 0.0)[..., None] * U.mT)


def recover(
    Omega: Tensor,  # (n, in, t + 16): t test columns, then 16 Gaussian ones
    Psi: Tensor,  # (n, out, t + 16): the same on the other side
    S: Tensor,  # (n, t)
    Y: Tensor,  # (n, out, t + 16): G Omega of what `S` does not hold; the last 16 of all
    Z: Tensor,  # (n, in, t + 16): G^T Psi in the same way
    k: int,
) -> list[TopSVD]:
    """Recover the top `k` singular triplets of each `Psi diag(S) Omega^T + G`, see [`merge`]; all fp64, or fp32."""
    t = Omega.shape[-1] - HELD_OUT
    (Omega, w), (Psi, z) = Omega.split([t, HELD_OUT], dim=-1), Psi.split([t, HELD_OUT], dim=-1)
    (Y, Gw), (Z, Gz) = Y.split([t, HELD_OUT], dim=-1), Z.split([t, HELD_OUT], dim=-1)
    # Only where all samples were seen with directions that were found before, nothing is known beside the products.
    settled = torch.logical_and(
        torch.logical_not(S.any(dim=-1)), Omega.square().sum(dim=-2).mean(dim=-1) < _LONGEST_DIRECTION
    )
    U, S, V = merge(Omega, Psi, S, Y, Z)
    scale = largest(S[..., None])
    S, Gw, Gz = S / scale[..., 0], Gw / scale, Gz / scale
    S, order = _without_overshoot(S, (U.mT @ Gw, V.mT @ w), (V.mT @ Gz, U.mT @ z)).sort(descending=True, stable=True)
    # A value that shrank may now rank lower.
    U, V = (basis.take_along_dim(order[..., None, :], dim=-1) for basis in (U, V))
    # || M w ||^2 / 16 estimates || M ||^2.
    energy = lambda M: M.square().sum(dim=(-2, -1)) / HELD_OUT
    missed = energy(Gw - U @ (S[..., None] * (V.mT @ w))) + energy(Gz - V @ (S[..., None] * (U.mT @ z)))
    units = scale[..., 0, 0].tolist()  # their squares may be beyond fp32
    total = [
        energy * unit**2 for energy, unit in zip((S.square().sum(dim=-1) + missed / 2).tolist(), units, strict=True)
    ]
    measured = measure((U, S, V), (w, Gw), (z, Gz), (Omega, Psi), settled, k)
    measured = [part.times(unit**2) for part, unit in zip(measured, units, strict=True)]
    return _of_each(U[..., :k], S[..., :k] * scale[..., 0], V[..., :k].mT, total, measured)


def _without_overshoot(
    S: Tensor,  # (..., t)
    *seen: tuple[Tensor, Tensor],  # (..., t, 16) each: what a fresh column gave, and what `S` multiplies to tell it
) -> Tensor:  # (..., t)
    """
    Shrink singular values that the held-out columns contradict to their least-squares fit.

    Where the spectrum is flat and longer than a sketch is wide, `c a^+ b` divides small numbers by small ones and can
    come out far too large. A value counts as contradicted where the fit is below half of it. Rounding does not reach
    that far, and chance in the columns hardly ever does.
    """
    products = sum(((of_G * of_S).sum(dim=-1) for of_G, of_S in seen), start=torch.zeros_like(S))
    fitted = products / sum((of_S.square().sum(dim=-1) for _, of_S in seen), start=torch.zeros_like(S))
    return torch.where(fitted < S / 2, torch.maximum(fitted, NOISE * S), S)


def leading_directions(
    Omega: Tensor,  # (n, k), of full rank
    Y: Tensor,  # (n, k) = M Omega
) -> tuple[Tensor, Tensor]:  # (n, k), (k,)
    """
    Find the leading eigenvectors and eigenvalues of a covariance `M (n, n)` that only its sketch tells of, in fp64.

    The Nystrom approximation `Y (Omega^T Y)^+ Y^T` (Tropp, Yurtsever, Udell, Cevher, arXiv 1706.05736, section 2),
    whose eigenvalues never exceed those of `M`; it is `M` if that has rank k or less.

    Returns:
        Orthonormal columns, and eigenvalues in descending order; those of directions that `M` does not have are 0.
    """
    scale = largest(Y)
    Q, R = torch.linalg.qr(Omega)
    MQ = torch.linalg.solve_triangular(R, Y / scale, upper=True, left=False)
    values, vectors = torch.linalg.eigh((Q.mT @ MQ + MQ.mT @ Q) / 2)
    # Y (Omega^T Y)^+ Y^T = F F^T. Small eigenvalues are left out: F divides by their roots, and they are rounding.
    signal = torch.gt(values, _COVARIANCE_NOISE * values[-1])
    roots = torch.where(signal, torch.where(signal, values, 1.0).rsqrt(), 0.0)
    U, S, _ = torch.linalg.svd(MQ @ (vectors * roots), full_matrices=False)
    return U, S.square() * scale[0]


def top_svd(
    G: Tensor,  # (n, out, in)
    k: int,
    start: Tensor,  # (in, c), Gaussian, c > k
) -> list[TopSVD]:
    """
    Compute the top `k` singular triplets of each `G`, known whole, in its dtype.

    Where `start` has fewer columns than `G`, by subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061,
    algorithm 4.4), with no SVD larger than c.
    """
    total = torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float64).square()
    scale = largest(G)
    # Not every device's factorisations look after squares that overflow or vanish. A copy is made where they could.
    safe = torch.logical_and(scale > 1e-15, scale < 1e15)
    scale = torch.where(safe, 1.0, scale)
    if not safe.all():
        G = G / scale
    if start.shape[1] < min(G.shape[-2:]):
        Q = torch.linalg.qr(G @ start).Q
        # Orthonormal after every product: powers of `G` alone would keep nothing but the first direction.
        for _ in range(6):
            Q = torch.linalg.qr(G @ torch.linalg.qr(G.mT @ Q).Q).Q
        U, S, Vt = torch.linalg.svd(Q.mT @ G, full_matrices=False)
        U = Q @ U
    else:
        U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    return _of_each(U[..., :k], S[..., :k] * scale[..., 0], Vt[..., :k, :], total.tolist(), [None] * len(total))


def _of_each(
    U: Tensor, S: Tensor, Vt: Tensor, total: Sequence[float], measured: Sequence[Measured | None]
) -> list[TopSVD]:
    """Take the results of a stack apart."""
    return [TopSVD(*part) for part in zip(U.float(), S.float(), Vt.float(), total, measured, strict=True)]


def largest(
    *tensors: Tensor,  # (..., any, any)
) -> Tensor:  # (..., 1, 1)
    """Return the largest magnitude of some matrices; 1 where all are zero."""
    scale = torch.stack([tensor.abs().amax(dim=(-2, -1), keepdim=True) for tensor in tensors]).amax(dim=0)
    return torch.where(scale > 0, scale, torch.ones_like(scale))
