"""State that a forward pass in train mode changes: buffers, counters and other data that modules keep."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .contents import CONTAINERS, remember_container, remember_memory
from .kinds import is_of_engine
from .state import KeptState


# Whole numbers in so many entries are the codes of a quantised weight: they are as large as a model, and stay.
_CODES = 2**16
# Larger parameters that are not trained are not copied, and of smaller ones no more than so many bytes in all.
_BYTES, _ALL_BYTES = 2**20, 2**26
_OWN = frozenset(vars(nn.Module()))  # what torch keeps in every module
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_DATA = (type(None), bool, int, float, complex, str, bytes, Tensor, np.ndarray, *CONTAINERS)


def keep_model(kept: KeptState, model: nn.Module, name: str) -> None:
    """
    Remember the buffers of a model, the data in attributes of its modules, and which hooks it has.

    Buffers are copied, on their device: running statistics, the vectors of a spectral norm, counters, queues. Codes of
    quantised weights (whole numbers, 65,536 or more) are not. A language model has some MiB of buffers; one whose
    weights are quantised in buffers has scales there, about 1/32 of the weights.

    A forward pass may write parameters, too (moving averages of other ones). Those that are trained are copied, and
    others of at most 1 MiB, 64 MiB in all. Of the rest it is seen whether they were written. An engine that has memory
    of its own keeps its parameters itself.

    Args:
        kept: what remembers and gives back.
        model: a forward pass of it runs afterwards.
        name: of it in messages.
    """
    _keep_parameters(kept, model, name)
    for path, module in model.named_modules():
        label = f"{name}.{path}" if path else name
        kept.undo_with(remember_container(module._buffers))
        for buffer in module._buffers.values():
            if buffer is not None and not _is_code(buffer):
                kept.keep_tensor(buffer)
        if _is_managed(module):
            continue
        kept.undo_with(functools.partial(_restore_attributes, module, dict(_attributes(module))))
        kept.undo_with(functools.partial(_restore_hooks, module, {name: set(vars(module)[name]) for name in _HOOKS}))
        for key, value in _attributes(module):
            # What is computed from parameters anew in each pass, as older weight norms do, needs no copy.
            if not isinstance(value, Tensor) or value.grad_fn is None:
                kept.keep(value, f"{label}.{key}", closures=False)
        for hook in filter(_is_own_hook, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())):
            kept.keep(hook, f"a hook of {label}", closures=False)
        kept.keep_generators(type(module), f"the class of {label}")


def _keep_parameters(kept: KeptState, model: nn.Module, name: str) -> None:
    left = _ALL_BYTES
    for path, parameter in model.named_parameters():
        # Sharded and quantised ones have classes of their own, and DeepSpeed's are parts of its buffers.
        if type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):
            continue
        small = parameter.nbytes <= min(_BYTES, left)
        if small or parameter.requires_grad:
            left -= parameter.nbytes * small
            kept.undo_with(remember_memory(parameter.detach(), float("inf")))
        else:
            kept.watched.add(f"{name}.{path}", parameter)


def _is_code(buffer: Tensor) -> bool:
    return buffer.numel() >= _CODES and not (buffer.is_floating_point() or buffer.is_complex())


def _is_managed(module: nn.Module) -> bool:
    """Tell whether an engine keeps what belongs to memory of its own in a module."""
    # FSDP2 makes a class for each class that it shards, and puts nothing into the module.
    return any(is_of_engine(kind) for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _is_own_hook(hook: Any) -> bool:
    owner = getattr(hook, "__self__", None)
    return not is_of_engine(hook if hasattr(hook, "__module__") else type(hook)) and not is_of_engine(type(owner))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that are not torch's, nor those that an engine has put there."""
    for key, value in vars(module).items():
        if key not in _OWN and not key.startswith(("ds_", "_ds", "_fsdp", "_hf_hook", "_old_forward")):
            yield key, value


def _restore_hooks(module: nn.Module, before: dict[str, set[int]]) -> None:
    """
    Take hooks off that a forward pass has put on.

    transformers installs those that capture outputs in the first pass and marks the model. The mark is taken away with
    the other new attributes, so without this they would be installed twice.
    """
    for name, keys in before.items():
        hooks = vars(module)[name]
        for key in [key for key, hook in hooks.items() if key not in keys and _is_own_hook(hook)]:
            del hooks[key]


def _restore_attributes(module: nn.Module, before: dict[str, Any]) -> None:
    """Put the data back that attributes held. A new one is taken away; other objects stay as they are."""
    now = dict(_attributes(module))
    for key in now.keys() | before.keys():
        value = now.get(key, before.get(key))
        if now.get(key) is before.get(key) and (key in now) == (key in before):
            continue
        if key not in before and isinstance(value, _DATA):
            del vars(module)[key]
        elif isinstance(before.get(key, _restore_attributes), _DATA):
            vars(module)[key] = before[key]
