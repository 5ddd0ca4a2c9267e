"""Training `B` alone (arXiv 2402.16842): `A` keeps the values that it starts from."""

from __future__ import annotations

from torch import nn

from .embedding import AdaptedEmbedding
from .find import find_lora_layers


def freeze_A(model: nn.Module, init: str) -> None:
    """
    Let `A` of every layer of the active adapter get no gradient. Its start may still be written.

    Args:
        model: with an adapter, before an engine wraps it and before an optimizer is made.
        init: that the adapter starts with.

    Raises:
        `ValueError`: naming a layer that could not learn.
    """
    layers = find_lora_layers(model)
    for layer in layers:
        if init == "none" and isinstance(layer, AdaptedEmbedding):
            raise ValueError(
                f"Layer {layer.name}: of an embedding PEFT starts A at 0, so with train_A=False it would never learn. "
                "Leave it out of target_modules, or use an init that writes A."
            )
    for layer in layers:
        layer.stored_A.requires_grad_(False)


def require_still_A(model: nn.Module) -> None:
    """
    Refuse a gradient of `A`: the optimizer does not step it, but it would count in the clipping norm.

    Raises:
        `ValueError`: naming a layer.
    """
    for layer in find_lora_layers(model):
        if layer.stored_A.grad is not None:
            raise ValueError(
                f"Layer {layer.name}: train_A=False, and its A has a gradient. Something let it train after the "
                "trainer was made: `model.set_adapter(...)` does, also where a loss calls it (a reference adapter of "
                "DPO). Train without that, or with train_A=True."
            )
