"""State that objects keep, found by a bounded walk over what they refer to, and given back in place."""

from __future__ import annotations

import contextlib
import functools
import io
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .contents import (
    CONTAINERS,
    MEMORY,
    Restore,
    count_bytes,
    entries,
    remember_container,
    remember_memory,
    remember_place,
    setter,
    slots,
)
from .generators import GLOBAL_GENERATORS, Access, Replay, access_generator, reads_once
from .kinds import ATOMS, CALLABLES, CLOSED, SENT, is_known, is_of_engine
from .watched import Watched


# A walk looks at so many objects. Longer containers hold data: what is in them is not looked at, and of huge ones not
# even the references are copied. Larger tensors and arrays are data as well, and so are many of them.
_OBJECTS, _LONG, _HUGE, _BYTES, _ALL_BYTES = 20_000, 1_000, 1_000_000, 2**20, 2**26


class KeptState:
    """
    Remembers the state of objects, and gives it back in place.

    Of what an object refers to by attributes, entries and closures it keeps: generators of random numbers, contents of
    containers, attributes, small tensors and arrays, the place in a file, and what is read from an iterator. Of what
    functions and classes merely know (global names, class attributes) it keeps generators alone.

    A walk ends at trainers, models, tokenizers and engines, and at data: it enters no container of more than 1,000
    entries and copies no tensor above 1 MiB, but sees whether one was written. For each object that it is told of it
    copies 64 MiB and looks at 20,000 objects at most, the nearest first.

    Attributes:
        lost: what was found that can't be given back, by name, with the reason.
        models: modules with parameters that were met, by name. A walk does not enter them.
        watched: what is too large to copy.
    """

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}
        self.models: dict[str, nn.Module] = {}
        self.watched = Watched()
        self._undo = contextlib.ExitStack()
        self._seen: dict[tuple[int, bool], Any] = {}  # holds what it has seen, so that no id is used twice
        self._generators: list[Access] = list(GLOBAL_GENERATORS)
        self._replays: dict[int, Replay] = {}
        self._waiting: deque[tuple[Any, str, bool]] = deque()
        self._enters_closures, self._left, self._left_bytes = True, _OBJECTS, _ALL_BYTES

    def leave_out(self, *values: Any) -> None:
        """Let no walk enter these objects."""
        self._seen.update(((id(value), True), value) for value in values)

    def keep(self, value: Any, name: str, closures: bool = True) -> None:
        """
        Remember the state of an object and of what it refers to.

        Args:
            value: any object.
            name: of it in messages.
            closures: whether variables of functions belong to the state. Where they don't, only generators in them do.
        """
        if reads_once(value):
            self.lost[name] = f"a {type(value).__name__} can be read once"
        self._walk(value, name, True, closures)

    def keep_generators(self, value: Any, name: str) -> None:
        """Remember the generators that an object or a class refers to, and nothing else."""
        for kind in value.__mro__ if isinstance(value, type) else ():
            self._enter_class(kind, name)
        self._walk(value, name, False, False)

    def keep_tensor(self, value: torch.Tensor) -> None:
        """Remember a tensor of any size."""
        if (id(value), True) not in self._seen:
            self._seen[id(value), True] = value
            self.undo_with(remember_memory(value, float("inf")))

    def undo_with(self, restore: Restore | None) -> None:
        """Let `restore`, if there is one, run when the state is given back: the last comes first."""
        if restore is not None:
            self._undo.callback(restore)

    def give_back(self) -> None:
        """Put everything back, all of it even if something raises."""
        self._undo.close()

    def _walk(self, value: Any, name: str, whole: bool, closures: bool) -> None:
        self._enters_closures, self._left = closures, _OBJECTS
        self._left_bytes = _ALL_BYTES
        self._waiting.append((value, name, whole))
        while self._waiting:
            entry = self._waiting.popleft()
            try:
                self._visit(*entry)
            except Exception as error:  # whatever an object that looks like another raises
                self.lost[entry[1]] = f"looking at it raises {error!r:.200}"

    def _visit(self, value: Any, name: str, whole: bool) -> None:
        if isinstance(value, ATOMS) or (id(value), whole) in self._seen or (id(value), True) in self._seen:
            return
        self._left -= 1
        if self._left < 0:
            self.lost.setdefault(name.partition(".")[0], f"it refers to more than {_OBJECTS:,} objects")
            self._waiting.clear()
            return
        self._seen[id(value), whole] = value
        access = access_generator(value)
        if access is not None:
            self._keep_generator(access)
        elif isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
            if whole:
                self.models[name] = value
        elif isinstance(value, SENT):
            if whole:
                self.lost[name] = f"a {type(value).__name__} hands over what it gets once"
        elif isinstance(value, CALLABLES):
            self._keep_callable(value, name, whole)
        elif isinstance(value, CONTAINERS):
            self._keep_container(value, name, whole)
        elif isinstance(value, io.IOBase):
            self._keep_place(value, name, whole)
        elif isinstance(value, MEMORY):
            self._keep_memory(value, name, whole)
        elif not isinstance(value, CLOSED) and not any(map(is_of_engine, type(value).__mro__)):
            self._keep_instance(value, name, whole)

    def _keep_generator(self, access: Access) -> None:
        get, set_to = access
        self._generators.append(access)
        self._undo.callback(set_to, get())

    def _keep_memory(self, value: Any, name: str, whole: bool) -> None:
        restore = remember_memory(value, min(_BYTES, self._left_bytes)) if whole else None
        if restore is not None:
            self._left_bytes -= count_bytes(value)
            self.undo_with(restore)
        elif whole:
            self.watched.add(name, value)

    def _keep_place(self, file: io.IOBase, name: str, whole: bool) -> None:
        try:
            self.undo_with(remember_place(file) if whole else None)
        except (OSError, ValueError) as error:
            self.lost[name] = f"of a file that is read, {error}"

    def _keep_container(self, value: Any, name: str, whole: bool) -> None:
        if len(value) <= _LONG:
            for key, item in entries(value):
                if isinstance(item, ATOMS):
                    continue
                label = f"{name}.{key}" if isinstance(key, str) else f"{name}[{key!r:.40}]"
                self._enter(item, label, setter(value, key) if reads_once(item) else None, whole)
        if whole and len(value) <= _HUGE:
            self.undo_with(remember_container(value))

    def _enter(self, item: Any, name: str, put: Callable[[Any], object] | None, whole: bool) -> None:
        """Walk on to what an object holds. An iterator that can't be started over gives way to a [`Replay`]."""
        if not reads_once(item) or not whole:
            self._waiting.append((item, name, whole))
        elif put is None:
            self.lost[name] = f"a {type(item).__name__} can be read once"
        else:
            self._seen[id(item), True] = item
            replay = self._replays.setdefault(id(item), Replay(item, self._generators))
            if isinstance(item, types.GeneratorType) and item.gi_frame is not None:
                self._waiting.append((item.gi_frame.f_locals, name, False))
            # Undone after the owner has its own contents back, which comes first.
            self._undo.callback(lambda: put(replay.rest()))
            put(replay)

    def _keep_instance(self, value: Any, name: str, whole: bool) -> None:
        for kind in type(value).__mro__:
            self._enter_class(kind, name)
        if isinstance(value, DataLoader) and whole and value._iterator is not None:
            # Persistent workers are in the middle of what they were asked for: those of the probe are others.
            self._undo.callback(vars(value).__setitem__, "_iterator", value._iterator)
            vars(value)["_iterator"] = None
        if isinstance(getattr(value, "__dict__", None), dict):
            self._keep_container(vars(value), name, whole)
        for slot in slots(value):
            item, put = getattr(value, slot), functools.partial(object.__setattr__, value, slot)
            self._enter(item, f"{name}.{slot}", put, whole)
            if whole:
                self._undo.callback(put, item)

    def _enter_class(self, kind: type, name: str) -> None:
        if (id(kind), False) not in self._seen and not is_known(kind):
            self._seen[id(kind), False] = kind
            self._waiting.extend((item, f"{name}.{key}", False) for key, item in vars(kind).items())

    def _keep_callable(self, value: Any, name: str, whole: bool) -> None:
        if isinstance(value, types.MethodType):
            self._waiting += [(value.__self__, name, whole), (value.__func__, name, whole)]
        elif isinstance(value, functools.partial):
            self._waiting += [(part, name, whole) for part in (value.func, value.args, value.keywords)]
        elif isinstance(value, property):
            self._waiting.append((value.fget, name, whole))
        elif isinstance(value, (staticmethod, classmethod)):
            self._waiting.append((value.__func__, name, whole))
        else:
            self._keep_function(value, name, whole)

    def _keep_function(self, value: types.FunctionType, name: str, whole: bool) -> None:
        self._keep_container(vars(value), name, whole)
        self._waiting += [(part, name, whole) for part in (value.__defaults__, value.__kwdefaults__)]
        whole = whole and self._enters_closures
        for variable, cell in closure_cells(value):
            item, put = cell.cell_contents, functools.partial(setattr, cell, "cell_contents")
            self._enter(item, f"{name}.{variable}", put, whole)
            if whole:
                self._undo.callback(put, item)
        if not is_known(value):
            known = value.__globals__
            names = [name for name in global_names(value.__code__) if name in known]
            self._waiting.extend((known[name], name, False) for name in names)


def closure_cells(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables of a closure by name, those left out that have no value yet."""
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            cell.cell_contents  # noqa: B018 - raises where there is none
            yield variable, cell


def global_names(code: types.CodeType) -> Iterator[str]:
    """Name what a function and the functions inside it may look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from global_names(constant)
