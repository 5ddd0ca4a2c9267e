"""
Anchored adapters: a LoRA-GA start that never touches the base.

LoRA-GA trains `(B, A)` from `(B0, A0)` on the base `W - s B0 A0`. The net change of `W` is `s (B A - B0 A0)`; it is
kept here as an ordinary LoRA adapter of rank 2r in *delta form*

    lora_A.weight = [A; A - A0]  (2r, in)      lora_B.weight = [B - B0, B0]  (out, 2r)

whose plain product is `(B - B0) A + B0 (A - A0) = B A - B0 A0`: exactly zero at the start, `[A0; 0]` and `[0, B0]`,
and free of cancellation later. The halves of `lora_A` are *tied*: both receive the gradient of `A`, the sum of their
own, so that an elementwise optimizer moves them in lockstep. The `B0` half of `lora_B` receives none.

Fused experts store one such pair an expert (see `lora_ga_trainer.experts` for the layout): the rows `[A; A - A0]` of
one expert lie together, the columns of all `B - B0` come before those of all `B0`.
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

from .adapted_layer import AdaptedLayer
from .experts import join_A, split_A
from .fingerprint import fingerprint_base
from .json_file import short
from .layers import active_adapter, find_adapted_layers, require_peft_model
from .record import attach_record, read_record


logger = logging.getLogger(__name__)

# What says where `PeftModel.from_pretrained` finds a folder, and how it gets there.
_HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


class _TieHalves(torch.autograd.Function):
    """The identity on `[A; A - A0]` of each expert; both halves receive `dL/dA`, the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, experts: int) -> Tensor:  # (E * 2r, in)
        ctx.experts = experts
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # (E * 2r, in)
        upper, lower = split_A(grad, ctx.experts).chunk(2, dim=1)
        both = upper + lower
        return join_A(torch.cat([both, both], dim=1)), None


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

    experts = 1

    @property
    def stored(self) -> Tensor:
        return self.weight  # a plain tensor in the copies that nn.DataParallel makes for other devices

    def tied(self) -> Tensor:
        return _TieHalves.apply(self.stored, self.experts)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., 2r)
        return F.linear(x, self.tied(), self.bias)


class AnchoredB(nn.Linear):
    """`lora_B` in delta form: an `nn.Linear` of weight `[B - B0, B0] (out, 2r)` whose second half is frozen."""

    @property
    def stored(self) -> Tensor:
        return self.weight

    def frozen(self) -> Tensor:
        return _FreezeSecondHalf.apply(self.stored)

    def forward(self, x: Tensor) -> Tensor:  # (..., 2r) -> (..., out)
        return F.linear(x, self.frozen(), self.bias)


class AnchoredExpertsA(AnchoredA):
    """
    `lora_A` of fused experts in delta form, `(E * 2r, in)`.

    PEFT never calls it: it reads `weight` and adds the product of the factors to the experts' own weights. So reading
    `weight` where gradients are recorded gives the tied halves, and elsewhere the parameter. The parameter keeps its
    place and name: saving, loading, copying and moving see a plain `nn.Linear`.
    """

    @property
    def stored(self) -> nn.Parameter:
        return self._parameters["weight"]

    @property
    def weight(self) -> Tensor:
        return self.tied() if torch.is_grad_enabled() else self.stored


