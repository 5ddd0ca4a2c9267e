"""
Intruder dimensions of a changed weight: strong directions of `M = W + B A` that `W` does not have. Pure maths.

Left singular vector `u_j` of `M`, j <= k, is an intruder if `max_i |u_j . u0_i| < eps` over all left singular vectors
`u0_i` of `W` (arXiv 2410.21228). `s` of the adapter is in the factors here.

The maximum goes over every direction of `W`, so a direction can be *cleared* from a few of them, but is only *proved*
an intruder by all. Hence two ways:

* `screen` finds the strongest directions of `W` and of `M` by subspace iteration; `M` is never formed. It clears a
  layer if every `u_j` has a partner that is close enough by a margin larger than the error of both vectors. That error
  is bounded by Wedin's theorem: an approximate pair with `||M v - s u|| = rho` (the other residual is zero by
  construction) is turned by at most `sqrt(2) rho / gap` against the true one, `gap` the distance of `s` from the other
  singular values. The gap is that among the values found. They are the largest ones with probability 1, as the start
  is Gaussian.
* `decompose` takes eigenvectors of `W W^T` and `M M^T` in fp64 (of `W^T W` where `out > in`). The eigenvalues are
  squares, so directions below about 1e-8 of the strongest one can't be told from rounding. Those of `W` below 1e-7
  count as directions that it does not have: a thin SVD fills them in as it likes.

Where singular values of `W` or `M` coincide their vectors are not unique, and no method has the one right answer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


_ROUNDS, _CHECKED = 30, 5  # rounds of subspace iteration, and after how many the bounds are looked at
_LEAST = 1e-7  # of the strongest singular value: weaker directions are rounding
_SPAN_ERROR = 1e-2  # sine of the angle that the span of the top directions of `W` may be off


class Comparison(NamedTuple):
    """
    The strongest directions of a changed weight beside those of the weight.

    Args:
        U (out, k), S (k,), Vt (k, in): the top singular triplets of `M`, `S` descending.
        similarity (k,): `max_i |u_j . u0_i|`; where it is at least `eps` and the layer was only screened, over the
            strongest directions of `W`.
        base_U (out, k), base_V (in, k): the top singular vectors of `W`.
        screened: whether the directions were cleared without decomposing `W`.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor
    similarity: Tensor
    base_U: Tensor
    base_V: Tensor
    screened: bool


def compare_directions(
    W: Tensor,  # (out, in)
    B: Tensor,  # (out, r)
    A: Tensor,  # (r, in)
    k: int,
    eps: float,
) -> Comparison:
    """
    Compare the top `k` left singular vectors of `W + B A` with those of `W`.

    Args:
        W: of any floating dtype.
        B, A: fp64, with the adapter's `s` in them, on the device of `W`.
        k: directions that are looked at; fewer where the weight has fewer.
        eps: below which similarity a direction is an intruder.
    """
    found = screen(W, B, A, k, eps)
    return decompose(W, B, A, k) if found is None else found


def screen(W: Tensor, B: Tensor, A: Tensor, k: int, eps: float) -> Comparison | None:
    """Clear all `k` directions by subspace iteration in fp32; `None` where one of them can't be cleared."""
    W, B, A = W.float(), B.float(), A.float()
    columns = 4 * k + 8
    if 2 * columns > min(W.shape):
        return None  # the whole of it is cheap
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(W.shape[1], columns, generator=generator).to(W.device)
    zero = B.new_zeros(B.shape[0], 0), A.new_zeros(0, A.shape[1])
    of_base = of_changed = start
    for _ in range(_ROUNDS // _CHECKED):
        U0, S0, V0t, of_base = _iterate(W, *zero, of_base)
        U, S, Vt, of_changed = _iterate(W, B, A, of_changed)
        turned0, span = _errors(W, *zero, U0, S0, V0t, 2 * k, k)
        turned, _ = _errors(W, B, A, U, S, Vt, k, k)
        near = (U[:, :k].T @ U0[:, : 2 * k]).abs()  # (k, 2k)
        sure = near - turned[:, None] - turned0[None]
        if bool((sure.amax(dim=1) >= eps).all()) and span < _SPAN_ERROR:
            return Comparison(
                U[:, :k].double(), S[:k].double(), Vt[:k].double(), near.amax(dim=1).double(),
                U0[:, :k].double(), V0t[:k].T.double(), True,
            )  # fmt: skip
    return None


def _iterate(W: Tensor, B: Tensor, A: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do some rounds of subspace iteration with `W + B A`, and return its Ritz triplets and the right span."""
    for _ in range(_CHECKED):
        Q = torch.linalg.qr(W @ V + B @ (A @ V)).Q
        # Orthonormal after every product: powers alone would keep nothing but the first direction.
        V = torch.linalg.qr(W.T @ Q + A.T @ (B.T @ Q)).Q
    Q = torch.linalg.qr(W @ V + B @ (A @ V)).Q
    U, S, Vt = torch.linalg.svd(Q.T @ W + (Q.T @ B) @ A, full_matrices=False)
    return Q @ U, S, Vt, Vt.T


def _errors(
    W: Tensor, B: Tensor, A: Tensor, U: Tensor, S: Tensor, Vt: Tensor, m: int, k: int
) -> tuple[Tensor, float]:  # (m,), and of the span of the first k
    """Bound the sines of the angles of m Ritz vectors with the singular vectors, and that of the first k's span."""
    V = Vt.T
    residual = W @ V + B @ (A @ V) - U * S
    distance = (S[:, None] - S[None]).abs()
    distance.fill_diagonal_(math.inf)
    gap = distance.amin(dim=1)[:m].clamp(min=1e-30)
    turned = math.sqrt(2) * torch.linalg.vector_norm(residual[:, :m], dim=0) / gap
    of_span = torch.linalg.vector_norm(residual[:, :k]) / (S[k - 1] - S[k]).clamp(min=1e-30)
    return turned, of_span.item()


def decompose(W: Tensor, B: Tensor, A: Tensor, k: int) -> Comparison:
    """Compare all directions, from eigenvectors in fp64; `W + B A` is formed, one more copy of the weight."""
    W = W.double()
    k = min(k, *W.shape)
    U0, S0 = _left_vectors(W)
    base_U = U0[:, :k]
    base_V = W.T @ base_U / S0[:k]
    M = W + B @ A
    U, S = _left_vectors(M)
    U, S = U[:, :k], S[:k]
    Vt = (M.T @ U / S).T
    # A weight of zeros has no directions, so that all of the change is new.
    similarity = (U.T @ U0).abs().amax(dim=1) if U0.shape[1] else torch.zeros_like(S)
    return Comparison(U, S, Vt, similarity, base_U, base_V, False)


def _left_vectors(M: Tensor) -> tuple[Tensor, Tensor]:  # (out, m), (m,)
    """Return the left singular vectors and the singular values that are no rounding, the strongest first."""
    wide = M.shape[0] <= M.shape[1]
    values, vectors = torch.linalg.eigh(M @ M.T if wide else M.T @ M)
    S = values.flip(0).clamp(min=0).sqrt()
    kept = int((_LEAST * S[0] < S).sum())
    S, vectors = S[:kept], vectors.flip(1)[:, :kept]
    return (vectors if wide else M @ vectors / S), S
