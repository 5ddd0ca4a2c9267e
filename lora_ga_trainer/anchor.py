"""
Anchored adapters: a LoRA-GA start that never touches the base.

LoRA-GA trains `(B, A)` from `(B0, A0)` on the base `W - s B0 A0`. The net change of `W` is `s (B A - B0 A0)`; it is
kept here as an ordinary LoRA adapter of rank 2r in *delta form*

    lora_A.weight = [A; A - A0]  (2r, in)      lora_B.weight = [B - B0, B0]  (out, 2r)

whose plain product is `(B - B0) A + B0 (A - A0) = B A - B0 A0`: exactly zero at the start, `[A0; 0]` and `[0, B0]`,
and free of cancellation later. The halves of `lora_A` are *tied*: both receive the gradient of `A`, the sum of their
own, so that an elementwise optimizer moves them in lockstep. The `B0` half of `lora_B` receives none.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from .fingerprint import fingerprint_base
from .layers import AdaptedLayer, active_adapter, find_adapted_layers, require_peft_model
from .record import attach_record, read_record


logger = logging.getLogger(__name__)


class _TieHalves(torch.autograd.Function):
    """The identity on `[A; A - A0]`; both halves receive `dL/dA`, the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:  # (2r, in)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # (2r, in)
        upper, lower = grad.chunk(2, dim=0)
        both = upper + lower
        return torch.cat([both, both])


class _FreezeSecondHalf(torch.autograd.Function):
    """The identity on `[B - B0, B0]`; `B0` receives a zero gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:  # (out, 2r)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # (out, 2r)
        live, _ = grad.chunk(2, dim=1)
        return torch.cat([live, torch.zeros_like(live)], dim=1)


class AnchoredA(nn.Linear):
    """`lora_A` in delta form: an `nn.Linear` of weight `[A; A - A0] (2r, in)` with tied halves."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., 2r)
        return F.linear(x, _TieHalves.apply(self.weight), self.bias)


class AnchoredB(nn.Linear):
    """`lora_B` in delta form: an `nn.Linear` of weight `[B - B0, B0] (out, 2r)` whose second half is frozen."""

    def forward(self, x: Tensor) -> Tensor:  # (..., 2r) -> (..., out)
        return F.linear(x, _FreezeSecondHalf.apply(self.weight), self.bias)


def is_anchored(layer: AdaptedLayer) -> bool:
    """Tell whether the layer's factors are in delta form and tied."""
    return isinstance(layer.lora_A, AnchoredA)


def factor_rank(layer: AdaptedLayer) -> int:
    """Return r, the rank of the factors that learn: half of the stored rank in an anchored layer."""
    return layer.rank // 2 if is_anchored(layer) else layer.rank


def expand_adapter(model: PeftModel, layers: list[AdaptedLayer]) -> None:
    """
    Replace the rank-r factors of untrained `layers` by anchored ones of stored rank 2r, at the start `[A; 0]`, `0`.

    `lora_alpha` is doubled (times `sqrt(2)` with rsLoRA) in the layers and in the adapter's config, patterns included,
    so that `s` stays what it was and stock PEFT rebuilds the same layers from the saved config. The parameters are
    new: this must happen before an optimizer is made.
    """
    config = model.peft_config[active_adapter(model)]
    grow_alpha = math.sqrt(2.0) if config.use_rslora else 2
    for layer in layers:
        _expand_layer(layer, grow_alpha)
    config.r *= 2
    config.lora_alpha *= grow_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: grow_alpha * alpha for key, alpha in config.alpha_pattern.items()}


@torch.no_grad()
def _expand_layer(layer: AdaptedLayer, grow_alpha: float) -> None:
    A, B = layer.lora_A.weight, layer.lora_B.weight
    module, name = layer.module, layer.adapter
    module.lora_A[name] = _rebuild(AnchoredA, torch.cat([A, torch.zeros_like(A)]), A, None)
    module.lora_B[name] = _rebuild(AnchoredB, torch.cat([torch.zeros_like(B)] * 2, dim=1), B, layer.lora_B.bias)
    module.r[name] *= 2
    module.lora_alpha[name] *= grow_alpha
    # What PEFT computes when it rebuilds the layer: with rsLoRA it may differ from s in the last bit.
    rank = module.r[name]
    module.scaling[name] = module.lora_alpha[name] / (math.sqrt(rank) if module.use_rslora[name] else rank)


