"""
Whitening of a gradient by the scales of its features: tensors in, tensors out.

An input feature that is large everywhere makes its column of `G` large, whatever the loss says about it. Whitening
divides that out: `D_P G D_Q` with `D_P = (P + l)^-w (out,)` and `D_Q = (Q + l)^-w (in,)`, both diagonal. `P` and `Q`
are the mean squares of the output-gradients and of the inputs, each divided by its own mean, so that the units of the
loss and of all inputs together do not count. `w = 0` is `G` itself.

At `w = 1/2` and `l = 0` each feature's own unit is gone, too: `x_j -> c x_j` with `W[:, j] -> W[:, j] / c` is the same
model. It multiplies column `j` of `G` by `c` and `Q_j` by `c^2`, and all of `D_P G D_Q` by one number. That changes no
direction.

Related: LoRA-DA (arXiv 2510.24561, the full second moment of the inputs), CG-LoRA (arXiv 2603.29824), ULoRA (arXiv
2607.26247, which searches the exponents).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .recovery import TopSVD, largest


# l, relative to the mean square: a feature that is (almost) never there is not divided by (almost) nothing.
DAMPING = 0.01
# The largest exponent: beyond it a rare feature counts for more than a common one.
MOST = 0.5

Whiteners: TypeAlias = tuple[Tensor, Tensor]  # D_P (out,), D_Q (in,)


def whiteners(
    output_moments: Tensor,  # (out,)
    input_moments: Tensor,  # (in,)
    w: float,
) -> Whiteners:  # fp32
    """Return `D_P` and `D_Q`; moments that are all zero, of a layer that saw nothing, give ones."""
    sides = [moments.cpu().double() for moments in (output_moments, input_moments)]
    left, right = ((side / side.mean() + DAMPING) ** -w if side.any() else torch.ones_like(side) for side in sides)
    return left.float(), right.float()


def whiten(
    G: Tensor,  # (out, in)
    by: Whiteners,
) -> Tensor:  # (out, in)
    """Return `D_P G D_Q`, in the dtype of `G`."""
    left, right = (side.to(G) for side in by)
    return left[:, None] * G * right


def scale_features(top: TopSVD, by: Whiteners) -> TopSVD:
    """
    Return the singular triplets of `D_P U S V^T D_Q`, as many as `top` has; its total is that of these alone.

    With the triplets of `G` this whitens it. With those of `[D_P G D_Q]_k` it maps them back, to the best step of rank
    k: among all matrices `X` of rank k, `-D_P [D_P G D_Q]_k D_Q` is the minimiser of
    `<G, X> + || D_P^-1 X D_Q^-1 ||^2 / 2`, a loss with a curvature of `D_P^-2` and `D_Q^-2`. (With
    `Y = D_P^-1 X D_Q^-1` the sum is `|| Y + D_P G D_Q ||^2 / 2` and a constant, so `Y` is minus the best
    approximation.)
    """
    left, right = (side.to(top.U) for side in by)
    # Divided by the largest number: squares of tiny or huge gradients would leave fp32.
    scale = largest(top.S[:, None])[..., 0]
    Q, R_U = torch.linalg.qr(left[:, None] * top.U)
    P, R_V = torch.linalg.qr(right[:, None] * top.Vt.mT)
    U, S, Vt = torch.linalg.svd(R_U @ (top.S / scale)[:, None].mul(R_V.mT))
    S = S * scale
    return TopSVD(Q @ U, S, Vt @ P.mT, S.cpu().double().square().sum().item())


def energy_left_out(
    top: TopSVD,  # of G, as a sketch has found it
    by: Whiteners,
    columns: tuple[Tensor, Tensor],  # w (in, h), Gaussian, and G w (out, h)
    rows: tuple[Tensor, Tensor],  # z (out, h), Gaussian, and G^T z (in, h)
) -> float:
    """
    Estimate `|| D_P R D_Q ||^2` for `R = G - U S V^T`, what the triplets leave out.

    `|| D_P R w ||^2 / h` and `|| D_Q R^T z ||^2 / h` estimate the energy with one side whitened, without bias. Their
    product over `|| R ||^2` is that with both if the energy of `R` is that of its row times that of its column.
    """
    (w, Gw), (z, Gz) = ((part.cpu().double() for part in side) for side in (columns, rows))
    U, S, Vt = (part.cpu().double() for part in top[:3])
    left, right = (side.to(U) for side in by)
    Rw, Rz = Gw - U @ (S[:, None] * (Vt @ w)), Gz - Vt.mT @ (S[:, None] * (U.mT @ z))
    total = (Rw.square().sum() + Rz.square().sum()) / 2
    whitened = (left[:, None] * Rw).square().sum() * (right[:, None] * Rz).square().sum()
    return (whitened / total / w.shape[1]).item() if total > 0 else 0.0
