"""LoRA-Pro around any optimizer: it steps with corrected gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..maths.lora_pro import FLOOR
from .batches import batch_pairs, each_corrected, require_finite, require_floor
from .pairs import pairs_with_gradients, trained_pairs


_SHARED_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class LoRAProOptimizer(Optimizer):
    """
    Let `inner` step with LoRA-Pro's gradients (arXiv 2407.18242, Theorem 2.1).

        optimizer = LoRAProOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), model)

    During `step` the `.grad` of every pair of LoRA factors is replaced by the corrected one, and given back
    afterwards, as a step of torch leaves gradients alone. Every other parameter (a head, biases, DoRA's magnitude) is
    `inner`'s affair, and so is all state: `state_dict()` is `inner`'s own, so a checkpoint is that of a run without
    the correction. No memory is kept between steps.

    Clip before the step, as usual: the norm is then that of the gradients of the loss. The correction is linear, so
    the corrected gradients are scaled by the same factor; a norm taken after it would depend on how the product `B A`
    is split between its factors, and be huge while `B` is small. fp16 gradients must be unscaled first;
    `GradScaler.step` does that (and skips the step on overflow), as does Accelerate.

    `B` counts as no shorter than `A` (see [`correct_gradients`]), so plain LoRA's `B = 0` is a sound start.

    A pair of which a factor has no gradient is left to `inner` as it is.

    Args:
        inner: any torch optimizer whose `step` does not need a closure.
        model: the model that holds the factors; every adapter of which `inner` has both factors is corrected.
        error_if_nonfinite: raise on gradients that are not finite, at the cost of waiting for the device in each
            step. By default they are passed on, as torch does: that pair, and no other, becomes NaN.
        floor: of [`correct_gradients`]. 0 is the theorem as it stands; do not use it with Adam from `B = 0`.

    Raises:
        `ValueError`: naming a parameter that can't be corrected.
        `TypeError`: if `inner` is not a torch optimizer.
    """

    def __init__(
        self, inner: Optimizer, model: nn.Module, error_if_nonfinite: bool = False, floor: float = FLOOR
    ) -> None:
        _require_wrappable(inner)
        require_floor(floor, "LoRAProOptimizer")
        self.inner = inner
        self.model = model
        self.error_if_nonfinite = error_if_nonfinite
        self.floor = floor
        # Optimizer.__init__ would make groups and a state of its own beside those of `inner`. This sets up hooks only.
        super().__setstate__({})
        # Hooks on state_dict() are called by `inner`, whose state_dict() it is. So both share the same hooks.
        self.__dict__.update({name: getattr(inner, name) for name in _SHARED_HOOKS})
        self.pairs = trained_pairs(model, inner.param_groups, "LoRAProOptimizer")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def state(self) -> Any:
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to `inner` and look for pairs again; a group that can't be corrected is not added."""
        self.inner.add_param_group(param_group)
        try:
            self.pairs = trained_pairs(self.model, self.inner.param_groups, "LoRAProOptimizer")
        except ValueError:
            self.inner.param_groups.pop()
            raise

    def train(self) -> None:
        """Pass on to an `inner` that has modes (schedule-free)."""
        train = getattr(self.inner, "train", None)
        if callable(train):
            train()

    def eval(self) -> None:
        """Pass on to an `inner` that has modes (schedule-free)."""
        evaluate = getattr(self.inner, "eval", None)
        if callable(evaluate):
            evaluate()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Correct the gradients and let `inner` step. A `closure` is called once, before the correction."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._corrected():
            self.inner.step()
        return loss

    @contextmanager
    def _corrected(self) -> Iterator[None]:
        """Put the corrected gradients in the place of the pairs' own, and give those back, also after an error."""
        raw: list[tuple[nn.Parameter, Tensor | None]] = []
        try:
            for parameter, gradient in self._corrections():
                raw.append((parameter, parameter.grad))
                parameter.grad = gradient
            yield
        finally:
            for parameter, before in raw:
                parameter.grad = before

    def _corrections(self) -> list[tuple[nn.Parameter, Tensor]]:
        with torch.no_grad(), torch.autocast(self.pairs[0].lora_A.weight.device.type, enabled=False):
            return self._correct_pairs()

    def _correct_pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        batches = batch_pairs(pairs_with_gradients(self.pairs, "LoRAProOptimizer"))
        if self.error_if_nonfinite:
            require_finite(batches, "LoRAProOptimizer")
        corrections: list[tuple[nn.Parameter, Tensor]] = []
        for batch, dAs, dBs in each_corrected(batches, floor=self.floor):
            corrections += zip(batch.weights_A, dAs, strict=True)
            corrections += zip(batch.weights_B, dBs, strict=True)
        return corrections


def _require_wrappable(inner: Any) -> None:
    if not isinstance(inner, Optimizer):
        raise TypeError(f"LoRAProOptimizer: inner is a {type(inner).__name__}, not a torch.optim.Optimizer.")
    name = type(inner).__name__
    if name in ("LoRAProOptimizer", "LoRAProAdamW", "RiemannianPreconditionedOptimizer"):
        raise ValueError(f"LoRAProOptimizer: {name} changes the gradients itself. Wrap a plain optimizer.")
    closure = inspect.signature(type(inner).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"LoRAProOptimizer: {name}.step() needs a closure and would read gradients that were not corrected. Use "
            "an optimizer that steps on the gradients it finds (AdamW, SGD, ...)."
        )