def _rebuild(kind: type[nn.Linear], weight: Tensor, like: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Make a linear layer of `kind` around `weight`, trainable as `like` was, keeping the `bias` parameter itself."""
    linear = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    is_parameter = isinstance(weight, nn.Parameter)
    linear.weight = weight if is_parameter else nn.Parameter(weight, requires_grad=like.requires_grad)
    if bias is not None:
        linear.bias = bias
    return linear


def tie_adapter(layers: list[AdaptedLayer]) -> None:
    """Make loaded factors in delta form behave as such: halves tied, `B0` frozen. The parameters stay the same."""
    for layer in layers:
        A, B = layer.lora_A, layer.lora_B
        layer.module.lora_A[layer.adapter] = _rebuild(AnchoredA, A.weight, A.weight, None)
        layer.module.lora_B[layer.adapter] = _rebuild(AnchoredB, B.weight, B.weight, B.bias)


def load_adapter(base_model: nn.Module, folder: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """
    Load a saved adapter to train it further, anchored if it was.

    `PeftModel.from_pretrained(..., is_trainable=True)` gives the same function, but as a plain adapter of rank 2r
    whose halves are free. This adds what the folder's `lora_ga.json` says. Without that file the adapter is left as
    plain PEFT loads it, and the log says so.

    Args:
        base_model: the clean base the adapter was trained on.
        folder: an adapter's folder or hub id.
        kwargs: passed to `PeftModel.from_pretrained`.

    Raises:
        `ValueError`: if the record is damaged, or was made on another base.
    """
    record = read_record(folder)
    model = PeftModel.from_pretrained(base_model, os.fspath(folder), is_trainable=True, **kwargs)
    if record is None:
        logger.warning("%s has no lora_ga.json: it continues as a plain LoRA adapter of its stored rank.", folder)
        return model
    layers = find_adapted_layers(require_peft_model(model))
    base = fingerprint_base(model, layers)
    if base != record.base:
        raise ValueError(
            f"{folder}: the adapter was started on a base with fingerprint {record.base}, this one has {base}. Load "
            "the base (and dtype, and quantisation) that it was trained on, or load it with plain PEFT."
        )
    adapter = active_adapter(model)
    stored = model.peft_config[adapter].r
    if stored != record.rank * (2 if record.anchored else 1):
        raise ValueError(
            f"{folder}: lora_ga.json says rank={record.rank}, init={record.init!r}, which does not fit the stored "
            f"rank {stored} of adapter_config.json. Restore the two files of one save, or delete lora_ga.json to "
            "continue the adapter as a plain LoRA adapter."
        )
    model.peft_config[adapter] = attach_record(model.peft_config[adapter], record)
    if record.anchored:
        tie_adapter(layers)
    return model


def anchored_parameter_names(model: nn.Module) -> set[str]:
    """Name the parameters that weight decay must leave alone: it would untie the halves and shrink `B0`."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (AnchoredA, AnchoredB))}


def counted_gradients(
    model: nn.Module, read: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter.grad
) -> Iterator[Tensor]:
    """
    Yield the gradients of which a global norm is made.

    Both halves of an anchored `A` carry the gradient of `A`; it is yielded once, so the norm is that of LoRA-GA.

    Args:
        model: the model.
        read: gives the whole gradient of a parameter.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, AnchoredA)}
    for parameter in model.parameters():
        gradient = read(parameter)
        if gradient is not None:
            yield gradient.chunk(2, dim=0)[0] if id(parameter) in tied else gradient


def net_factors(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """Return stored `(B (out, k), A (k, in))` whose product times `s` is the layer's change of `W`."""
    return layer.lora_B.weight.detach(), layer.lora_A.weight.detach()
