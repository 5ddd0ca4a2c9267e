"""Find the layers of a model that carry LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..engines.devices import to_fp64
from ..engines.parameters import plain_name
from .attention import Attention, projections_of, require_plain_attention
from .conv import AdaptedConv, require_plain_conv
from .embedding import AdaptedEmbedding, require_plain_embedding
from .host import active_adapter, require_adapter
from .layer import AdaptedLayer, variant_of
from .parameter import AdaptedExperts
from .storage import split_A, split_B


def find_adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """
    List the layers of the active adapter that are trained, in the model's order.

    A module that is shared by several names is listed once.

    Args:
        model: with an adapter, as `trainer.model` is before an engine wraps it.

    Returns:
        One [`AdaptedLayer`] a module: its `name`, `shape` `(out, in)`, `s`, and the factors `stored_A`, `stored_B`.

    Raises:
        `ValueError`: if a layer is of a type that gets no start, if the adapter is merged into the base, or if no
            layer is trainable.
    """
    every = find_lora_layers(model)
    layers = [layer for layer in every if layer.stored_A.requires_grad or layer.stored_B.requires_grad]
    if not layers:
        raise ValueError(
            f"Adapter {active_adapter(model)!r} has no trainable LoRA layer ({len(every)} frozen). Load it with "
            "`is_trainable=True`, name layers of this model in `target_modules`, or, where something froze it after "
            "wrapping (`prepare_model_for_kbit_training` belongs before), call `model.set_adapter(name)`."
        )
    for layer in layers:
        if layer.module.merged:
            raise ValueError(
                f"Layer {layer.name}: the adapter is merged into the base weight. Call `model.unmerge_adapter()` "
                "first."
            )
    return layers


def find_lora_layers(model: nn.Module) -> list[AdaptedLayer]:
    """
    List the layers of the active adapter, trained or not, in the model's order.

    Raises:
        `ValueError`: if a layer is not a linear one, a convolution, an embedding, an `nn.MultiheadAttention` or a bare
            parameter.
    """
    host = require_adapter(model)
    adapter = host.adapter
    layers: list[AdaptedLayer] = []
    listed: set[int] = set()
    for name, module in host.base.named_modules():
        if not isinstance(module, BaseTunerLayer) or not _carries(module, adapter) or id(module) in listed:
            continue
        name = plain_name(name)
        if isinstance(module, ParamWrapper):
            # Wrappers of one module are nested; the name is that of the parameter in the base model.
            owner = name.replace(".base_layer", "")
            layers.append(AdaptedExperts(f"{owner}.{module.parameter_name}", module, adapter))
        elif isinstance(module, MultiheadAttention):
            projections = projections_of(name, module, adapter)
            for projection in projections:
                require_plain_attention(projection)
            layers += projections
            listed.update(id(projection.module) for projection in projections)
        elif isinstance(module.get_base_layer(), (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            conv = AdaptedConv(name, module, adapter)
            require_plain_conv(name, conv.base, conv.uses_dora)
            layers.append(conv)
        elif isinstance(module.get_base_layer(), nn.Embedding):
            require_plain_embedding(name, module)
            layers.append(AdaptedEmbedding(name, module, adapter))
        else:
            _require_linear(name, module, adapter)
            layers.append(AdaptedLayer(name, module, adapter))
    return layers


def _carries(module: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(module, group, ()) for group in ("lora_A", "lora_embedding_A"))


def _require_linear(name: str, module: BaseTunerLayer, adapter: str) -> None:
    base = module.get_base_layer()
    linear = isinstance(base, (nn.Linear, Conv1D)) and adapter in module.lora_A
    if linear and not isinstance(module.lora_A[adapter], nn.Linear):
        raise ValueError(
            f"Layer {name}: the adapter is a variant of LoRA ({variant_of(module, adapter)}) whose factors are not "
            "plain matrices, so it can't be given another start. Leave the variant out of the LoraConfig, or use "
            "LoRAGAConfig(init='none')."
        )
    if not linear:
        raise ValueError(
            f"Layer {name}: {type(module).__name__} adapts a {type(base).__name__}, which gets no start. Linear "
            "layers (`nn.Linear` and the quantised layers derived from it), Conv1D layers, convolutions, "
            "embeddings and nn.MultiheadAttention do. Leave the others out of `target_modules`, load the base in "
            "another format, or use LoRAGAConfig(init='none')."
        )


def saved_modules(model: nn.Module) -> list[nn.Module]:
    """List the trainable copies that `modules_to_save` made for the active adapter (a classification head, say)."""
    host = require_adapter(model)
    adapter = host.adapter
    wrappers = (module for module in host.owner.modules() if isinstance(module, ModulesToSaveWrapper))
    return [wrapper.modules_to_save[adapter] for wrapper in wrappers if adapter in wrapper.modules_to_save]


@torch.no_grad()
def is_trained(layer: AdaptedLayer) -> bool:
    """Tell whether the layer's adapter already moves the output: `B A != 0`, not merely `B != 0`."""
    if layer.lora_bias is not None and layer.lora_bias.any():
        return True
    A = split_A(to_fp64(layer.stored_A).flatten(1), layer.experts)  # (E, r, in)
    B = split_B(to_fp64(layer.stored_B).flatten(1), layer.experts)  # (E, out, r)
    # A random vector in the null space of a nonzero B A has probability zero, and B (A v) needs no (out, in) buffer.
    v = torch.randn(A.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=A.dtype).to(A.device)
    return bool((B @ (A @ v)).any())


