"""Weights that are adapted themselves: fused experts and other bare parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..engines.parameters import is_sharded, read_parameter
from .layer import AdaptedLayer
from .storage import AnchoredA, AnchoredB, AnchoredExpertsA, AnchoredExpertsB


@dataclass(frozen=True)
class AdaptedParameter(AdaptedLayer):
    """
    A weight that is adapted itself: PEFT adds `s B A` to it, and a module computes with the sum in ways of its own.

    So the layer has no input and output, and its gradient is read where the sum is handed over.
    """

    has_inputs = False

    @property
    def parameter_name(self) -> str:
        """The name of the weight inside `base`."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        return getattr(self.base, self.parameter_name)

    @property
    def user(self) -> nn.Module:
        """The module that computes with the weight."""
        return self.base

    def anchored_kinds(self) -> tuple[type[AnchoredA], type[AnchoredB]]:
        return AnchoredExpertsA, AnchoredExpertsB

    def by_expert(self, stored: Tensor) -> Tensor:  # as `weight` -> (E, out, in), a view
        """Bring the weight, or a gradient of its shape, to the orientation of `G`."""
        return stored[None]

    def dense_weights(self) -> Tensor:  # (E, out, in)
        return self.by_expert(read_parameter(self.weight))

    def stored_weight(self) -> list[Tensor]:
        return [read_parameter(self.weight)]


@dataclass(frozen=True)
class AdaptedExperts(AdaptedParameter):
    """The fused weights of all experts of a layer, or any other bare parameter of `target_parameters`."""

    @property
    def weight(self) -> Tensor:
        """`(E, out, in)`, `(E, in, out)` where the model stores it so, or `(out, in)`."""
        return self.module.get_param()

    @property
    def parameter_name(self) -> str:
        """What `target_parameters` calls the weight inside `base`."""
        return self.module.parameter_name

    @property
    def experts(self) -> int:
        return self.module.num_experts

    @property
    def matrices(self) -> list[str]:
        return [f"{self.name}[{expert}]" for expert in range(self.experts)]

    def by_expert(self, stored: Tensor) -> Tensor:  # as `weight` -> (E, out, in), a view
        if stored.dim() == 2:
            return stored[None]
        return stored.mT if getattr(self.base, "is_transposed", False) else stored

    def require_whole(self, copies: int) -> None:
        if self.is_anchored and copies > 1:
            raise ValueError(
                f"{self.name}: nn.DataParallel, which the Trainer uses on {copies} GPUs without a launcher, can't "
                "copy an anchored parameter. Start with `accelerate launch`, which gives each GPU a process, or show "
                "one GPU with CUDA_VISIBLE_DEVICES."
            )
        if is_sharded(self.weight):
            raise ValueError(
                f"{self.name}: this engine spreads the parameter over processes, where PEFT can't adapt it. Leave it "
                "out of `target_parameters`, or use an engine that keeps it whole."
            )
