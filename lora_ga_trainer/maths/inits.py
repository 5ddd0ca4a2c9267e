"""The starts that `LoRAGAConfig.init` can name. A new one is an entry of `INITS`, and a test of its law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .factors import lora_ga_factors, lora_one_factors
from .recovery import TopSVD


if TYPE_CHECKING:
    from ..config import LoRAGAConfig

# What a start can ask for beside singular pairs: mean squares of the layer's input and output-gradient per feature, or
# the leading directions of their second moments.
NEEDS = ("second_moments", "covariance_directions")

Factors = tuple[Tensor, Tensor]  # B0 (out, r), A0 (r, in)


@dataclass(frozen=True)
class Place:
    """
    What a start is told of the layer beside its gradient.

    Args:
        r: rank of the factors.
        s: PEFT's `scaling`.
        generator: of whatever is drawn, the same on every process.
        weight_singular_values: of `W`, descending; `None` unless the config's scale asks for them.
    """

    r: int
    s: float
    generator: torch.Generator
    weight_singular_values: Tensor | None = None  # (min(out, in),)


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
        needs: what it asks for beside these, of [`NEEDS`]; nothing else is gathered.
        factors: makes `B0 (out, r)`, `A0 (r, in)` from the top `min(2r, out, in)` pairs of `G`, none of them zero
            altogether.
    """

    about: str
    default_gamma: float
    anchored: bool
    pairs: int
    factors: Callable[[TopSVD, Place, LoRAGAConfig], Factors]
    needs: frozenset[str] = frozenset()


def _lora_ga(top: TopSVD, place: Place, config: LoRAGAConfig) -> Factors:
    return lora_ga_factors(
        top.U,
        top.S,
        top.Vt,
        place.r,
        gamma=config.gamma,
        direction=config.direction,
        scale=config.scale,
        s=place.s,
        weight_singular_values=place.weight_singular_values,
        generator=place.generator,
    )


def _lora_one(top: TopSVD, place: Place, config: LoRAGAConfig) -> Factors:
    return lora_one_factors(top.U, top.S, top.Vt, place.r, gamma=config.gamma, generator=place.generator)


INITS = {
    "lora_ga": Init("LoRA-GA, arXiv 2407.05000", default_gamma=16.0, anchored=True, pairs=2, factors=_lora_ga),
    "lora_one": Init("LoRA-One, arXiv 2502.01235", default_gamma=128.0, anchored=False, pairs=1, factors=_lora_one),
}
