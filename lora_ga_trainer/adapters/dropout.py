"""LoRA dropout (arXiv 2404.09610): columns of `A` and rows of `B` are dropped, and predictions averaged over masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layer import AdaptedLayer


def require_droppable(layers: Sequence[AdaptedLayer]) -> None:
    """
    Refuse layers on which a mask would not be one of columns of `A` and rows of `B`.

    Raises:
        `ValueError`: naming the layer.
    """
    for layer in layers:
        # Subclasses are layers of other kinds.
        if type(layer) is not AdaptedLayer or layer.uses_dora or layer.variant is not None:
            kind = f"{type(layer.base).__name__} with DoRA" if layer.uses_dora else type(layer.base).__name__
            raise ValueError(
                f"Layer {layer.name} ({kind}): factor_dropout is for LoRA on linear layers. Leave the layer out of "
                "target_modules, or set factor_dropout=0 and use lora_dropout of the LoraConfig."
            )


@contextmanager
def dropped_factors(
    layers: Sequence[AdaptedLayer], p: float, in_eval: bool = False, generator: torch.Generator | None = None
) -> Iterator[None]:
    """
    Mask the factors while the context is open.

    In each forward pass every column of `A` and every row of `B` is 0 with probability `p`, one mask for the whole
    batch, and the others count `1 / (1 - p)`. The masks of the two sides are independent, so the mean over masks of
    the change of the weight is `s B A`. (The paper's text could not be read here: that it scales is not verified.)
    Of an anchored adapter the whole of `s (B A - B0 A0)` is masked.

    Args:
        layers: whose factors are masked.
        p: probability, from 0 to below 1.
        in_eval: mask in eval mode, too.
        generator: where the masks come from, on the CPU; default: torch's own, on the device of the layer.
    """

    def mask(like: Tensor) -> Tensor:  # (..., features) -> (features,)
        where = like.device if generator is None else "cpu"
        kept = torch.rand(like.shape[-1], generator=generator, device=where) >= p
        return kept.to(like) / (1 - p)

    def of_A(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (args[0] * mask(args[0]), *args[1:]) if module.training or in_eval else None

    def of_B(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        return y * mask(y) if module.training or in_eval else None

    handles = []
    for layer in layers:
        handles += [layer.lora_A.register_forward_pre_hook(of_A), layer.lora_B.register_forward_hook(of_B)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_of(members: int, predict: Callable[[], tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    """
    Average the results of a Trainer's `prediction_step` over an ensemble.

    Args:
        members: how often `predict` is called; at least 1.
        predict: returns loss, logits (a tensor, or tuples and dictionaries of them) and labels.

    Returns:
        The mean of the losses, the mean of the logits in fp32, and the labels.
    """
    loss, logits, labels = predict()
    for number in range(2, members + 1):
        more_loss, more_logits, _ = predict()
        loss, logits = (_running_mean(*pair, number) for pair in ((loss, more_loss), (logits, more_logits)))
    return loss, logits, labels


def _running_mean(mean: Any, new: Any, number: int) -> Any:
    if mean is None:
        return None
    if isinstance(mean, Tensor):
        return torch.lerp(mean.float(), new.float(), 1 / number) if mean.is_floating_point() else mean
    if isinstance(mean, dict):
        return {name: _running_mean(value, new[name], number) for name, value in mean.items()}
    if isinstance(mean, (tuple, list)):
        return tuple(_running_mean(*pair, number) for pair in zip(mean, new, strict=True))
    return mean