class AnchoredExpertsB(AnchoredB):
    """`lora_B` of fused experts in delta form, `(out, 2r * E)`; read as [`AnchoredExpertsA`] is."""

    @property
    def stored(self) -> nn.Parameter:
        return self._parameters["weight"]

    @property
    def weight(self) -> Tensor:
        return self.frozen() if torch.is_grad_enabled() else self.stored


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
    A, B = split_A(layer.stored_A, layer.experts), layer.stored_B
    wide_A = join_A(torch.cat([A, torch.zeros_like(A)], dim=1))
    wide_B = torch.cat([torch.zeros_like(B)] * 2, dim=1)
    _anchor(
        layer,
        nn.Parameter(wide_A, requires_grad=layer.stored_A.requires_grad),
        nn.Parameter(wide_B, requires_grad=layer.stored_B.requires_grad),
    )
    module, name = layer.module, layer.adapter
    module.r[name] *= 2
    module.lora_alpha[name] *= grow_alpha
    # What PEFT computes when it rebuilds the layer: with rsLoRA it may differ from s in the last bit.
    rank = module.r[name]
    module.scaling[name] = module.lora_alpha[name] / (math.sqrt(rank) if module.use_rslora[name] else rank)


def tie_adapter(layers: list[AdaptedLayer]) -> None:
    """Make loaded factors in delta form behave as such: halves tied, `B0` frozen. The parameters stay the same."""
    for layer in layers:
        _anchor(layer, layer.stored_A, layer.stored_B)


def _anchor(
    layer: AdaptedLayer,
    A: nn.Parameter,  # (E * 2r, in)
    B: nn.Parameter,  # (out, 2r * E)
) -> None:
    """Put anchored modules around factors in delta form, keeping the bias of `lora_B`."""
    bare = layer.parameter_name is not None
    lora_A = _build(AnchoredExpertsA if bare else AnchoredA, A, None)
    lora_A.experts = layer.experts
    layer.module.lora_B[layer.adapter] = _build(AnchoredExpertsB if bare else AnchoredB, B, layer.lora_B.bias)
    layer.module.lora_A[layer.adapter] = lora_A


def _build(kind: type[nn.Linear], weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.__class__ = kind  # not kind(...): while nn.Linear is being made there is no weight to read
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def load_adapter(base_model: nn.Module, folder: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """
    Load a saved adapter to train it further, anchored if it was.

    `PeftModel.from_pretrained(..., is_trainable=True)` gives the same function, but as a plain adapter of rank 2r
    whose halves are free. This adds what the folder's `lora_ga.json` says. Without that file the adapter is left as
    plain PEFT loads it, and the log says so. Train it with this package's trainer, mixin or callback: the weight decay
    of a plain Trainer would shrink `B0`.

    Args:
        base_model: the clean base the adapter was trained on.
        folder: an adapter's folder or hub id.
        kwargs: passed to `PeftModel.from_pretrained`; `subfolder`, `revision`, `token` and the like hold for
            `lora_ga.json`, too.

    Raises:
        `ValueError`: if the record is damaged, or was made on another base.
    """
    record = read_record(folder, **{name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None})
    model = PeftModel.from_pretrained(base_model, os.fspath(folder), is_trainable=True, **kwargs)
    if record is None:
        logger.warning("%s has no lora_ga.json: it continues as a plain LoRA adapter of its stored rank.", folder)
        return model
    layers = find_adapted_layers(require_peft_model(model))
    base = fingerprint_base(model, layers)
    if base != record.base:
        raise ValueError(
            f"{folder}: the adapter was started on a base with fingerprint {short(record.base)}, this one has "
            f"{base!r}. Load the base (and dtype, and quantisation) that it was trained on, or load it with plain "
            "PEFT."
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
    """
    Name the parameters of anchored factors, whose second half follows the first or is frozen.

    Weight decay must leave them alone: it would untie the halves of `A` and shrink `B0`. Half of their numbers learn.

    Args:
        model: with or without an anchored adapter.

    Returns:
        Names as `model.named_parameters()` spells them.
    """
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
    tied = {id(module.stored): module.experts for module in model.modules() if isinstance(module, AnchoredA)}
    for parameter in model.parameters():
        gradient = read(parameter)
        if gradient is None:
            continue
        experts = tied.get(id(parameter), 0)
        if experts > 1:
            yield split_A(gradient, experts).chunk(2, dim=1)[0]
        else:
            yield gradient.chunk(2, dim=0)[0] if experts else gradient
