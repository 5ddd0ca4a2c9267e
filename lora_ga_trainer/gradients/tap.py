"""Read `(x, dL/dy)` of frozen linear layers, and `dL/dW` of bare parameters, in an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .rows import rows_of


Sink = Callable[[int, Tensor, Tensor], None]  # (index of the module, x (N, in), dy (N, out))
ParameterSink = Callable[[int, Tensor], None]  # (index of the parameter, dL/dW in the shape of W)


class _Tap(torch.autograd.Function):
    """The identity on `y` whose backward shows `(x, dy)` to a sink."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,  # (..., out)
        x: Tensor,  # (..., in)
        root: Tensor,  # (), requires grad: keeps the graph alive where nothing upstream does
        sink: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        # save_for_backward, not an attribute: activation checkpointing frees and recomputes only what is saved so.
        ctx.save_for_backward(x)
        ctx.sink = sink
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x.detach(), dy.detach())
        return dy, None, None, None


@contextmanager
def tapped(modules: Mapping[str, nn.Module], sink: Sink) -> Iterator[None]:
    """
    Show every `(x, dy)` of `modules` to `sink` while the context is open.

    For `y = x W^T + b` with `x (N, in)` and `dy = dL/dy (N, out)` the gradient of the weight is `dy^T x`, summed over
    the calls of the module. No parameter needs `requires_grad` and the weight itself is never read, so sharded and
    quantised weights need nothing special.

    Args:
        modules: by name, layers that map `(..., in)` to `(..., out)` and take the input as first positional argument.
        sink: called in the backward pass with the module's index, `x` and `dy` flattened to two dimensions and in the
            dtypes of the forward and backward pass.

    Raises:
        `ValueError`: in the forward pass, naming a module whose output doesn't depend on its input for autograd. The
            gradient of every layer below would be zero or incomplete without a sign of it.
    """
    handles = []
    try:
        for index, (name, module) in enumerate(modules.items()):
            handles.append(module.register_forward_hook(_make_hook(name, index, sink)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_hook(name: str, index: int, sink: Sink) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        def show(x: Tensor, dy: Tensor) -> None:
            for rows in rows_of(module, x, dy):
                sink(index, *rows)

        if not torch.is_grad_enabled():  # the first forward of a reentrant checkpoint
            return None
        if args[0].requires_grad and not y.requires_grad:
            raise ValueError(
                f"Layer {name}: {type(module).__name__} ({type(getattr(module, 'weight', None)).__name__}) passes no "
                "gradient from its output to its input, so the gradients of the layers before it can't be read. Load "
                "the base in a format that can be trained through (weight-only quantisation, say), or use "
                "LoRAGAConfig(init='none')."
            )
        root = torch.zeros((), device=y.device, requires_grad=True)
        return _Tap.apply(y, args[0], root, show)

    return hook


class _ParameterTap(torch.autograd.Function):
    """The identity on `W` whose backward shows `dL/dW` to a sink. It saves nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        W: Tensor,
        root: Tensor,  # (), requires grad: `W` does not
        sink: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.sink = sink
        return W.view_as(W)

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> tuple[Tensor, None, None]:
        ctx.sink(dW.detach())
        return dW, None, None


@contextmanager
def tapped_parameters(parameters: Sequence[tuple[nn.Module, str]], sink: ParameterSink) -> Iterator[None]:
    """
    Show `dL/dW` of every use of parametrised parameters to `sink` while the context is open.

    Autograd forms the whole gradient of one parameter, hands it to the sink as soon as it is complete and frees it
    when the sink returns, unless the sink keeps it. The parameters need no `requires_grad`.

    Args:
        parameters: modules and the names of their parameters. While a module's forward runs, the parameter must be
            parametrised (`torch.nn.utils.parametrize`), as PEFT's adapters of `target_parameters` do, and its value
            cached, or the sink sees one part of the gradient for each time that the forward reads it.
        sink: called in the backward pass with the index of the parameter and `dL/dW` in the shape of `W`.
    """
    handles = []
    try:
        for index, (module, name) in enumerate(parameters):
            handles.append(module.register_forward_pre_hook(_make_pre_hook(index, name, sink)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_pre_hook(index: int, name: str, sink: ParameterSink) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def tap(parametrization: nn.Module, args: tuple[Any, ...], W: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # the first forward of a reentrant checkpoint
            return None
        root = torch.zeros((), device=W.device, requires_grad=True)
        return _ParameterTap.apply(W, root, lambda dW: sink(index, dW))

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        # Made for this forward and thrown away after it: the hook on it needs no removal. The last one gives the value
        # that the forward sees, adapter included.
        module.parametrizations[name][-1].register_forward_hook(tap)

    return hook
