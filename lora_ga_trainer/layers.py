"""The only file that knows PEFT's insides: which layers carry LoRA, and their shapes, scales and factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from .engines import plain_name, read_parameter
from .experts import split_A, split_B


@dataclass(frozen=True)
class AdaptedLayer:
    """One linear layer of the base model with the LoRA factors that PEFT put around it."""

    name: str  # inside the base model, as `base_model.named_modules()` spells it
    module: LoraLayer
    adapter: str

    @property
    def base(self) -> nn.Module:
        """The frozen layer: maps `x (..., in)` to `y (..., out)`."""
        return self.module.get_base_layer()

    @property
    def weight(self) -> Tensor:
        """The frozen weight as it is stored."""
        return self.base.weight

    @property
    def parameter_name(self) -> str | None:
        """What `target_parameters` calls the weight inside `base`; `None` for a layer of `target_modules`."""
        return None

    @property
    def experts(self) -> int:
        """How many weights `W (out, in)` lie in `weight`, each with factors of its own: 1 in a linear layer."""
        return 1

    @property
    def matrices(self) -> list[str]:
        """Name each of these weights."""
        return [self.name]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the gradient, whatever the storage of the weight (transposed, packed, sharded)."""
        return self.module.out_features, self.module.in_features

    @property
    def rank(self) -> int:
        """The rank PEFT knows: that of the stored factors."""
        return self.module.r[self.adapter]

    @property
    def s(self) -> float:
        """PEFT's `scaling`: the adapted weight is `W + s B A`."""
        return self.module.scaling[self.adapter]

    @property
    def lora_A(self) -> nn.Linear:
        return self.module.lora_A[self.adapter]

    @property
    def lora_B(self) -> nn.Linear:
        return self.module.lora_B[self.adapter]

    @property
    def stored_A(self) -> nn.Parameter:
        """The parameter of `lora_A`: `(experts * rank, in)`."""
        return self.lora_A._parameters["weight"]

    @property
    def stored_B(self) -> nn.Parameter:
        """The parameter of `lora_B`: `(out, rank * experts)`."""
        return self.lora_B._parameters["weight"]

    @property
    def uses_dora(self) -> bool:
        return self.adapter in self.module.lora_magnitude_vector

    def dense_weight(self) -> Tensor:  # (out, in)
        """
        Return `W` dequantised, whole and in the orientation of `G`; a copy or a view, never to be written to.

        Collective where the weight is sharded.

        Raises:
            `ValueError`: if an engine keeps the weight in a form that can't be read.
        """
        held = dict(self.base.named_parameters(recurse=False)).get("weight")
        weight = read_parameter(dequantize_module_weight(self.base))
        if held is not None and self.base.weight is not held:
            self.base.weight = held  # PEFT leaves a copy in its place, which has lost the scales of int8 codes
        if is_traceable_wrapper_subclass(weight):
            weight = weight.dequantize()
        weight = weight.T if isinstance(self.base, Conv1D) else weight
        if weight.shape != self.shape:
            raise ValueError(
                f"Layer {self.name}: this engine shows its weight as {tuple(weight.shape)} instead of {self.shape}, "
                "and DoRA and scale='weight_svd' have to read it. Use another engine, or neither of them."
            )
        return weight

    def dense_weights(self) -> Tensor:  # (E, out, in)
        """Return [`dense_weight`] of every matrix of the layer: one, or one an expert."""
        return self.dense_weight()[None]

    def stored_weight(self) -> list[Tensor]:
        """
        List the tensors that `W` is stored as: itself, or the codes, scales and offsets of a quantised weight.

        The bias is left out: an adapter may train it. Collective where the weight is sharded.
        """
        state = self.base.state_dict(keep_vars=True)
        tensors = [value for name, value in state.items() if name != "bias" and isinstance(value, Tensor)]
        return [part for tensor in tensors for part in _parts(read_parameter(tensor))]

    @torch.no_grad()
    def dora_magnitude(self, delta: Tensor) -> Tensor:  # (out, in) -> (out,)
        """Compute DoRA's magnitude `||W + delta||` of each output row (arXiv 2402.09353, equation 5)."""
        weight = self.dense_weight().to(device=delta.device, dtype=delta.dtype)
        return torch.linalg.vector_norm(weight + delta, dim=1)

    @property
    def dora_parameter(self) -> nn.Parameter:
        return self.module.lora_magnitude_vector[self.adapter].weight


@dataclass(frozen=True)
class AdaptedExperts(AdaptedLayer):
    """
    The fused weights of all experts of a layer, or any other bare parameter of `target_parameters`.

    PEFT adds `s B A` to the parameter itself, so the layer has no input and output of its own.
    """

    @property
    def weight(self) -> Tensor:
        """`(E, out, in)`, `(E, in, out)` where the model stores it so, or `(out, in)`."""
        return self.module.get_param()

    @property
    def parameter_name(self) -> str:
        return self.module.parameter_name

    @property
    def experts(self) -> int:
        return self.module.num_experts

    @property
    def matrices(self) -> list[str]:
        return [f"{self.name}[{expert}]" for expert in range(self.experts)]

    def by_expert(self, stored: Tensor) -> Tensor:  # as `weight` -> (E, out, in), a view
        """Bring the weight, or a gradient of its shape, to the orientation of `G`."""
        if stored.dim() == 2:
            return stored[None]
        return stored.mT if getattr(self.base, "is_transposed", False) else stored

    def dense_weights(self) -> Tensor:  # (E, out, in)
        return self.by_expert(read_parameter(self.weight))

    def stored_weight(self) -> list[Tensor]:
        return [read_parameter(self.weight)]


