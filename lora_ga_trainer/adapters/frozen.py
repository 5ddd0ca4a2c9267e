"""Training `B` alone (arXiv 2402.16842): `A` keeps the values that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import AdaptedEmbedding
from .find import find_lora_layers
from .layer import AdaptedLayer


class Frozen(nn.Module):
    """
    `lora_A` whose weight is a constant of the forward pass, whatever `requires_grad` says.

    PEFT lets both factors train whenever it sets an adapter or ends `disable_adapter()`, and losses do that: TRL's DPO
    and GRPO compute their reference so.
    """


class FrozenLinear(Frozen, nn.Linear):
    """[`Frozen`] `lora_A` of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., r)
        return F.linear(x, self.weight.detach(), self.bias)


class _FrozenConv(Frozen):
    """[`Frozen`] `lora_A` of a convolution."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve: Any = super()._conv_forward  # type: ignore[misc]  # of the class of torch beside this one
        return convolve(x, weight.detach(), bias)


class FrozenConv1d(_FrozenConv, nn.Conv1d):
    """In one dimension."""


class FrozenConv2d(_FrozenConv, nn.Conv2d):
    """In two dimensions."""


class FrozenConv3d(_FrozenConv, nn.Conv3d):
    """In three dimensions."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FrozenLinear,
    nn.Conv1d: FrozenConv1d,
    nn.Conv2d: FrozenConv2d,
    nn.Conv3d: FrozenConv3d,
}


def train_both_or_B(model: nn.Module, train_A: bool, init: str) -> None:
    """
    Let `A` of the active adapter get no gradient, or get one again. Its start may be written either way.

    Args:
        model: before an engine wraps it and before an optimizer is made; with an adapter unless `train_A`.
        train_A: `False` freezes `A`. `True` undoes it, and leaves a model as it is in which nothing is frozen so.
        init: that the adapter starts with.

    Raises:
        `ValueError`: naming a layer that could not learn.
    """
    if train_A:
        for module in model.modules():
            if isinstance(module, Frozen):
                module.__class__ = type(module).__bases__[-1]
                module.requires_grad_(True)
        return
    layers = find_lora_layers(model)
    for layer in layers:
        if init == "none" and isinstance(layer, AdaptedEmbedding):
            raise ValueError(
                f"Layer {layer.name}: of an embedding PEFT starts A at 0, so with train_A=False it would never learn. "
                "Leave it out of target_modules, or use an init that writes A."
            )
    for layer in layers:
        layer.stored_A.requires_grad_(False)
        if not isinstance(layer, AdaptedEmbedding):  # whose A is a bare parameter
            lora_A: Any = layer.lora_A
            lora_A.__class__ = _FROZEN.get(type(lora_A), type(lora_A))


def require_still_A(layers: Sequence[AdaptedLayer]) -> None:
    """
    Refuse a gradient of `A`: the optimizer does not step it, but it would count in the clipping norm.

    Raises:
        `ValueError`: naming a layer.
    """
    for layer in layers:
        if layer.stored_A.grad is not None:
            raise ValueError(
                f"Layer {layer.name}: train_A=False, and its A has a gradient. Something let it train after the "
                "trainer was made, such as `model.set_adapter(...)`, which a loss with a reference adapter calls. "
                "Leave the layer out of target_modules, or set train_A=True."
            )
