"""
Storage of LoRA factors: PEFT's layout of fused experts, and the modules of factors in delta form.

Fused experts keep one LoRA pair an expert in two matrices:

    lora_A.weight  (E * r, in)   seen as (E, r, in): the rows of one expert lie together
    lora_B.weight  (out, r * E)  seen as (out, r, E): the columns of one expert lie E apart

A linear layer is the case `E = 1`. A convolution is as well, with the axes of its kernel behind the others:
`lora_A.weight (r, in, *kernel)`, `lora_B.weight (out, r, 1, ...)`.
An embedding keeps `lora_embedding_A (r, in)`, `lora_embedding_B (out, r)` as bare parameters (`adapters.embedding`).
See `lora_ga_trainer.adapters.anchor` for what delta form is and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn


def split_A(stored: Tensor, experts: int) -> Tensor:  # (E * r, in) -> (E, r, in), a view
    return stored.unflatten(0, (experts, -1))


def join_A(A: Tensor) -> Tensor:  # (E, r, in) -> (E * r, in)
    return A.flatten(0, 1)


def split_B(stored: Tensor, experts: int) -> Tensor:  # (out, r * E) -> (E, out, r), a view
    return stored.unflatten(1, (-1, experts)).movedim(2, 0)


def join_B(B: Tensor) -> Tensor:  # (E, out, r) -> (out, r * E)
    return B.movedim(0, 2).flatten(1, 2)


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


class AnchoredA(nn.Module):
    """`lora_A` in delta form: its weight is `[A; A - A0] (2r, in, *kernel)` with tied halves."""

    experts = 1
    weight: Tensor

    @property
    def stored(self) -> Tensor:
        return self.weight  # a plain tensor in the copies that nn.DataParallel makes for other devices

    def held(self) -> dict[str, Tensor]:
        """Return the parameters in delta form, by their name in this module."""
        return {"weight": self.stored}

    def tie(self, weight: Tensor) -> Tensor:
        return _TieHalves.apply(weight, self.experts)

    def tied(self) -> Tensor:
        return self.tie(self.stored)


class AnchoredLinearA(AnchoredA, nn.Linear):
    """[`AnchoredA`] of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., 2r)
        return F.linear(x, self.tied(), self.bias)


class AnchoredB(nn.Module):
    """`lora_B` in delta form: its weight is `[B - B0, B0] (out, 2r, 1, ...)` whose second half is frozen."""

    weight: Tensor

    @property
    def stored(self) -> Tensor:
        return self.weight

    def held(self) -> dict[str, Tensor]:
        """Return the parameters in delta form, by their name in this module."""
        return {"weight": self.stored}

    def freeze(self, weight: Tensor) -> Tensor:
        return _FreezeSecondHalf.apply(weight)

    def frozen(self) -> Tensor:
        return self.freeze(self.stored)


class AnchoredLinearB(AnchoredB, nn.Linear):
    """[`AnchoredB`] of a linear layer."""

    def forward(self, x: Tensor) -> Tensor:  # (..., 2r) -> (..., out)
        return F.linear(x, self.frozen(), self.bias)


class AnchoredExpertsA(AnchoredLinearA):
    """
    `lora_A` of a bare parameter (fused experts, the projections of attention) in delta form, `(E * 2r, in)`.

    PEFT never calls it: it reads `weight` and adds the product of the factors to the weight itself. So `weight` gives
    the tied halves inside [`making_product`], and the parameter to everybody else: for saving, loading, copying and
    `get_parameter` this is a plain `nn.Linear`.
    """

    makes_product = False

    @property
    def stored(self) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters["weight"])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # an attribute in torch; here it depends on who reads it
        return self.tied() if self.makes_product and torch.is_grad_enabled() else self.stored


class AnchoredExpertsB(AnchoredLinearB):
    """`lora_B` of a bare parameter in delta form, `(out, 2r * E)`; read as [`AnchoredExpertsA`] is."""

    makes_product = False

    @property
    def stored(self) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters["weight"])

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # an attribute in torch; here it depends on who reads it
        return self.frozen() if self.makes_product and torch.is_grad_enabled() else self.stored


@contextmanager
def making_product(module: LoraLayer, adapter_name: str) -> Iterator[None]:
    """Let PEFT read the factors of a bare parameter as tied and frozen halves, where they are anchored."""
    factors = [
        factor
        for factor in (module.lora_A[adapter_name], module.lora_B[adapter_name])
        if isinstance(factor, (AnchoredExpertsA, AnchoredExpertsB))
    ]
    for factor in factors:
        factor.makes_product = True
    try:
        yield
    finally:
        for factor in factors:
            factor.makes_product = False


class AnchoredParamWrapper(ParamWrapper):
    """PEFT's adapter of a bare parameter, whose products are made of tied halves where its factors are anchored."""

    def get_delta_factors(self, adapter_name: str) -> Any:
        with making_product(self, adapter_name):
            return super().get_delta_factors(adapter_name)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        with making_product(self, adapter_name):
            return super().get_delta_weight(adapter_name, *args, **kwargs)


def anchored_parameter_names(model: nn.Module) -> set[str]:
    """Name the anchored parameters of `model`. Weight decay must leave them alone, or it would untie their halves."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, (AnchoredA, AnchoredB))
        for key in module.held()
    }


def counted_norm(
    model: nn.Module, read: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter.grad
) -> Tensor:
    """Return the global norm of a model's gradients, with the gradient of an anchored `A` counted once."""
    return torch.nn.utils.get_total_norm(list(counted_gradients(model, read)))


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
    anchored = [module for module in model.modules() if isinstance(module, AnchoredA)]
    tied = {id(held): module.experts for module in anchored for held in module.held().values()}
    for parameter in model.parameters():
        gradient = read(parameter)
        if gradient is None:
            continue
        experts = tied.get(id(parameter), 0)
        if experts > 1:
            yield split_A(gradient, experts).chunk(2, dim=1)[0]
        else:
            yield gradient.chunk(2, dim=0)[0] if experts else gradient
