"""Read JSON that anyone may have written: whatever is wrong with it is one `ValueError` that names its place."""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any


_MAX_BYTES = 1 << 24
# Values of any depth and length, cut to what a message can show.
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 200
short = _repr.repr


def read_json(
    path: str | os.PathLike[str],
    what: str,
    way_out: str,
    max_bytes: int = _MAX_BYTES,
    constants: bool = False,
) -> Any:
    """
    Read a JSON file.

    Args:
        path: of the file.
        what: it should be, for the message: "a record of this package".
        way_out: what to do where it is not, a sentence.
        max_bytes: of which no more is ever read; default 16 MiB.
        constants: see [`parse_json`].

    Raises:
        `ValueError`: if it can't be opened or is larger, and for all that [`parse_json`] refuses.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"it is larger than {max_bytes} bytes")
        return parse_json(content, constants)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not {what}: {error}. {way_out}") from error


def parse_json(text: str | bytes, constants: bool = False) -> Any:
    """
    Parse one JSON value.

    Args:
        text: bytes may be UTF-8, 16 or 32, with or without a mark.
        constants: whether `NaN`, `Infinity` and `-Infinity`, which are Python's and not JSON's, stand for numbers.

    Raises:
        `ValueError`: if it is malformed, nested too deep, not text, or has a key twice in one object.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=float if constants else _refuse_constant,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def is_number(value: Any) -> bool:
    """Tell whether `value` is a number that a float or an int64 can hold; `True` and `False` are not."""
    return type(value) is float or (type(value) is int and -(2**63) <= value < 2**63)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"duplicate keys: {short(key)}")
        content[key] = value
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
