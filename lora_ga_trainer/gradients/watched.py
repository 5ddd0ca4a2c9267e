"""Tensors and arrays too large to copy, of which it is seen afterwards whether they were written."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn


# Reading so much takes less than a tenth of a second. Larger arrays are data, and are not read.
_READ_BYTES = 2**26


class Watched:
    """Remembers by name what it is shown, and tells which of it was written since then."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Callable[[], int], int]] = []

    def add(self, name: str, value: Any) -> None:
        """Look at a tensor or an array from now on. One whose writes can't be seen is passed over."""
        state = _state_of(value)
        if state is not None:
            self._entries.append((name, state, state()))

    def written(self) -> list[str]:
        """Name what is not as it was."""
        return [name for name, state, before in self._entries if state() != before]


def _state_of(value: Any) -> Callable[[], int] | None:
    """Return what gives a number that changes with each write: torch counts writes, of an array it is a checksum."""
    if type(value) in (Tensor, nn.Parameter):
        return None if value.is_inference() else lambda: value._version
    readable = isinstance(value, np.ndarray) and value.flags.writeable and not isinstance(value, np.memmap)
    if not readable or value.dtype.hasobject or value.nbytes > _READ_BYTES:
        return None
    return lambda: zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)
