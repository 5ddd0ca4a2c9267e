"""Gradients of the parameters that are trained: computed along with the probe's backward pass, and thrown away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def preserved_leaves(model: nn.Module) -> Iterator[None]:
    """
    Let parameters require grad as in training, with no gradient in them, and give back what they had.

    A loss may look at what requires grad (a regulariser of the adapter, say), and change it: PEFT switches the
    parameters of an adapter on again after each time that it was disabled or changed for another one, as losses with a
    reference do.
    """
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    drop_gradients(model)
    try:
        yield
    finally:
        for parameter, requires_grad, gradient in before:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def discarded_gradients(model: nn.Module) -> Iterator[None]:
    """
    Let a backward pass inside leave no gradient in parameters, and call no hook on them.

    In training such hooks reduce (DeepSpeed's), step (layerwise optimizers) or count (a user's own).
    """
    # Emptied in place: torch keeps reading these dictionaries, also after they are taken off the parameter.
    found = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()]
    hooks = [(held, dict(held)) for of_parameter in found for held in of_parameter if held]
    for held, _ in hooks:
        held.clear()
    try:
        yield
    finally:
        for held, entries in hooks:
            held.update(entries)
        drop_gradients(model)


def drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = None
