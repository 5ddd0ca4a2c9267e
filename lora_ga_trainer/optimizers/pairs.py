"""
The pairs that an optimizer corrects.

A *pair* is the two factors `A`, `B` of one adapted layer and adapter. An [`AdaptedLayer`] stands for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..adapters.find import find_lora_pairs
from ..adapters.layer import AdaptedLayer


def trained_pairs(model: nn.Module, param_groups: list[dict[str, Any]], who: str) -> list[AdaptedLayer]:
    """
    List the pairs whose factors both are in `param_groups`.

    Args:
        model: the model that holds them.
        param_groups: of an optimizer.
        who: the optimizer's name, for the message.

    Raises:
        `ValueError`: naming a factor whose partner is missing or in a group of other options, or a LoRA parameter for
            which no correction is defined; also if there is no pair at all.
    """
    owner = {id(p): index for index, group in enumerate(param_groups) for p in group["params"]}
    every, others = find_lora_pairs(model)
    for name, parameter in others.items():
        if id(parameter) in owner:
            raise ValueError(
                f"{who}: {name} of shape {tuple(parameter.shape)} is a LoRA parameter but not a factor of a linear "
                "layer (or of an nn.MultiheadAttention with init='lora_ga'), so it can't be corrected, and it is not "
                "a plain parameter. Leave its layer out of `target_modules` (`target_parameters`), or use an "
                "optimizer without correction."
            )
    pairs = []
    for pair in every:
        of_A, of_B = owner.get(id(pair.lora_A.weight)), owner.get(id(pair.lora_B.weight))
        if of_A is None and of_B is None:
            continue
        _require_together(pair, of_A, of_B, param_groups, who)
        pairs.append(pair)
    if not pairs:
        raise ValueError(
            f"{who}: the optimizer holds no pair of LoRA factors of the {type(model).__name__}. Pass the model whose "
            "`lora_A` and `lora_B` it trains, or use the optimizer without correction."
        )
    return pairs


def _require_together(
    pair: AdaptedLayer, of_A: int | None, of_B: int | None, param_groups: list[dict[str, Any]], who: str
) -> None:
    where = f"{who}: {pair.name}, adapter {pair.adapter!r}"
    if of_A is None or of_B is None:
        held, missing = ("lora_B", "lora_A") if of_A is None else ("lora_A", "lora_B")
        raise ValueError(
            f"{where}: the optimizer holds {held} but not {missing}. The two are corrected together: train both, or "
            "use an optimizer without correction."
        )
    if pair.s == 0:
        raise ValueError(f"{where}: its scaling is 0, so it has no gradient. Use a `lora_alpha` other than 0.")
    if of_A == of_B:
        return
    different = different_options(param_groups[of_A], param_groups[of_B])
    if different:
        raise ValueError(
            f"{where}: lora_A is in group {of_A} and lora_B in group {of_B}, with different {', '.join(different)}. "
            "A corrected step is one step of both: put them into groups of equal options (LoRA+ can't be combined)."
        )


def different_options(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Describe the options in which two param groups differ."""
    missing = object()
    keys = [key for key in first | second if key != "params"]
    return [
        f"{key} ({first.get(key)!r}, {second.get(key)!r})"
        for key in keys
        if not _equal(first.get(key, missing), second.get(key, missing))
    ]


def _equal(left: Any, right: Any) -> bool:
    return left is right or bool(left == right)


def pairs_with_gradients(pairs: Iterable[AdaptedLayer], who: str) -> list[AdaptedLayer]:
    """
    Leave out the pairs of which a factor has no gradient.

    Raises:
        `RuntimeError`: naming a sparse gradient.
    """
    ready = []
    for pair in pairs:
        gradients = {"lora_A": pair.lora_A.weight.grad, "lora_B": pair.lora_B.weight.grad}
        for side, gradient in gradients.items():
            if gradient is not None and gradient.layout != torch.strided:
                raise RuntimeError(
                    f"{who}: the gradient of {side} of {pair.name}, adapter {pair.adapter!r}, is sparse "
                    f"({gradient.layout}). LoRA-Pro needs dense gradients: leave that layer out of `target_modules`."
                )
        if all(gradient is not None for gradient in gradients.values()):
            ready.append(pair)
    return ready
