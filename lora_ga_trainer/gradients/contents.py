"""Contents of single objects, remembered and written back in place: containers, tensors, arrays, files."""

from __future__ import annotations

import ctypes
import functools
import io
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engines.parameters import own_part


CONTAINERS = (dict, list, tuple, deque, set, frozenset)
MEMORY = (Tensor, np.ndarray, bytearray, ctypes._SimpleCData, ctypes.Array)
_ABSENT = object()

Restore = Callable[[], object]


def remember_container(value: Any) -> Restore | None:
    """Copy what a container holds, not what that refers to; return how to put it back."""
    if isinstance(value, dict):
        return functools.partial(_restore_dict, value, dict(value))
    if isinstance(value, (list, deque, set)):
        return functools.partial(_restore_items, value, list(value))
    return None


def _restore_dict(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    # Past what a subclass does when an entry is set. An OrderedDict has an order to keep up as well.
    kind: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    if list(value) != list(before):
        kind.clear(value)
    for key, item in before.items():
        if dict.get(value, key, _ABSENT) is not item:
            kind.__setitem__(value, key, item)


def _restore_items(value: Any, before: list[Any]) -> None:
    if len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True)):
        return
    value.clear()
    (value.update if isinstance(value, set) else value.extend)(before)


def remember_memory(value: Any, limit: float) -> Restore | None:
    """Copy the numbers of a tensor, an array or a ctypes object of at most `limit` bytes."""
    if not isinstance(value, MEMORY) or count_bytes(value) > limit:
        return None
    if isinstance(value, Tensor):
        # What is spread over processes keeps its own part. Other subclasses have a form that only their owner knows.
        part = own_part(value)
        overlaps = part.layout is torch.strided and 0 in part.stride() and part.numel() > 1
        plain = type(part) is Tensor and not part.is_meta and not overlaps
        return functools.partial(_restore_tensor, part, part.detach().clone()) if plain else None
    if isinstance(value, np.ndarray):
        writable = value.flags.writeable and not isinstance(value, np.memmap)
        return functools.partial(np.copyto, value, value.copy()) if writable else None
    if isinstance(value, bytearray):
        return functools.partial(value.__setitem__, slice(None), bytes(value))
    return functools.partial(ctypes.memmove, ctypes.addressof(value), bytes(value), ctypes.sizeof(value))


def count_bytes(value: Any) -> int:
    """Count the bytes of a tensor, an array or a ctypes object."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.nbytes
    return len(value) if isinstance(value, bytearray) else ctypes.sizeof(value)


@torch.no_grad()
def _restore_tensor(value: Tensor, before: Tensor) -> None:
    if value.shape != before.shape or value.dtype != before.dtype:
        value.data = before
    elif not torch.equal(value, before):
        value.copy_(before)


def remember_place(file: io.IOBase) -> Restore | None:
    """
    Remember where a file is read.

    Raises:
        `OSError`: if it can't be read from there again.
    """
    if file.closed or not file.readable():
        return None
    if not file.seekable():
        raise OSError("it can't be rewound")
    return functools.partial(_go_back, file, file.tell())


def _go_back(file: io.IOBase, place: int) -> None:
    if not file.closed:
        file.seek(place)


def entries(value: Any) -> list[tuple[Any, Any]]:
    """List key and item of a container."""
    return list(value.items() if isinstance(value, dict) else enumerate(value))


def setter(value: Any, key: Any) -> Callable[[Any], object] | None:
    """Return how to put another item into a container; `None` where that can't be."""
    if isinstance(value, dict):
        return functools.partial(dict.__setitem__, value, key)
    return functools.partial(value.__setitem__, key) if isinstance(value, (list, deque)) else None


def slots(value: Any) -> list[str]:
    """Name the attributes of an object that are not in a `__dict__`."""
    names = []
    for kind in type(value).__mro__:
        own = vars(kind).get("__slots__", ())
        # Private names are mangled; a slot that was never set has no value.
        mangled = lambda name, kind=kind: f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") else name
        names += [mangled(name) for name in ((own,) if isinstance(own, str) else own)]
    return [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(value, name)]