def find_lora_pairs(model: nn.Module) -> tuple[list[AdaptedLayer], dict[str, nn.Parameter]]:
    """
    Find the factors of every adapter of a model, wrapped or not, active or not.

    Returns:
        The linear layers `A (r, in)`, `B (out, r)`, one entry a layer and adapter, and by name the LoRA parameters
        that are in no such pair: those of embeddings, convolutions and fused experts, and of an attention that
        PEFT computes without this package, whose gradients are not those of its output.
    """
    pairs: list[AdaptedLayer] = []
    paired: set[int] = set()
    inside: set[int] = set()  # projections of an attention, listed with it
    others: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module, MultiheadAttention):
            inside.add(id(module.base_layer.out_proj))
        for adapter in module.r:
            for pair in _possible_pairs(name, module, adapter, inside):
                if _is_linear_pair(pair):
                    pairs.append(pair)
                    paired |= {id(pair.lora_A.weight), id(pair.lora_B.weight)}
        for group in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            for key, parameter in getattr(module, group).named_parameters():
                if not key.endswith(".bias"):
                    others[f"{name}.{group}.{key}"] = parameter
    return pairs, {name: parameter for name, parameter in others.items() if id(parameter) not in paired}


def _possible_pairs(name: str, module: LoraLayer, adapter: str, inside: set[int]) -> Sequence[AdaptedLayer]:
    if isinstance(module, MultiheadAttention):
        return projections_of(name, module, adapter) if isinstance(module, Attention) else []
    return [] if id(module) in inside else [AdaptedLayer(name, module, adapter)]


def _is_linear_pair(pair: AdaptedLayer) -> bool:
    if pair.adapter not in pair.module.lora_A:
        return False
    A, B, r = pair.lora_A, pair.lora_B, pair.stored_rank
    out_features, in_features = pair.shape
    # A single bare parameter has the shapes of a linear layer, and counts as one unless it is anchored: then
    # `lora_A.weight` is not the parameter.
    if isinstance(pair.module, ParamWrapper) and type(A) is not nn.Linear:
        return False
    if not isinstance(A, nn.Linear) or not isinstance(B, nn.Linear):
        return False
    # Fused experts keep (experts * r, in) in an nn.Linear. A sharded weight does not show its shape.
    return (A.out_features, A.in_features, B.out_features, B.in_features) == (r, in_features, out_features, r)
