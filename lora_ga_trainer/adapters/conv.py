"""Convolutions that carry LoRA: linear layers whose inputs are the patches that the kernel sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from .layer import AdaptedLayer
from .storage import AnchoredA, AnchoredB


class AnchoredConvA1d(AnchoredA, nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.tied(), self.bias)


class AnchoredConvB1d(AnchoredB, nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.frozen(), self.bias)


class AnchoredConvA2d(AnchoredA, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.tied(), self.bias)


class AnchoredConvB2d(AnchoredB, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.frozen(), self.bias)


class AnchoredConvA3d(AnchoredA, nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.tied(), self.bias)


class AnchoredConvB3d(AnchoredB, nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.frozen(), self.bias)


_ANCHORED: dict[type[nn.Module], tuple[type[AnchoredA], type[AnchoredB]]] = {
    nn.Conv1d: (AnchoredConvA1d, AnchoredConvB1d),
    nn.Conv2d: (AnchoredConvA2d, AnchoredConvB2d),
    nn.Conv3d: (AnchoredConvA3d, AnchoredConvB3d),
}


@dataclass(frozen=True)
class AdaptedConv(AdaptedLayer):
    """
    A convolution without groups or dilation, seen as the linear layer that maps patches to channels.

    Its `G` is `(out, in * prod(kernel))`, the gradient of the weight `(out, in, *kernel)` with its last axes
    flattened.
    """

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(cast(Any, self.base).kernel_size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features * math.prod(self.kernel)

    def anchored_kinds(self) -> tuple[type[AnchoredA], type[AnchoredB]]:
        return next(kinds for kind, kinds in _ANCHORED.items() if isinstance(self.base, kind))

    def as_stored(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A = A.unflatten(1, (self.module.in_features, *self.kernel))
        return A, B.reshape(*B.shape, *[1 for _ in self.kernel])

    def dense_weight(self) -> Tensor:
        return super().dense_weight().reshape(self.shape)


def require_plain_conv(name: str, base: nn.Module, uses_dora: bool) -> None:
    """
    Refuse a convolution whose adapter is not a change `B A` of its weight.

    Raises:
        `ValueError`: naming the layer and the option.
    """
    conv = cast(Any, base)
    odd = {
        f"groups={conv.groups}": conv.groups != 1,
        f"dilation={conv.dilation}": set(conv.dilation) != {1},
        f"padding_mode={conv.padding_mode!r}": conv.padding_mode != "zeros",
    }
    for option, found in odd.items():
        if found:
            raise ValueError(
                f"Layer {name}: {type(base).__name__} has {option}, which PEFT's lora_A has not, so that its adapter "
                "is no change `B A` of the weight. Leave the layer out of `target_modules`, or use "
                "LoRAGAConfig(init='none')."
            )
    if uses_dora:
        raise ValueError(
            f"Layer {name}: DoRA on a {type(base).__name__} can't be given another start. Leave the layer out of "
            "`target_modules`, or set `use_dora=False`."
        )
