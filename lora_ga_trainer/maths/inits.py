"""
Registry of the starts that `LoRAGAConfig.init` can name.

A new one is an entry of `INITS`, and a test of its law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .directions import turned_rows
from .factors import lora_ga_factors, lora_one_factors
from .recovery import TopSVD
from .whitening import Whiteners, scale_features


# What an init can ask for beside singular pairs: mean squares of the layer's input and output-gradient per feature, or
# the leading directions of their second moments.
NEEDS = ("second_moments", "covariance_directions")

Factors = tuple[Tensor, Tensor]  # B0 (out, r), A0 (r, in)


@dataclass(frozen=True)
class LayerGradient:
    """
    Everything that an init gets to see of one weight.

    Args:
        top: the top `min(pairs * r, out, in)` singular pairs of `G`, none of them zero altogether; with whitening
            those of `D_P G D_Q`.
        r: rank of the factors.
        s: PEFT's `scaling`.
        gamma, direction, scale: of the config, `gamma` with its default filled in.
        generator: of whatever is drawn, the same on every process.
        weight_singular_values: of `W`, descending; `None` unless the config's scale asks for them.
        moments: what `Init.needs` asks for; `None` where it asks for nothing.
        whiteners: `D_P (out,)` and `D_Q (in,)`, see `maths.whitening`; `None` without whitening.
        plain_rows: the rows of `A` that PEFT has drawn, for an init that keeps their lengths, else `None`.
        supported: which pairs of `top` the other half of the samples has; `None` where it was not asked.
    """

    top: TopSVD
    r: int
    s: float
    gamma: float
    direction: str
    scale: str
    generator: torch.Generator
    weight_singular_values: Tensor | None = None  # (min(out, in),)
    moments: Any = None
    whiteners: Whiteners | None = None
    plain_rows: Tensor | None = None  # (r, in), fp32
    supported: Tensor | None = None  # (k,), bool


@dataclass(frozen=True)
class Init:
    """
    One start.

    Args:
        about: what it is, with its source; `LoRAGAConfig`'s help lists it.
        default_gamma: where the config names none.
        anchored: whether the start is taken off again, so that training begins at the base: the adapter is then
            stored in delta form of rank 2r (see `lora_ga_trainer.adapters.anchor`). Otherwise `s B0 A0` is itself
            a step.
        pairs: singular pairs of `G` that it uses for each unit of rank, at most 2.
        factors: makes `B0 (out, r)`, `A0 (r, in)` from what the probe saw of a weight.
        needs: what it asks for beside singular pairs, of [`NEEDS`]; nothing else is gathered.
        reads: fields of the config that it reads, of `gamma`, `direction`, `scale`, `whitening` and `supported_only`.
            Any other one is refused where it is set.
        turns_rows: whether it needs the rows of `A` that PEFT has drawn.
    """

    about: str
    default_gamma: float
    anchored: bool
    pairs: int
    factors: Callable[[LayerGradient], Factors]
    needs: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset({"gamma"})
    turns_rows: bool = False

    def __post_init__(self) -> None:
        unknown = self.needs - set(NEEDS)
        if unknown:
            raise ValueError(f"Init.needs={sorted(unknown)} is unknown. Choose from {', '.join(NEEDS)}.")


def _lora_ga(gradient: LayerGradient) -> Factors:
    return lora_ga_factors(
        gradient.top.U,
        gradient.top.S,
        gradient.top.Vt,
        gradient.r,
        gamma=gradient.gamma,
        direction=gradient.direction,
        scale=gradient.scale,
        s=gradient.s,
        weight_singular_values=gradient.weight_singular_values,
        generator=gradient.generator,
    )


def _lora_one(gradient: LayerGradient) -> Factors:
    # The start is a step of the weight, so what was found in whitened coordinates is mapped back.
    top = gradient.top if gradient.whiteners is None else scale_features(gradient.top, gradient.whiteners)
    return lora_one_factors(top.U, top.S, top.Vt, gradient.r, gamma=gradient.gamma, generator=gradient.generator)


def _gradient_directions(gradient: LayerGradient) -> Factors:
    top, plain = gradient.top, gradient.plain_rows
    assert plain is not None
    return top.U.new_zeros(len(top.U), gradient.r), turned_rows(top.S, top.Vt, plain, gradient.supported)


INITS = {
    "lora_ga": Init(
        "LoRA-GA, arXiv 2407.05000",
        default_gamma=16.0,
        anchored=True,
        pairs=2,
        factors=_lora_ga,
        reads=frozenset({"gamma", "direction", "scale", "whitening"}),
    ),
    "lora_one": Init(
        "LoRA-One, arXiv 2502.01235",
        default_gamma=128.0,
        anchored=False,
        pairs=1,
        factors=_lora_one,
        reads=frozenset({"gamma", "whitening"}),
    ),
    "gradient_directions": Init(
        "B = 0 and the rows of A that PEFT draws, turned along the top right singular vectors of the gradient",
        default_gamma=1.0,
        anchored=False,
        pairs=1,
        factors=_gradient_directions,
        reads=frozenset({"whitening", "supported_only"}),
        turns_rows=True,
    ),
}
