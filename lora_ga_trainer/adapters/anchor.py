"""
Anchored adapters: a LoRA-GA start that never touches the base.

LoRA-GA trains `(B, A)` from `(B0, A0)` on the base `W - s B0 A0`. The net change of `W` is `s (B A - B0 A0)`; it is
kept here as an ordinary LoRA adapter of rank 2r in *delta form*

    lora_A.weight = [A; A - A0]  (2r, in)      lora_B.weight = [B - B0, B0]  (out, 2r)

whose plain product is `(B - B0) A + B0 (A - A0) = B A - B0 A0`: exactly zero at the start, `[A0; 0]` and `[0, B0]`,
and free of cancellation later. The halves of `lora_A` are *tied*: both receive the gradient of `A`, the sum of their
own, so that an elementwise optimizer moves them in lockstep. The `B0` half of `lora_B` receives none.

Fused experts store one such pair an expert, in the layout of `lora_ga_trainer.adapters.storage`: the rows
`[A; A - A0]` of one expert lie together, the columns of all `B - B0` come before those of all `B0`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from .attention import take_over_attention
from .embedding import AdaptedEmbedding
from .host import require_adapter
from .layer import AdaptedLayer
from .storage import AnchoredParamWrapper, join_A, join_B, split_A, split_B


def expand_adapter(model: nn.Module, layers: list[AdaptedLayer]) -> None:
    """
    Replace the rank-r factors of untrained `layers` by anchored ones of stored rank 2r, at the start `[A; 0]`, `0`.

    `lora_alpha` is doubled (times `sqrt(2)` with rsLoRA) in the layers and in the adapter's config, patterns included,
    so that `s` stays what it was and stock PEFT rebuilds the same layers from the saved config. The parameters are
    new: this must happen before an optimizer is made.
    """
    config = require_adapter(model).config
    grow_alpha = math.sqrt(2.0) if config.use_rslora else 2
    take_over_attention(layers)
    for layer in layers:
        _expand_layer(layer, grow_alpha)
    _rescale_config(config, 2, grow_alpha)


def halve_adapter(model: nn.Module, layers: list[AdaptedLayer]) -> None:
    """
    Replace the factors of untrained, plain `layers` by the first half of their rows and columns, `s` unchanged.

    A plain start draws the rows of `A` alike whatever the rank, so that what is left is a plain start of that rank.
    """
    config = require_adapter(model).config
    for layer in layers:
        _halve_layer(layer, _shrinking(config))
    halve_config(config)


def halve_config(config: LoraConfig) -> None:
    """Give the config of an anchored adapter the ranks and alphas that its user means."""
    _rescale_config(config, 0.5, _shrinking(config))


def _shrinking(config: LoraConfig) -> float:
    """Return the factor of alpha that keeps `s` at half the rank."""
    return 1 / math.sqrt(2.0) if config.use_rslora else 0.5


def _rescale_config(config: LoraConfig, rank: float, alpha: float) -> None:
    """Multiply every rank and every alpha of a config."""
    config.r = int(rank * config.r)
    config.lora_alpha *= alpha
    config.rank_pattern = {key: int(rank * value) for key, value in config.rank_pattern.items()}
    config.alpha_pattern = {key: alpha * value for key, value in config.alpha_pattern.items()}


@torch.no_grad()
def _halve_layer(layer: AdaptedLayer, shrink_alpha: float) -> None:
    A, B = split_A(layer.stored_A, layer.experts), split_B(layer.stored_B, layer.experts)
    r = layer.stored_rank // 2
    half_A, half_B = (
        nn.Parameter(value.clone().contiguous(), requires_grad=factor.requires_grad)
        for value, factor in ((join_A(A[:, :r]), layer.stored_A), (join_B(B[:, :, :r]), layer.stored_B))
    )
    if isinstance(layer, AdaptedEmbedding):
        layer.put_factors(half_A, half_B)
    else:
        layer.lora_A.weight, layer.lora_B.weight = half_A, half_B
        _note_shape(layer.lora_A)
        _note_shape(layer.lora_B)
    _rescale_layer(layer, r, shrink_alpha)


@torch.no_grad()
def _expand_layer(layer: AdaptedLayer, grow_alpha: float) -> None:
    A, B = split_A(layer.stored_A, layer.experts), layer.stored_B
    stored_A = join_A(torch.cat([A, torch.zeros_like(A)], dim=1))
    # PEFT's own start has B = 0 and this is zero, too. That of an embedding has A = 0 and a random B instead.
    stored_B = torch.cat([torch.zeros_like(B), B], dim=1)
    _anchor(
        layer,
        nn.Parameter(stored_A, requires_grad=layer.stored_A.requires_grad),
        nn.Parameter(stored_B, requires_grad=layer.stored_B.requires_grad),
    )
    _rescale_layer(layer, 2 * layer.stored_rank, grow_alpha)


def _rescale_layer(layer: AdaptedLayer, rank: int, alpha: float) -> None:
    """Give a layer a new stored rank and multiply its alpha."""
    module, name = layer.module, layer.adapter
    module.r[name] = rank
    module.lora_alpha[name] *= alpha
    # What PEFT computes when it rebuilds the layer: with rsLoRA it may differ from s in the last bit.
    module.scaling[name] = module.lora_alpha[name] / (math.sqrt(rank) if module.use_rslora[name] else rank)


def tie_adapter(layers: list[AdaptedLayer]) -> None:
    """Make loaded factors in delta form behave as such: halves tied, `B0` frozen. The parameters stay the same."""
    take_over_attention(layers)
    for layer in layers:
        _anchor(layer, layer.stored_A, layer.stored_B)


def _anchor(
    layer: AdaptedLayer,
    A: nn.Parameter,  # (E * 2r, in)
    B: nn.Parameter,  # (out, 2r * E)
) -> None:
    """Put anchored modules around factors in delta form, keeping the bias of `lora_B`."""
    if isinstance(layer, AdaptedEmbedding):
        layer.put_factors(A, B)
        layer.anchor()
        return
    kind_A, kind_B = layer.anchored_kinds()
    lora_A: Any = _build(kind_A, layer.lora_A, A, None)
    lora_A.experts = layer.experts
    layer.module.lora_B[layer.adapter] = _build(kind_B, layer.lora_B, B, layer.lora_B.bias)
    layer.module.lora_A[layer.adapter] = lora_A
    if isinstance(layer.module, ParamWrapper):
        layer.module.__class__ = AnchoredParamWrapper


def _build(kind: type[nn.Module], like: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> Any:
    if isinstance(like, nn.Linear):
        made: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        made = type(like)(1, 1, like.kernel_size, like.stride, like.padding, bias=bias is not None, device="meta")
    made.__class__ = kind  # not kind(...): while the module is being made there is no weight to read
    made.weight = weight
    if bias is not None:
        made.bias = bias
    _note_shape(made)
    return made


def _note_shape(module: Any) -> None:
    """Let a module tell the shape of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        module.out_channels, module.in_channels = module.weight.shape[:2]


@torch.no_grad()
def start_values(
    layer: AdaptedLayer,
    B0: Tensor,  # (E, out, r), or (out, r)
    A0: Tensor,  # (E, r, in), or (r, in)
) -> list[tuple[nn.Parameter, Tensor]]:
    """
    Return what to write into which parameters: `[A0; 0]`, `[0, B0]` in an anchored layer, `A0`, `B0` in a plain one.

    A plain start moves the weight, so DoRA's magnitude becomes `||W + s B0 A0||` of each row.
    """
    device = layer.stored_A.device
    B0, A0 = (factor.to(device) if factor.dim() == 3 else factor[None].to(device) for factor in (B0, A0))
    if layer.is_anchored:
        A = join_A(torch.cat([A0, torch.zeros_like(A0)], dim=1))
        B = join_B(torch.cat([torch.zeros_like(B0), B0], dim=2))
    else:
        A, B = join_A(A0), join_B(B0)
    A, B = layer.as_stored(A, B)
    values = [(layer.stored_A, A), (layer.stored_B, B)]
    if layer.is_anchored:
        return values
    if layer.uses_dora:
        values.append((layer.dora_parameter, layer.dora_magnitude(layer.s * (B0[0] @ A0[0]))))
    return values
