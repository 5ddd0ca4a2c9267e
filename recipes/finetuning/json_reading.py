"""JSON of the recipes' own files, which a stopped run or an editor may have damaged."""

import json
from pathlib import Path
from reprlib import Repr
from typing import Any


# Values of any depth and length, cut to what a message can show.
_repr = Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 200
shorten = _repr.repr


def parse_json(text: str | bytes) -> Any:
    """
    Parse one JSON value; `NaN` and `Infinity`, which Python writes, are numbers.

    Raises:
        `ValueError`: if it is malformed, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_json(path: Path, content: str, way_out: str) -> Any:
    """
    Read a JSON file.

    Args:
        path (`Path`): of the file.
        content (`str`): what it should hold, for the message: "a list of class names".
        way_out (`str`): what to do where it does not, a sentence.

    Raises:
        `ValueError`: if it can't be read or parsed.
    """
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not {content}: {error}. {way_out}") from error
