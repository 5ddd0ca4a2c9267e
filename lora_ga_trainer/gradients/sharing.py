"""Weights that the loss depends on in more ways than through their adapted layer."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..adapters.layer import AdaptedLayer


logger = logging.getLogger(__name__)

# Functions whose result does not depend on the values of a tensor, or is cut off from its gradient.
_VALUE_FREE = frozenset({"detach", "detach_", "size", "stride"})
# Those that read of any argument but the first only what it is like.
_READ_FIRST = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})


class WeightUses(TorchFunctionMode):
    """
    Finds the layers whose weight the loss also depends on outside their own forward pass.

    Such a weight is tied to another module (a `lm_head` to the embedding), or handed to a function
    (`F.linear(h, layer.weight)`). The adapter changes neither use, so `G` leaves them out.

    Args:
        model: the model that holds the layers.
        layers: the layers to look at.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
        super().__init__()
        self.layers = layers
        self._shared = _tied(model, layers)
        self._inside: Counter[str] = Counter()
        # A frozen weight requires no grad, nor does what is made of it alone: it is followed until it meets a tensor
        # that does. Weak: nothing lives longer for being followed.
        self._made_of: Any = WeakIdKeyDictionary()

    @property
    def found(self) -> list[str]:
        """Name such layers, in the model's order."""
        return [layer.name for layer in self.layers if layer.name in self._shared]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch every function of torch that runs while the context is open."""
        with ExitStack() as stack:
            stack.callback(self._made_of.clear)
            stack.callback(self._inside.clear)
            for layer in self.layers:
                if layer.name in self._shared or not layer.has_inputs:
                    continue
                self._made_of[layer.weight] = layer.name
                self._hook(layer, stack)
            stack.enter_context(self)
            yield

    def _hook(self, layer: AdaptedLayer, stack: ExitStack) -> None:
        """Count the forward passes of PEFT's layer, which reads the weight in ways of its own (DoRA's norm)."""

        def enter(*_: Any) -> None:
            self._inside[layer.name] += 1

        def leave(*_: Any) -> None:
            self._inside[layer.name] -= 1

        stack.callback(layer.module.register_forward_pre_hook(enter).remove)
        stack.callback(layer.module.register_forward_hook(leave, always_call=True).remove)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and torch.is_grad_enabled():
            for name in self._weights_in(func, args, kwargs):
                if self._inside[name] == 0:
                    self._follow(name, result)
        return result

    def _weights_in(self, func: Any, args: Any, kwargs: Any) -> set[str]:
        function = getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is torch.Tensor.data or function in _VALUE_FREE:
            return set()
        if function.endswith("_like") or function.startswith("new_"):
            return set()
        values = args[:1] if function in _READ_FIRST else (*args, *kwargs.values())
        flat = [entry for value in values for entry in (value if isinstance(value, (list, tuple)) else (value,))]
        return {self._made_of[entry] for entry in flat if isinstance(entry, Tensor) and entry in self._made_of}

    def _follow(self, name: str, result: Tensor) -> None:
        if result.requires_grad:
            self._shared.add(name)
        elif result.is_floating_point():
            self._made_of[result] = name


def _tied(model: nn.Module, layers: Sequence[AdaptedLayer]) -> set[str]:
    """Name the layers whose weight is a parameter of another module, too."""
    # Of a module with a trained copy only the copy runs.
    asleep = {
        id(module)
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for module in wrapper.original_module.modules()
    }
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in () if id(module) in asleep else module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(module))
    return {layer.name for layer in layers if owners.get(id(layer.weight), set()) - {id(layer.base)}}


def name_shared(shared: Sequence[str]) -> None:
    """Name in a warning the layers whose weight has other uses."""
    if shared:
        logger.warning(
            "The weights of %d adapted layers have other uses, too (tied to another module, or handed to a function): "
            "%s. An adapter changes what its layer computes and no other use, so their start comes of the gradient "
            "through the layer alone.",
            len(shared),
            ", ".join(shared),
        )
