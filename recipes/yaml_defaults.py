"""Let a YAML file replace the defaults of a command line, with each value checked as the command line checks it."""

import json
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


def replace_defaults(parser: ArgumentParser, path: str, passed_over: Collection[str] = ()) -> None:
    """
    Make the values of a YAML file the defaults of `parser`.

    Args:
        parser (`ArgumentParser`):
            Its arguments are the keys that the file may hold.
        path (`str`):
            A YAML file with one mapping of argument names to values. A mapping as a value is handed on as JSON.
        passed_over (`Collection[str]`, *optional*):
            Keys that the file may hold and that change nothing here.

    Raises:
        `ValueError`: if a key is unknown or stands there twice, or a value is not one the command line would take.
    """
    # The first of a name: the `--no_x` that transformers adds behind `--x` takes no value.
    actions = {action.dest: action for action in reversed(parser._actions)}
    for key, value in _read_mapping(path).items():
        if key in passed_over and key not in ("config", "help"):
            continue
        if key not in actions or key in ("config", "help"):
            raise ValueError(f"{path}: {key!r} is not an argument.{nearest_argument(str(key), parser)}")
        action = actions[key]
        parser.set_defaults(**{key: _checked(value, action, f"{path}: {key}")})
        action.required = False


def nearest_argument(key: str, parser: ArgumentParser) -> str:
    """Return a sentence that names the argument nearest to `key`, or says where all are listed."""
    names = [action.dest for action in parser._actions]
    close = get_close_matches(key.lstrip("-").replace("-", "_"), names, n=1)
    return f" Did you mean {close[0]!r}?" if close else " `--help` lists them all."


def _read_mapping(path: str) -> dict[str, Any]:
    text = Path(path).read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: expected lines of `argument: value`, found something else at the top level.")
    _refuse_duplicates(root, path)
    return yaml.safe_load(text)


def _refuse_duplicates(mapping: yaml.MappingNode, path: str) -> None:
    lines: dict[str, int] = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(f"{path}: {key.value!r} stands on line {lines[key.value]} and on line {line}. Keep one.")
        lines[key.value] = line
        if isinstance(value, yaml.MappingNode):
            _refuse_duplicates(value, path)


def _checked(value: Any, action: Action, place: str) -> Any:
    if value is None and action.default is None:
        return None
    if action.nargs == "+":
        return [_checked_one(item, action, place) for item in (value if isinstance(value, list) else [value])]
    return _checked_one(value, action, place)


def _checked_one(value: Any, action: Action, place: str) -> Any:
    if isinstance(value, dict):
        value = json.dumps(value)
    if value is None or isinstance(value, list):
        raise ValueError(f"{place}={value!r}: one value is needed here.")
    if isinstance(value, bool) and (action.choices or action.type in (None, str)):
        raise ValueError(
            f"{place}={value!r}: YAML reads a bare yes, no, on or off as true or false. Put the word in quotes."
        )
    try:
        converted = action.type(str(value)) if action.type else str(value)
    except (ValueError, TypeError, ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", "value")
        raise ValueError(f"{place}={value!r} does not read as {kind}: {error}.") from error
    if action.choices and converted not in action.choices:
        raise ValueError(f"{place}={value!r} is not allowed. Choose one of {', '.join(map(str, action.choices))}.")
    return converted
