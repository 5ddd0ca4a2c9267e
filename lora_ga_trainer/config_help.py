"""What parsers of arguments say of a config's fields: the sentences of its docstring."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar


_Class = TypeVar("_Class", bound=type)


def document_fields(registered: Mapping[str, Callable[[], str]]) -> Callable[[_Class], _Class]:
    """
    Copy what the docstring of a dataclass says of each field into its metadata, where argument parsers look for it.

    Args:
        registered: what is added to the help of a field that names an entry of a registry.
    """

    def document(config: _Class) -> _Class:
        if config.__doc__ is None:  # python -OO
            return config
        _, _, listed = config.__doc__.partition("Args:\n")
        for entry in re.split(r"\n {8}(?=\w)", listed.partition("\n\n")[0].lstrip()):
            name, _, text = entry.partition(": ")
            metadata = FieldHelp(" ".join(text.split()), registered.get(name, str))
            vars(config)["__dataclass_fields__"][name].metadata = metadata
        return config

    return document


class FieldHelp(Mapping[str, str]):
    """The metadata of a field. What a registry adds to the help is read each time, with its newest entry."""

    def __init__(self, text: str, registered: Callable[[], str]) -> None:
        self._text, self._registered = text, registered

    def __getitem__(self, key: str) -> str:
        if key != "help":
            raise KeyError(key)
        return self._text + self._registered()

    def __iter__(self) -> Iterator[str]:
        return iter(("help",))

    def __len__(self) -> int:
        return 1

    def copy(self) -> dict[str, str]:
        """Return a plain dictionary, which argument parsers add to."""
        return dict(self)
