"""Random number generators of any library that batches are made with, and iterators that can't be read twice."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch


# How the state of a generator is read and set.
Access = tuple[Callable[[], Any], Callable[[Any], object]]

GLOBAL_GENERATORS: tuple[Access, ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
)


def access_generator(value: Any) -> Access | None:
    """Return how to read and set the state of a generator of Python, NumPy or torch; `None` for anything else."""
    if isinstance(value, torch.Generator):
        return lambda: value.get_state().clone(), value.set_state
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    bits = value.bit_generator if isinstance(value, np.random.Generator) else value
    if isinstance(bits, np.random.BitGenerator):
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


class Replay:
    """
    Stands in for an iterator that can't be started over, and keeps what is read from it.

    Afterwards [`rest`] gives all of it once more. An iterator may draw random numbers while it is read. So the states
    before and after each read are kept as well: a generator that is where it was before a read moves on as it did.

    Args:
        iterator: a Python generator, a `map`, `itertools.cycle`, ...
        generators: that it may draw from.
    """

    def __init__(self, iterator: Iterator[Any], generators: Sequence[Access]) -> None:
        self._iterator, self._generators = iterator, generators
        self._read: list[tuple[Any, list[tuple[Access, bytes, Any]]]] = []
        self._rest: Iterator[Any] | None = None

    def __iter__(self) -> Replay:
        return self

    def __next__(self) -> Any:
        before = [(access, _digest(access[0]())) for access in self._generators]
        item = next(self._iterator)
        after = [(access, state, access[0]()) for access, state in before]
        self._read.append((item, [entry for entry in after if _digest(entry[2]) != entry[1]]))
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def rest(self) -> Iterator[Any]:
        """Return what the iterator would give if nothing had been read; the same object each time."""
        if self._rest is None:
            self._rest = _again(self._read, self._iterator) if self._read else self._iterator
        return self._rest


def reads_once(value: Any) -> bool:
    """Tell whether a value is an iterator whose place nobody can see or set: a generator, a `map`, a `cycle`."""
    return (
        isinstance(value, Iterator)
        and not isinstance(value, io.IOBase)
        and not hasattr(value, "__dict__")
        and not hasattr(type(value), "__slots__")
    )


def _digest(state: Any) -> bytes:
    """Return bytes that are equal for equal states: tensors, arrays, numbers, and nested tuples and dicts of these."""
    if isinstance(state, torch.Tensor):
        state = state.numpy()
    if isinstance(state, np.ndarray):
        return state.tobytes()
    if isinstance(state, Mapping):
        return b"".join(_digest(value) for value in state.values())
    return b",".join(map(_digest, state)) if isinstance(state, (tuple, list)) else repr(state).encode()


def _again(read: Sequence[tuple[Any, list[tuple[Access, bytes, Any]]]], iterator: Iterator[Any]) -> Iterator[Any]:
    for item, moved in read:
        for (get, set_to), before, after in moved:
            if _digest(get()) == before:
                set_to(after)
        yield item
    yield from iterator
