"""
Torch's own attention with LoRA: the two projections of `nn.MultiheadAttention`.

It computes with its weights in one function of torch and never calls a layer. So PEFT writes `W + s B A` into the
module before each forward pass and subtracts `s B A` after it. [`Attention`] hands the sums over and leaves the
weights alone. Anchored adapters train in it, and the probe looks at all through it. A plain start leaves training to
PEFT.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from ..engines.devices import preserved_rng
from ..engines.parameters import is_sharded
from .layer import AdaptedLayer
from .parameter import AdaptedParameter
from .storage import making_product


_IN, _OUT = "in_proj_weight", "out_proj"


class Attention(MultiheadAttention):
    """
    PEFT's adapter of `nn.MultiheadAttention`, whose base stays as it is to the bit.

    The output is that of PEFT's layer. The gradients of the factors are those of that output: see
    [`times_out_proj_counts`].
    """

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        apart = self.base_layer.out_proj.active_adapters != self.active_adapters
        if self.disable_adapters or self.merged or apart:  # PEFT refuses the last
            return super().forward(query, *args, **kwargs)
        self._check_forward_args(query, *args, **kwargs)
        output, weights = functional_call(
            self.base_layer, self._adapted_weights(), (query, *args), kwargs, tie_weights=False
        )
        return output.to(query.dtype), None if weights is None else weights.to(query.dtype)

    def _adapted_weights(self) -> dict[str, Tensor]:
        """Return `W + s B A` of both projections, by name inside the base."""
        projection = self.base_layer.out_proj
        of_in, of_out = self.base_layer.in_proj_weight, projection.get_base_layer().weight
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            of_in = of_in + _product(self, adapter).to(of_out.dtype)
            delta = _product(projection, adapter).to(of_out.dtype)
            for _ in range(times_out_proj_counts()):  # one after the other: so PEFT rounds
                of_out = of_out + delta
        return {_IN: of_in, f"{_OUT}.base_layer.weight": of_out}

    def _restore_weights(self) -> None:
        # PEFT makes new parameters whenever the modules of a model are listed. Here they are always in their place,
        # unless a user has merged the adapter.
        if _IN not in self.base_layer._parameters:
            super()._restore_weights()


def _product(module: LoraLayer, adapter: str) -> Tensor:  # (out, in)
    with making_product(module, adapter):
        return module.get_delta_weight(adapter)


@functools.cache
def times_out_proj_counts() -> int:
    """
    Return how often PEFT adds `scaling * B A` to the weight of `out_proj`.

    Twice up to 0.21, in the forward pass and when it merges (https://github.com/huggingface/peft/pull/3774), while
    the gradients that it gives are those of once. Files of adapters must mean the same in PEFT and here, so its
    output is kept, and [`AdaptedOutProjection`] has an `s` that is right for it.
    """
    with preserved_rng(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT's, that what it has merged was merged before
        model: Any = get_peft_model(
            nn.Sequential(nn.MultiheadAttention(1, 1, device="cpu")),
            LoraConfig(r=1, lora_alpha=1, target_modules=["0"]),
        )
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.requires_grad else 0.0)
        model.merge_adapter()
        return round(model.base_model.model[0].base_layer.out_proj.get_base_layer().weight.item())


@dataclass(frozen=True)
class AdaptedInProjection(AdaptedParameter):
    """The weight `(3 * embed, embed)` that makes queries, keys and values of `nn.MultiheadAttention`."""

    @property
    def parameter_name(self) -> str:
        return _IN

    @property
    def key(self) -> str:
        return self.name.removesuffix(_IN).removesuffix(".")

    def require_whole(self, copies: int) -> None:
        _require_whole(self, copies)


@dataclass(frozen=True)
class AdaptedOutProjection(AdaptedParameter):
    """
    The weight `(embed, embed)` of the output projection of `nn.MultiheadAttention`.

    Args:
        attention: PEFT's adapter of the attention that the projection belongs to.
    """

    attention: MultiheadAttention

    @property
    def parameter_name(self) -> str:
        return "weight"

    @property
    def user(self) -> nn.Module:
        return self.attention.base_layer

    @property
    def key(self) -> str:
        return f"{self.name.removesuffix(_OUT)}base_layer.{_OUT}"

    @property
    def s(self) -> float:
        return times_out_proj_counts() * self.scaling

    def require_whole(self, copies: int) -> None:
        _require_whole(self, copies)


def projections_of(name: str, module: MultiheadAttention, adapter: str) -> list[AdaptedParameter]:
    """
    Return both projections of an attention.

    Args:
        name: of `module` inside the base model.
        module: PEFT's layer.
        adapter: name of the adapter.
    """
    inside = f"{name}." if name else ""
    projection = cast(LoraLayer, module.base_layer.out_proj)
    return [
        AdaptedInProjection(inside + _IN, module, adapter),
        AdaptedOutProjection(inside + _OUT, projection, adapter, module),
    ]


def require_plain_attention(layer: AdaptedLayer) -> None:
    """
    Refuse a projection whose adapter is not a change `B A` of its weight.

    Raises:
        `ValueError`: naming the projection and what is wrong.
    """
    if layer.lora_B.bias is not None:
        raise ValueError(
            f"Layer {layer.name}: PEFT never trains the bias of `lora_B` on nn.MultiheadAttention. Set "
            "`lora_bias=False`, or use LoRAGAConfig(init='none')."
        )
    if not layer.weight.is_floating_point():
        raise ValueError(
            f"Layer {layer.name}: its weight is stored as {layer.weight.dtype}, and PEFT adds the adapter to it. Load "
            "the base without quantising nn.MultiheadAttention, or leave it out of `target_modules`."
        )


def _require_whole(layer: AdaptedParameter, copies: int) -> None:
    if copies > 1:
        raise ValueError(
            f"{layer.name}: nn.DataParallel, which the Trainer uses on {copies} GPUs without a launcher, hides the "
            "weights of nn.MultiheadAttention. Start with `accelerate launch`, which gives each GPU a process, or "
            "show one GPU with CUDA_VISIBLE_DEVICES."
        )
    if is_sharded(layer.weight):
        raise ValueError(
            f"{layer.name}: this engine spreads the weight over processes, where PEFT can't adapt it. Leave "
            "nn.MultiheadAttention out of `target_modules`, or use an engine that keeps it whole."
        )


def take_over_attention(layers: Sequence[AdaptedLayer]) -> None:
    """Turn PEFT's attentions among `layers` into [`Attention`]."""
    for layer in layers:
        if isinstance(layer, AdaptedInProjection):
            layer.module.__class__ = Attention


@contextmanager
def attention_kept_whole(model: nn.Module) -> Iterator[None]:
    """Let no forward pass inside round the weights of PEFT's attentions: each is an [`Attention`] meanwhile."""
    taken = [module for module in model.modules() if type(module) is MultiheadAttention]
    for module in taken:
        module.__class__ = Attention
    try:
        yield
    finally:
        for module in taken:
            module.__class__ = MultiheadAttention


def passed_by_in_eval(model: nn.Module) -> list[str]:
    """
    Name the modules that torch evaluates in one fused call with the weights of its layers, adapters or not.

    `nn.TransformerEncoderLayer` does so in eval mode, unless that is switched off for all.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return []
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and any(isinstance(inner, BaseTunerLayer) for inner in module.modules())
    ]
