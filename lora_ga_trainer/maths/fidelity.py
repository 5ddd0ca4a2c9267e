"""
How much of the best directions' energy the found ones hold, measured by columns that took no part in finding them.

For a fresh Gaussian column `w` the mean of `(u^T G w)^2` is `||G^T u||^2`, whatever `u` is, as long as `w` had no part
in it. With h columns its standard error is `sqrt(2 / h)` of it, which is too much. So only the part is measured
that the triplets `s_i u_i v_i^T` do not predict: `u^T G w - d s v^T w`. `d` is the factor that fits the prediction of
a group of directions best. It is far below 1 on a flat spectrum, where found singular values are too large.

What the *best* directions hold is nowhere seen. Two figures stand in for it:

* If what is not found were independent entries of variance `sigma^2`, beside which the found directions are as they
  are, the singular values of the sum would be known (Benaych-Georges, Nadakuditi, arXiv 1103.2221): see [`_in_noise`].
* If the found triplets miss exact ones by residuals `e_u`, `e_v` that the rest of `G` does not act on,
  `s^2 + e_u^2 + e_v^2` would be the square of the exact one. It does act on them, so they count for more: by
  measurement 1.5 / d times after one pass, twice after a second look.

After one pass the larger figure is taken, so that the share is rather told too small. Directions that all samples were
seen with, which is one step of a power iteration more, have residuals that are not independent of what is missing. The
first figure is then an upper limit, and the smaller of the two is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


# Gaussian columns beside the bases: held out of the recovery, they measure what it misses.
HELD_OUT = 16
# Singular values below this times the first hold 1e-8 of the energy: rounding, in fp32 sums and bf16 products alike.
NOISE = 1e-4


class Measured(NamedTuple):
    """
    Means over the held-out columns, for each found triplet, on the side of `u` (first row) and on that of `v`.

    Args:
        seen (2, k): `(u_i^T G w)^2` and `(v_i^T G^T z)^2`.
        predicted (2, k): the same of `p = s_i v_i^T w` and `s_i u_i^T z` in place of `u_i^T G w`, `v_i^T G^T z`.
        products (2, k): of the one with the other.
        beyond (2, k): of what was not predicted with the part of `p` that lies beyond the test columns.
        tail: energy of `G` outside the span of all that was found, for each entry of the matrix outside: `sigma^2`.
        shape: `(out, in)`.
        settled: whether the whole of `G` was seen with directions that were found before.
    """

    seen: Tensor
    predicted: Tensor
    products: Tensor
    beyond: Tensor
    tail: float
    shape: tuple[int, int]
    settled: bool

    def times(self, factor: float) -> Measured:
        """Return what would be measured of a `G` whose energy is `factor` times as large."""
        seen, predicted, products, beyond = (part * factor for part in self[:4])
        return Measured(seen, predicted, products, beyond, self.tail * factor, self.shape, self.settled)

    def kept(self, values: Tensor, low: int, high: int) -> float:
        """
        Return what directions `low` to `high` hold of the energy of the best ones of these ranks, of the worse side.

        Args:
            values (k,): the found singular values, descending.
        """
        count = len(values[low:high])
        energy = values[low:high].double().square().sum().item()
        if energy <= count * (NOISE * values[0].item()) ** 2:  # `G` has no such directions
            return 1.0
        seen, predicted, products, beyond = (part[:, low:high].sum(dim=1).tolist() for part in self[:4])
        # What all samples were tested with is known without error, so that only what lies beyond it is fitted.
        fit = 1 + sum(beyond) / (2 * energy) if self.settled else sum(products) / sum(predicted)
        fit = max(fit, 0.0)
        missed = [max(g - 2 * fit * gp + fit**2 * p, 0.0) for g, gp, p in zip(seen, products, predicted, strict=True)]
        held = [fit**2 * energy + part for part in missed]  # || U^T G ||^2, || G V ||^2
        weight = 2.0 if self.settled else 1.5 / min(max(fit, 0.1), 1.0)
        with_residuals = fit**2 * energy + weight * sum(missed)
        out_features, in_features = self.shape
        sides = ((held[0], in_features, out_features), (held[1], out_features, in_features))
        in_noise = sum(count * _in_noise(side / count, self.tail, *lengths) for side, *lengths in sides) / 2
        best = min(with_residuals, in_noise) if self.settled else max(with_residuals, in_noise)
        return min(min(held) / best, 1.0) if best > 0 else 1.0


def _in_noise(held: float, variance: float, own: int, other: int) -> float:
    """
    Return the square of the exact singular value beside a direction that holds `held`, the rest being noise.

    Args:
        held: `||G v||^2`, of which `variance * own` is noise.
        variance: of the entries of the noise.
        own: entries of `G v`.
        other: entries of `v`.
    """
    signal = held - variance * own
    if signal <= variance * (own * other) ** 0.5:  # not to be told from noise, whose largest value this is
        return variance * (own**0.5 + other**0.5) ** 2
    return held * (signal + variance * other) / signal


def measure(
    triplets: tuple[Tensor, Tensor, Tensor],  # U (n, out, t), S (n, t), V (n, in, t)
    of_v: tuple[Tensor, Tensor],  # w (n, in, 16), G w (n, out, 16)
    of_u: tuple[Tensor, Tensor],  # z (n, out, 16), G^T z (n, in, 16)
    tests: tuple[Tensor, Tensor],  # Omega (n, in, any), Psi (n, out, any)
    settled: Tensor,  # (n,), bool
    k: int,
) -> list[Measured]:
    """Measure the first `k` of the `t` triplets that were found of each `G`, see [`Measured`]."""
    U, S, V = triplets
    sides = []
    for mine, other, (columns, seen), test in ((U, V, of_v, tests[0]), (V, U, of_u, tests[1])):
        of_G = mine.mT @ seen  # (n, t, 16)
        outside = (seen - mine @ of_G).square().sum(dim=(-2, -1)) / HELD_OUT
        entries = max(mine.shape[-2] - mine.shape[-1], 1) * other.shape[-2]
        of_G, values, other = of_G[..., :k, :], S[..., :k, None], other[..., :k]
        said = values * (other.mT @ columns)
        beyond = torch.zeros_like(said)
        if settled.any():
            Q = torch.linalg.qr(test).Q
            beyond = values * (other.mT @ (columns - Q @ (Q.mT @ columns)))
        pairs = ((of_G, of_G), (said, said), (of_G, said), (of_G - said, beyond))
        sides.append(([(a * b).mean(dim=-1) for a, b in pairs], outside / entries))
    (first, first_tail), (second, second_tail) = sides
    # In fp64: squares of a gradient's own size may be beyond fp32, in which a sketch of bf16 sums is measured.
    means = [torch.stack(both, dim=-2).cpu().double() for both in zip(first, second, strict=True)]
    shape = U.shape[-2], V.shape[-2]
    tails = ((first_tail + second_tail) / 2).tolist()
    of_each = zip(zip(*means, strict=True), tails, settled.tolist(), strict=True)
    return [Measured(a, b, c, d, tail, shape, of_all) for (a, b, c, d), tail, of_all in of_each]
