"""Copies of trained parameters that a model computes with in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ..engines.parameters import is_partitioned, read_parameter


# Modules that hold others and are never called.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# Modules that compute with the parameters of modules inside them without calling those.
_READERS = (LoraLayer, AuxiliaryTrainingWrapper)


class TrainedCopies:
    """
    Whole copies of parameters, fp32 at least, for passes and steps that are not training.

    The engine has no part in it: no parameter of the model is written, gets a gradient or is stepped, whether it is
    whole here or spread over processes. bf16 parameters would round small steps away, their copies don't.

    Args:
        model: that computes with the parameters.
        parameters: to copy. One that has several names in the model (tied heads) has one copy. Collective.

    Attributes:
        parameters: those that were copied, once each.
        values: the copies, in the same order; leaves that require grad.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list({id(parameter): parameter for parameter in parameters}.values())
        self.values = [_copy(parameter) for parameter in self.parameters]
        self._copy_of = dict(zip(map(id, self.parameters), self.values, strict=True))
        self._hosts = _find_hosts(model, set(self._copy_of))

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """Let the model compute with the copies, in the dtypes of its own parameters."""
        with ExitStack() as stack:
            for host, named in self._hosts.items():
                stack.enter_context(self._computing(host, named))
            yield

    @contextmanager
    def in_modules(self) -> Iterator[None]:
        """Let the copies stand in the model as its parameters, for what looks them up there, not for a pass."""
        with ExitStack() as stack:
            for host, named in self._hosts.items():
                copies: dict[str, Tensor] = {name: self._copy_of[id(parameter)] for name, parameter in named.items()}
                stack.enter_context(_reparametrize_module(host, copies))
            yield

    @contextmanager
    def _computing(self, host: nn.Module, named: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """
        Let one module compute with the copies; what it held is back after each call.

        Inside the call, not around it: an engine that gathers parameters puts them into the module just before.
        """
        forward, own = host.forward, vars(host).get("forward")

        def with_copies(*args: Any, **kwargs: Any) -> Any:
            tensors = {name: self._copy_of[id(of)].to(of.dtype) for name, of in named.items()}
            with _reparametrize_module(host, tensors):
                return forward(*args, **kwargs)

        host.forward = with_copies
        try:
            yield
        finally:
            del host.forward
            if own is not None:
                host.forward = own


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    value = read_parameter(parameter)
    return nn.Parameter(value.to(torch.promote_types(value.dtype, torch.float32)).clone())


def _find_hosts(model: nn.Module, wanted: set[int]) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """Map every module whose call computes with wanted parameters to these, by their names inside it."""
    hosts: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def visit(module: nn.Module, host: nn.Module, prefix: str) -> None:
        if not isinstance(module, _CONTAINERS):
            host, prefix = module, ""
        # ZeRO-3 gathers parameters before the call of the very module that holds them, and takes no others there.
        reads = isinstance(module, _READERS) and not any(map(is_partitioned, module.parameters()))
        for name, parameter in module.named_parameters(recurse=reads, remove_duplicate=False):
            if id(parameter) in wanted:
                hosts.setdefault(host, {})[prefix + name] = parameter
        if not reads:
            for name, child in module.named_children():
                visit(child, host, f"{prefix}{name}.")

    visit(model, model, "")
    return hosts
