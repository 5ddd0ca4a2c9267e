"""
Read `(x, dL/dy)` of frozen linear layers, and `dL/dW` of bare parameters, in an ordinary backward pass.

A loss may hold an inner gradient (`autograd.grad(..., create_graph=True)`, a gradient penalty). The inner pass
applies the weight a second time, `h = g W` with `g` the inner gradient at the output, and the loss depends on `h`. So
the outer pass owes the weight a second part, `g^T u` with `u = dL/dh`. Every application is enclosed by two
identities, [`_Enter`] and [`_Leave`]. Where their own backward passes are recorded they enclose the transposed
application in turn, so what is shown adds up to `dL/dW` to every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .rows import OneHot, rows_of


# (index of the module, x (N, in), dy (N, out), whether they are those of the module's own call)
Sink = Callable[[int, Tensor | OneHot, Tensor, bool], None]
ParameterSink = Callable[[int, Tensor], None]  # (index of the parameter, dL/dW in the shape of W)


class _Use:
    """
    One application of a weight: `y = x W^T`, or one that backward passes made of it: `h = g W`, `W u`, ...

    Args:
        show: takes `x` and `dy` whose product is added to `dL/dW`, and whether they are those of `y = x W^T` itself.
        made_from: the application of which this is the transposed one; none for `y = x W^T`.
        entered: what went in, where the application began in a backward pass.
    """

    def __init__(
        self,
        show: Callable[[Tensor, Tensor, bool], None],
        made_from: _Use | None = None,
        entered: Tensor | None = None,
    ) -> None:
        self.show, self.own, self.entered = show, made_from is None, entered
        self.is_transposed: bool = made_from is not None and not made_from.is_transposed
        self.next: _Use | None = None  # begun by `_Leave`, to be ended by `_Enter` of the same backward pass

    def add(self, entered: Tensor, gradient: Tensor) -> None:
        """Show what went in and the gradient of what came out."""
        # Of `h = g W` the gradient is `g^T u`: what went in stands where `dy` does.
        x, dy = (gradient, entered) if self.is_transposed else (entered, gradient)
        self.show(x, dy, self.own)


class _Enter(torch.autograd.Function):
    """The identity on what goes into a weight; in its backward pass the transposed application ends."""

    @staticmethod
    def forward(ctx: Any, entering: Tensor, use: _Use) -> Tensor:
        ctx.use = use
        return entering.view_as(entering)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        transposed, ctx.use.next = ctx.use.next, None
        if transposed is not None:
            gradient = _leave(gradient, transposed.entered, transposed)
        return gradient, None


class _Leave(torch.autograd.Function):
    """The identity on what comes out of a weight; its backward pass shows what went in and the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        leaving: Tensor,
        entered: Tensor,
        root: Tensor,  # (), requires grad: keeps the graph alive where nothing upstream does
        use: _Use,
    ) -> Tensor:
        # save_for_backward, not an attribute: activation checkpointing frees and recomputes only what is saved so.
        ctx.save_for_backward(entered)
        ctx.use = use
        return leaving.view_as(leaving)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (entered,) = ctx.saved_tensors
        use = ctx.use
        use.add(entered.detach(), gradient.detach())
        if torch.is_grad_enabled():  # create_graph: this pass is recorded, and may be differentiated
            # Detached: with its graph it would be part of a cycle through the graph, which nothing frees.
            use.next = _Use(use.show, use, gradient.detach())
            gradient = _Enter.apply(gradient, use.next)
        return gradient, None, None, None


def _leave(leaving: Tensor, entered: Tensor | None, use: _Use) -> Tensor:
    root = torch.zeros((), device=leaving.device, requires_grad=True)
    return _Leave.apply(leaving, entered, root, use)


