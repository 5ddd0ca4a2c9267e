"""One layer that carries LoRA: its shapes, scale, factors and weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..engines.parameters import read_parameter
from .dense import read_dense, require_unpacked
from .storage import AnchoredA, AnchoredB, AnchoredLinearA, AnchoredLinearB


@dataclass(frozen=True)
class AdaptedLayer:
    """
    One linear layer of the base model with the LoRA factors that PEFT put around it.

    [`find_adapted_layers`] lists those of a model. The weight that is adapted is `W + s B A`.

    Args:
        name: inside the base model, as `base_model.named_modules()` spells it.
        module: PEFT's layer.
        adapter: name of the adapter.
    """

    # What the factors are called behind the layer's name in the files of an adapter.
    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    # Whether the layer has an input `x` and an output `y` of its own, from which its gradient can be read.
    has_inputs: ClassVar[bool] = True

    name: str
    module: LoraLayer
    adapter: str

    @property
    def base(self) -> nn.Module:
        """The frozen layer: maps `x (..., in)` to `y (..., out)`."""
        return self.module.get_base_layer()

    @property
    def weight(self) -> Tensor:
        """The frozen weight as it is stored."""
        return cast(Tensor, self.base.weight)

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
    def stored_rank(self) -> int:
        """The rank that PEFT knows: 2r in an anchored layer, r in any other."""
        return self.module.r[self.adapter]

    @property
    def rank(self) -> int:
        """r, the rank of the factors that learn."""
        return self.stored_rank // 2 if self.is_anchored else self.stored_rank

    @property
    def is_anchored(self) -> bool:
        """Whether the factors are in delta form and tied."""
        return isinstance(self.lora_A, AnchoredA)

    @property
    def acts(self) -> bool:
        """Whether a forward pass now would add the adapter: it is active, and neither switched off nor merged."""
        module = self.module
        return not module.disable_adapters and not module.merged and self.adapter in module.active_adapters

    @property
    def key(self) -> str:
        """What the names of its factors in an adapter's file begin with."""
        return self.name

    @property
    def scaling(self) -> float:
        """PEFT's `scaling`."""
        return self.module.scaling[self.adapter]

    @property
    def s(self) -> float:
        """The adapted weight is `W + s B A`: PEFT's `scaling`, where PEFT adds the product once."""
        return self.scaling

    @property
    def lora_A(self) -> nn.Linear:
        return self.module.lora_A[self.adapter]

    @property
    def lora_B(self) -> nn.Linear:
        return self.module.lora_B[self.adapter]

    @property
    def stored_A(self) -> nn.Parameter:
        """The parameter of `lora_A`: `(experts * stored_rank, in)`."""
        return cast(nn.Parameter, self.lora_A._parameters["weight"])

    @property
    def stored_B(self) -> nn.Parameter:
        """The parameter of `lora_B`: `(out, stored_rank * experts)`."""
        return cast(nn.Parameter, self.lora_B._parameters["weight"])

    @property
    def lora_bias(self) -> nn.Parameter | None:
        """The bias of `lora_B`, where the adapter has one."""
        return self.lora_B.bias

    def anchored_kinds(self) -> tuple[type[AnchoredA], type[AnchoredB]]:
        """Return the modules that `lora_A` and `lora_B` become when the layer is anchored."""
        return AnchoredLinearA, AnchoredLinearB

    def as_stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Bring matrices `(E * r, in)` and `(out, r * E)` to the shapes of `stored_A` and `stored_B`."""
        return A, B

    def require_whole(self, copies: int) -> None:
        """
        Refuse a layer whose factors can't be written where the model runs.

        Args:
            copies: of the model that `nn.DataParallel` makes in this process.

        Raises:
            `ValueError`: naming the layer. A linear layer is never refused.
        """

    @property
    def variant(self) -> str | None:
        """The name of the variant of LoRA that PEFT computes here; `None` for plain LoRA and for DoRA."""
        return variant_of(self.module, self.adapter)

    @property
    def uses_dora(self) -> bool:
        return self.adapter in self.module.lora_magnitude_vector

    def dense_weight(self) -> Tensor:  # (out, in)
        """
        Return `W` dequantised, whole and in the orientation of `G`; a copy or a view, never to be written to.

        Collective where the weight is sharded.

        Raises:
            `ValueError`: if an engine or a quantiser keeps the weight in a form that can't be read.
        """
        return read_dense(self.name, self.base, self.shape)

    def dense_weights(self) -> Tensor:  # (E, out, in)
        """Return [`dense_weight`] of every matrix of the layer: one, or one an expert."""
        return self.dense_weight()[None]

    def stored_weight(self) -> list[Tensor]:
        """
        List the tensors that `W` is stored as: itself, or the codes, scales and offsets of a quantised weight.

        The bias is left out: an adapter may train it. Collective where the weight is sharded.

        Raises:
            `ValueError`: if a quantiser keeps the weight in a form that can't be read.
        """
        require_unpacked(self.name, self.weight)
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


def variant_of(module: LoraLayer, adapter: str) -> str | None:
    """Name the variant of LoRA that a module of PEFT computes; `None` for plain LoRA and for DoRA."""
    variant = module.lora_variant.get(adapter)
    if variant is None or adapter in module.lora_magnitude_vector:
        return None
    return type(variant).__name__.removesuffix("LinearVariant")


def _parts(value: Tensor) -> list[Tensor]:
    """Take apart a tensor that wraps others (codes and scales)."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(value, name))]
