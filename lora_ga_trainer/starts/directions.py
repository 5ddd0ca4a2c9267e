"""
The directions that a start is made of: of the gradient or of the whitened one, of all samples or of one half.

A whole gradient `G` is whitened as it is. Of a sketched one all k directions that were found are whitened,
`D_P [G]_k D_Q`, and the strongest of these are taken. What was left out changes no singular value by more than
`max(D_P) max(D_Q) S[k]`, at most `l^(-2 w) S[k]` (Weyl). The overlap `||V_r^T X_r||^2 / r` with the r whitened
directions of the whole `G`, and the share of their energy that is held: mean and worst of q, o, gate and down of
layers 0, 15 and 29 of SmolLM2-135M (v is kept whole), r = 8, 64 rows of 64 tokens of Python's manual, fp32,
commit b4c8bf8, `python tests/benchmarks/whitened.py`:

| columns of the sketch               | w = 1/4: overlap, energy | w = 1/2: overlap, energy |
|-------------------------------------|--------------------------|--------------------------|
| 32                                  | .967 (.890), .997 (.993) | .939 (.863), .991 (.978) |
| **64**, the default with whitening  | .994 (.985), .999 (.997) | .981 (.933), .997 (.993) |
| none: the directions of `G`, with v | .821 (.730), .833 (.742) | .575 (.269), .566 (.301) |

The error is that of the sketch. `[G]_32` itself, cut from the whole `G`, holds 1.000 (.999) and .999 (.997) of the
energy. So whitening takes twice as many columns as a start without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.devices import to_fp64
from ..gradients.accumulator import ExactGradient
from ..gradients.estimate import GradientEstimate
from ..gradients.second_look import directions_of
from ..gradients.sketch import top_svds
from ..maths.directions import is_supported
from ..maths.fidelity import HELD_OUT
from ..maths.inits import INITS
from ..maths.ranks import confirm_directions
from ..maths.recovery import TopSVD
from ..maths.whitening import Whiteners, energy_left_out, scale_features, whiten, whiteners


@dataclass(frozen=True)
class Directions:
    """
    What was found of one weight.

    Args:
        top: the strongest singular triplets of `G`, with whitening of `D_P G D_Q`.
        found: the strongest triplets of `G` itself, by which the estimator judges what it has kept.
        whiteners: `D_P (out,)` and `D_Q (in,)`; `None` without whitening.
        supported: which of the triplets the other half of the samples has, `(k,)`; `None` where it was not asked.
    """

    top: TopSVD
    found: TopSVD
    whiteners: Whiteners | None = None
    supported: Tensor | None = None


def find_directions(
    config: LoRAGAConfig,
    layers: Sequence[AdaptedLayer],
    estimate: GradientEstimate,
    other_half: GradientEstimate | None = None,
) -> dict[str, Directions]:
    """
    Find the directions of every weight of `layers`, by its name.

    Args:
        config: `init`, `whitening` and `supported_only` are read.
        layers: those that this process computes.
        estimate: of the gradients; with `supported_only` of one half of the samples.
        other_half: of the other half.
    """
    weights = [(layer, name) for layer in layers for name in layer.matrices]
    if other_half is not None:
        return {name: _of_half(config, layer, name, estimate, other_half) for layer, name in weights}
    # Whitening takes all that a sketch has found, and a whole gradient as it is.
    wanted = {name: directions_of(config, layer) for layer, name in weights}
    if config.whitening > 0:
        kept = {name: estimate.estimators[name] for name in wanted}
        wanted = {name: accumulator.directions for name, accumulator in kept.items() if accumulator.sketched}
    tops = {name: top for name, top in estimate.tops.items() if len(top.S) == wanted.get(name)}
    tops |= top_svds(estimate.estimators, {name: count for name, count in wanted.items() if name not in tops})
    if config.whitening == 0:
        return {name: Directions(top, top) for name, top in tops.items()}
    return {name: _whitened(config, layer, estimate, name, tops.get(name)) for layer, name in weights}


def _whitened(
    config: LoRAGAConfig, layer: AdaptedLayer, estimate: GradientEstimate, name: str, found: TopSVD | None
) -> Directions:
    """Whiten a gradient, that of a sketch by all the triplets `found`."""
    by, count = _whiteners(config, layer, estimate), _count(config, layer)
    accumulator = estimate.estimators[name]
    if isinstance(accumulator, ExactGradient):
        whole = ExactGradient((0, 0))
        whole.G = whiten(accumulator.G, by)
        top = whole.svd(count)
        return Directions(top, top, by)
    assert found is not None
    state = accumulator.state()
    Omega, Psi, Y, Z = (state[key][:, -HELD_OUT:] for key in ("Omega", "Psi", "Y", "Z"))
    top = scale_features(found, by)
    total = top.total + energy_left_out(found, by, (Omega, Y), (Psi, Z))
    judged = _first(found, directions_of(config, layer))
    return Directions(_first(top._replace(total=total), count), judged, by)


def _of_half(
    config: LoRAGAConfig, layer: AdaptedLayer, name: str, half: GradientEstimate, other: GradientEstimate
) -> Directions:
    """
    Return the directions of one half, and which of them the other half has.

    Whitening is that of the first half on both. So the directions, and the norm in which they are looked at, know
    nothing of the second half, whose noise then makes a direction neither stronger nor weaker.
    """
    by = _whiteners(config, layer, half) if config.whitening > 0 else None
    first, second = (to_fp64(_whole(estimate, name)) for estimate in (half, other))
    # Divided by the largest number: squares of tiny gradients would vanish. Where all is zero nothing is supported.
    unit = max(first.abs().max().item(), second.abs().max().item()) or 1.0
    first, second = ((G if by is None else whiten(G, by)) / unit for G in (first, second))
    U, S, Vt = torch.linalg.svd(first, full_matrices=False)
    supported = is_supported(*confirm_directions(U, Vt, second))
    count = _count(config, layer)
    total = first.square().sum().item() * unit**2
    top = _first(TopSVD(U.float(), (S * unit).float(), Vt.float(), total), count)
    return Directions(top, top, by, supported[:count])


def _count(config: LoRAGAConfig, layer: AdaptedLayer) -> int:
    """Return how many triplets the init takes."""
    return min(INITS[config.init].pairs * layer.rank, *layer.shape)


def _first(top: TopSVD, count: int) -> TopSVD:
    return top._replace(U=top.U[:, :count], S=top.S[:count], Vt=top.Vt[:count])


def _whole(estimate: GradientEstimate, name: str) -> Tensor:  # (out, in), fp32
    found = estimate.estimators[name]
    assert isinstance(found, ExactGradient)
    return found.G


def _whiteners(config: LoRAGAConfig, layer: AdaptedLayer, estimate: GradientEstimate) -> Whiteners:
    moments = estimate.moments[layer.name]
    assert moments.output_second_moments is not None
    assert moments.input_second_moments is not None
    return whiteners(moments.output_second_moments, moments.input_second_moments, config.whitening)
