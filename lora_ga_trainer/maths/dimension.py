"""Intrinsic dimension of a cloud of points."""

from __future__ import annotations

import torch
from torch import Tensor


_LEAST = 20
# The largest ratios are noise: the paper drops a tenth.
_KEPT = 0.9


def two_nn(
    points: Tensor,  # (n, D)
) -> float:
    """
    Estimate the dimension of the set that points lie on, from the distances of each to its two nearest neighbours.

    The ratio `mu` of the second to the first has `F(mu) = 1 - mu^-d` where the density hardly changes over that
    distance. `d` is the slope through 0 of `-log(1 - F)` on `log mu` (TwoNN, Facco et al., arXiv 1803.06992).

    Args:
        points: repeated ones count once.

    Returns:
        `d`, computed in fp64; its standard error is about `d / sqrt(n)`.

    Raises:
        `ValueError`: if fewer than 20 points differ.
    """
    points = torch.unique(points.double(), dim=0)
    count = len(points)
    if count < _LEAST:
        raise ValueError(f"An intrinsic dimension takes at least {_LEAST} points that differ, not {count}.")
    # The nearest of all is the point itself. Sums of squares would lose short distances to rounding.
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").topk(3, largest=False).values
    ratios = (distances[:, 2] / distances[:, 1]).log().sort().values
    kept = int(_KEPT * count)
    x, F = ratios[:kept], torch.arange(1, kept + 1, dtype=torch.float64) / count
    y = -torch.log1p(-F)
    return float((x @ y) / (x @ x))