@contextmanager
def tapped(
    modules: Mapping[str, nn.Module], sink: Sink, counts: Callable[[int], bool] = lambda index: True
) -> Iterator[None]:
    """
    Show every `(x, dy)` of `modules` to `sink` while the context is open.

    For `y = x W^T + b` with `x (N, in)` and `dy = dL/dy (N, out)` the gradient of the weight is `dy^T x`, summed over
    all that is shown. No parameter needs `requires_grad` and the weight itself is never read, so sharded and quantised
    weights need nothing special.

    Args:
        modules: by name, layers that map `(..., in)` to `(..., out)`, convolutions or embeddings, which take the input
            as first argument.
        sink: called in the backward pass with the module's index, `x` and `dy` flattened to two dimensions (the input
            of an embedding as one-hot rows) and in the dtypes of the forward and backward pass, and `True`. A pair
            that is owed to an inner gradient in the loss is no input and output gradient of the module; it comes with
            `False`.
        counts: asked with the module's index, in the forward pass, whether this call is to be shown.

    Raises:
        `ValueError`: in the forward pass, naming a module whose output doesn't depend on its input for autograd. The
            gradient of every layer below would be zero or incomplete without a sign of it. Also naming a module that
            a transform of `torch.func` runs, which has graphs of its own.
    """
    handles = []
    try:
        for index, (name, module) in enumerate(modules.items()):
            tap = _ModuleTap(name, module, index, sink, counts)
            handles.append(module.register_forward_pre_hook(tap.before, with_kwargs=True))
            handles.append(module.register_forward_hook(tap.after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ModuleTap:
    """The two hooks around the forward pass of one module."""

    def __init__(self, name: str, module: nn.Module, index: int, sink: Sink, counts: Callable[[int], bool]) -> None:
        self.name, self.module, self.index, self.sink, self.counts = name, module, index, sink, counts
        self.use: _Use | None = None  # of the call that runs

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.use = None
        # Without gradients runs the first forward of a reentrant checkpoint, and a reference.
        if not torch.is_grad_enabled() or not self.counts(self.index):
            return None
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ValueError(
                f"Layer {self.name}: the loss runs it inside a transform of torch.func (grad, jvp, vmap, ...), where "
                "the gradient of its weight can't be read. Write the inner gradient with "
                "`torch.autograd.grad(..., create_graph=True)`, or use LoRAGAConfig(init='none')."
            )
        self.use = _Use(self._show)
        x = _first(args, kwargs)
        if not x.requires_grad:
            return None
        entering = _Enter.apply(x, self.use)
        return ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): entering})

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        use, self.use = self.use, None
        if use is None:
            return None
        x = _first(args, kwargs)
        if x.requires_grad and not y.requires_grad:
            weight = type(getattr(module, "weight", None)).__name__
            raise ValueError(
                f"Layer {self.name}: {type(module).__name__} ({weight}) passes no gradient from its output to its "
                "input, so the gradients of the layers before it can't be read. "
                "Load the base in a format that can be trained through (weight-only quantisation, say), or use "
                "LoRAGAConfig(init='none')."
            )
        return _leave(y, x, use)

    def _show(self, x: Tensor, dy: Tensor, own: bool) -> None:
        for rows in rows_of(self.module, x, dy):
            self.sink(self.index, *rows, own)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


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
def tapped_parameters(
    parameters: Sequence[tuple[nn.Module, nn.Module, str]],
    sink: ParameterSink,
    counts: Callable[[int], bool] = lambda index: True,
) -> Iterator[None]:
    """
    Show `dL/dW` of every use of adapted parameters to `sink` while the context is open.

    Autograd forms the whole gradient of one parameter, hands it to the sink as soon as it is complete and frees it
    when the sink returns, unless the sink keeps it. The parameters need no `requires_grad`.

    Args:
        parameters: modules that compute with a parameter, modules that hold it, and its name there. A forward counts
            while the parameter is parametrised (`torch.nn.utils.parametrize`), as PEFT's adapters of
            `target_parameters` do unless they are switched off, or while a plain tensor stands in its place, as
            `torch.func.functional_call` does. A parametrised value must be cached, or the sink sees one part of the
            gradient for each time that the forward reads it.
        sink: called in the backward pass with the index of the parameter and `dL/dW` in the shape of `W`.
        counts: asked with the index of the parameter, in the forward pass, whether this call is to be shown.
    """
    handles = []
    try:
        for index, (user, holder, name) in enumerate(parameters):
            handles.append(user.register_forward_pre_hook(_make_pre_hook(index, holder, name, sink, counts)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_pre_hook(
    index: int, holder: Any, name: str, sink: ParameterSink, counts: Callable[[int], bool]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def tap(W: Tensor) -> Tensor:
        root = torch.zeros((), device=W.device, requires_grad=True)
        return _ParameterTap.apply(W, root, lambda dW: sink(index, dW))

    def hook(user: nn.Module, args: tuple[Any, ...]) -> None:
        # Without gradients runs the first forward of a reentrant checkpoint, and a reference.
        if not torch.is_grad_enabled() or not counts(index):
            return
        value = holder._parameters.get(name)
        # Switched off, an adapter parametrises nothing: so runs the reference of losses that have one.
        if name in getattr(holder, "parametrizations", {}):
            # Made for this forward and thrown away after it: the hook on it needs no removal. The last one gives the
            # value that the forward sees, adapter included.
            holder.parametrizations[name][-1].register_forward_hook(lambda module, args, W: tap(W))
        elif value is not None and not isinstance(value, nn.Parameter):
            # What stands in for the parameter is taken away after this forward, and the tap with it.
            holder._parameters[name] = tap(value)

    return hook
