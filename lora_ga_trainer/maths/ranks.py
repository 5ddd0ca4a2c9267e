"""
Registry of the rules that share a number of parameters out among layers, and how it is spent.

A rule says what each further rank of a layer is worth. Ranks are bought in the order of their worth until no further
one is affordable. A new rule is an entry of `RULES`, and a test of its law.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


# What a rule can ask for beside the gradient: that of two halves of the samples, the weights, and the dimensions of
# what goes in and out of each block.
NEEDS = ("halves", "weights", "dimensions")
# A direction counts as confirmed from this many standard errors on. Of pure noise 1 in 700 directions is.
SURE = 3.0
# GoRA keeps every rank between these multiples of the uniform one.
_GORA_RANGE = (0.5, 4.0)

Worths = list[list[float]]  # by layer: of its first rank, its second, ..., falling; none beyond the last is wanted


@dataclass(frozen=True)
class LayerEvidence:
    """
    What the probe saw of one layer.

    Args:
        shape: `(out, in)` of its weight.
        cost: of one rank, in what the budget counts.
        spectrum: singular values of `G`, falling; of a sketch the first ones.
        energy: `||G||^2`.
        confirmed: what the other half of the samples has along the singular vectors of this half, see [`confirm`];
            `None` unless the rule needs halves.
        errors: standard errors of `confirmed`.
        sensitivity: mean of `|W G|`, entry by entry; `None` unless the rule needs weights.
        growth: by how much the block that the layer is in raises the dimension of what passes through it, or 0; `None`
            unless the rule needs dimensions.
    """

    shape: tuple[int, int]
    cost: int
    spectrum: Tensor
    energy: float
    confirmed: Tensor | None = None
    errors: Tensor | None = None
    sensitivity: float | None = None
    growth: int | None = None

    @property
    def cap(self) -> int:
        """The largest rank that is of use."""
        return min(self.shape)

    @property
    def sure(self) -> int:
        """How many directions the other half confirms."""
        assert self.confirmed is not None
        assert self.errors is not None
        return int((self.confirmed > SURE * self.errors).sum())


@dataclass(frozen=True)
class RankRule:
    """
    One rule.

    Args:
        about: what it is, with its source; `LoRAGAConfig`'s help lists it.
        worths: tells what each rank of each layer is worth, from the evidence of all layers and the uniform rank that
            the budget would buy.
        needs: what it asks for beside the gradient, of [`NEEDS`].
    """

    about: str
    worths: Callable[[Sequence[LayerEvidence], float], Worths]
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        unknown = self.needs - set(NEEDS)
        if unknown:
            raise ValueError(f"RankRule.needs={sorted(unknown)} is unknown. Choose from {', '.join(NEEDS)}.")


def spend(worths: Worths, costs: Sequence[int], budget: int) -> list[int]:
    """
    Buy ranks in the order of their worth, of equal ones that of the earlier layer, until none is affordable.

    Where all costs are alike the sum of worths is the largest that the budget can buy.

    Args:
        worths: by layer, falling.
        costs: of one rank of each layer.
        budget: at most this much is spent.
    """
    ranks = [0] * len(costs)
    queue = [(-of_layer[0], layer) for layer, of_layer in enumerate(worths) if of_layer]
    heapq.heapify(queue)
    while queue:
        _, layer = heapq.heappop(queue)
        # What is too dear now stays so, since no money comes back. The layer leaves the queue.
        if costs[layer] > budget:
            continue
        budget -= costs[layer]
        ranks[layer] += 1
        if ranks[layer] < len(worths[layer]):
            heapq.heappush(queue, (-worths[layer][ranks[layer]], layer))
    return ranks


def proportional(weight: float, cap: int) -> list[float]:
    """
    Return worths with which ranks come out in proportion to weights (D'Hondt's method of sharing out seats).

    If the weights are whole and the budget buys just these ranks, they are the ranks. A weight of 0 wants none.
    """
    return [weight / rank for rank in range(1, cap + 1)] if weight > 0 else []


def confirm(
    first: Tensor,  # (out, in)
    second: Tensor,  # (out, in)
) -> tuple[Tensor, Tensor]:  # (k,), (k,), k = min(out, in)
    """Ask one half of the samples about the singular directions of the other, in fp64; see [`confirm_directions`]."""
    U, _, Vt = torch.linalg.svd(first.double(), full_matrices=False)
    return confirm_directions(U, Vt, second.double())


def confirm_directions(
    U: Tensor,  # (out, k)
    Vt: Tensor,  # (k, in)
    second: Tensor,  # (out, in)
) -> tuple[Tensor, Tensor]:  # (k,), (k,)
    """
    Ask one half of the samples, `G2`, about the singular directions `u_j`, `v_j` of the other, all of them.

    Returns:
        `u_j^T G2 v_j`, which noise of the second half makes neither larger nor smaller, and their standard errors.
        What `u_i^T G2 v_j` is where `i` and `j` differ is noise alone. The variance of an entry is taken to be that of
        its row times that of its column, over that of all. For directions of pure noise that is right. Those of a
        signal turn with the noise of the first half, which doubles the variance of their row and of their column. So
        their errors come out up to twice too large, and the rule is careful.
    """
    seen = U.mT @ second @ Vt.mT
    k = len(seen)
    squares = seen.square().fill_diagonal_(0)
    rows, columns = squares.sum(1) / max(k - 1, 1), squares.sum(0) / max(k - 1, 1)
    mean = squares.sum() / max(k * (k - 1), 1)
    errors = (rows * columns / torch.where(mean > 0, mean, 1.0)).sqrt()
    return seen.diagonal().clone(), errors


def _uniform(evidence: Sequence[LayerEvidence], uniform_rank: float) -> Worths:
    return [proportional(1.0, layer.cap) for layer in evidence]


def _energy(evidence: Sequence[LayerEvidence], uniform_rank: float) -> Worths:
    return [[value**2 / layer.cost for value in layer.spectrum.tolist() if value > 0] for layer in evidence]


def _gora(evidence: Sequence[LayerEvidence], uniform_rank: float) -> Worths:
    least, most = (int(share * uniform_rank) for share in _GORA_RANGE)
    total = sum(layer.sensitivity or 0.0 for layer in evidence) or 1.0
    worths = []
    for layer in evidence:
        cap = min(max(most, 1), layer.cap)
        wanted = proportional((layer.sensitivity or 0.0) / total / math.sqrt(sum(layer.shape)), cap)
        floor = min(least, cap)
        worths.append([math.inf] * floor + wanted[floor:])
    return worths


def _signal(evidence: Sequence[LayerEvidence], uniform_rank: float) -> Worths:
    worths = []
    for layer in evidence:
        assert layer.confirmed is not None
        assert layer.errors is not None
        sure = layer.confirmed > SURE * layer.errors
        # Without what noise adds to a square.
        energies = (layer.confirmed.square() - layer.errors.square())[sure].sort(descending=True).values / layer.cost
        # What is left when every confirmed direction has its rank goes round among the layers that have any.
        further = layer.cap - len(energies) if len(energies) else 0
        worths.append([*energies.tolist(), *(-float(turn) for turn in range(1, further + 1))])
    return worths


def _gelora(evidence: Sequence[LayerEvidence], uniform_rank: float) -> Worths:
    return [proportional((layer.growth or 0) + 1, layer.cap) for layer in evidence]


RULES = {
    "uniform": RankRule("the same rank everywhere", _uniform),
    "energy": RankRule("the most of the gradient's energy that the budget can hold", _energy),
    "gora": RankRule(
        "in proportion to the mean of |W G|, as the code of GoRA does, arXiv 2502.12171",
        _gora,
        needs=frozenset({"weights"}),
    ),
    "signal": RankRule(
        "directions of one half of the samples that the other half confirms, by their energy",
        _signal,
        needs=frozenset({"halves"}),
    ),
    "gelora": RankRule(
        "by how much each block raises the intrinsic dimension, plus 1, after GeLoRA, arXiv 2412.09250",
        _gelora,
        needs=frozenset({"dimensions"}),
    ),
}
DEFAULT_RULE = "uniform"