def _parts(value: Tensor) -> list[Tensor]:
    """Take apart a tensor that wraps others (codes and scales)."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(value, name))]


def require_peft_model(model: nn.Module) -> PeftModel:
    """
    Return `model` if it carries a LoRA adapter of PEFT.

    Raises:
        `ValueError`: if it is not a `PeftModel` or its active adapter is of another type.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} without a PEFT adapter. Pass `peft_config=LoraConfig(...)` to the "
            "trainer, or wrap the model with `peft.get_peft_model` first."
        )
    adapter = active_adapter(model)
    config = model.peft_config[adapter]
    if not isinstance(config, LoraConfig) or config.peft_type is not PeftType.LORA:
        raise ValueError(
            f"Adapter {adapter!r} is of type {config.peft_type}, not LoRA. A gradient-aligned start is defined for "
            "`peft.LoraConfig`; use `LoRAGAConfig(init='none')` or transformers.Trainer for other adapters."
        )
    return model


def active_adapter(model: PeftModel) -> str:
    """Return the name of the one adapter that is active and would be trained."""
    names = list(model.active_adapters)
    if len(names) != 1:
        raise ValueError(f"Adapters {names} are active at once. Choose one with `model.set_adapter(name)`.")
    return names[0]


def find_adapted_layers(model: PeftModel) -> list[AdaptedLayer]:
    """
    List the layers of the active adapter that are trained, in the model's order.

    A module that is shared by several names is listed once.

    Raises:
        `ValueError`: if a layer is of a type whose gradient can't be read from its input and output, if the adapter is
            merged into the base, or if no layer is trainable.
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


def find_lora_layers(model: PeftModel) -> list[AdaptedLayer]:
    """
    List the layers of the active adapter, trained or not, in the model's order.

    Raises:
        `ValueError`: if a layer is neither a linear one nor a bare parameter.
    """
    adapter = active_adapter(model)
    layers: list[AdaptedLayer] = []
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer) or not _carries(module, adapter):
            continue
        name = plain_name(name)
        if isinstance(module, ParamWrapper):
            # Wrappers of one module are nested; the name is that of the parameter in the base model.
            owner = name.replace(".base_layer", "")
            layers.append(AdaptedExperts(f"{owner}.{module.parameter_name}", module, adapter))
        else:
            _require_linear(name, module, adapter)
            layers.append(AdaptedLayer(name, module, adapter))
    return layers


def _carries(module: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(module, group, ()) for group in ("lora_A", "lora_embedding_A"))


def _require_linear(name: str, module: BaseTunerLayer, adapter: str) -> None:
    base = module.get_base_layer()
    linear = isinstance(base, (nn.Linear, Conv1D)) and adapter in module.lora_A
    if not linear or not isinstance(module.lora_A[adapter], nn.Linear):
        raise ValueError(
            f"Layer {name}: {type(module).__name__} adapts a {type(base).__name__}, whose weight gradient can't be "
            "read from its input and output. Linear layers (`nn.Linear` and the quantised layers derived from it) and "
            "Conv1D layers can; leave the others out of `target_modules`, or load the base in another format."
        )


def saved_modules(model: PeftModel) -> list[nn.Module]:
    """List the trainable copies that `modules_to_save` made for the active adapter (a classification head, say)."""
    adapter = active_adapter(model)
    wrappers = (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    return [wrapper.modules_to_save[adapter] for wrapper in wrappers if adapter in wrapper.modules_to_save]


@torch.no_grad()
def is_trained(layer: AdaptedLayer) -> bool:
    """Tell whether the layer's adapter already moves the output: `B A != 0`, not merely `B != 0`."""
    if layer.lora_B.bias is not None and layer.lora_B.bias.any():
        return True
    A = split_A(layer.stored_A.double(), layer.experts)  # (E, r, in)
    B = split_B(layer.stored_B.double(), layer.experts)  # (E, out, r)
    # A random vector in the null space of a nonzero B A has probability zero, and B (A v) needs no (out, in) buffer.
    v = torch.randn(A.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=A.dtype).to(A.device)
    return bool((B @ (A @ v)).any())


def find_lora_pairs(model: nn.Module) -> tuple[list[AdaptedLayer], dict[str, nn.Parameter]]:
    """
    Find the factors of every adapter of a model, wrapped or not, active or not.

    Returns:
        The linear layers `A (r, in)`, `B (out, r)`, one entry a layer and adapter, and by name the LoRA parameters
        that are in no such pair: those of embeddings, convolutions and fused experts.
    """
    pairs, paired = [], set()
    others: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.r:
            pair = AdaptedLayer(name, module, adapter)
            if _is_linear_pair(pair):
                pairs.append(pair)
                paired |= {id(pair.lora_A.weight), id(pair.lora_B.weight)}
        for group in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            for key, parameter in getattr(module, group).named_parameters():
                if not key.endswith(".bias"):
                    others[f"{name}.{group}.{key}"] = parameter
    return pairs, {name: parameter for name, parameter in others.items() if id(parameter) not in paired}


def _is_linear_pair(pair: AdaptedLayer) -> bool:
    if pair.adapter not in pair.module.lora_A:
        return False
    A, B, r = pair.lora_A, pair.lora_B, pair.rank
    out_features, in_features = pair.shape
    # A single bare parameter has the shapes of a linear layer, and counts as one unless it is anchored: then
    # `lora_A.weight` is not the parameter.
    if isinstance(pair.module, ParamWrapper) and type(A) is not nn.Linear:
        return False
    if not isinstance(A, nn.Linear) or not isinstance(B, nn.Linear):
        return False
    # Fused experts keep (experts * r, in) in an nn.Linear. A sharded weight does not show its shape.
    return (A.out_features, A.in_features, B.out_features, B.in_features) == (r, in_features, out_features, r)
