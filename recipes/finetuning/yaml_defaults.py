"""Let a YAML file replace the defaults of a command line, with each value checked as the command line checks it."""

import json
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from finetuning.json_reading import shorten


_MAX_BYTES = 1 << 18
_MAX_DEPTH = 20


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
        `ValueError`: if the file can't be read, a key is unknown or stands there twice, or a value is not one the
            command line would take.
    """
    # The first of a name: the `--no_x` that transformers adds behind `--x` takes no value.
    actions = {action.dest: action for action in reversed(parser._actions)}
    for key, value in _read_mapping(path).items():
        if key in passed_over and key not in ("config", "help"):
            continue
        if key not in actions or key in ("config", "help"):
            raise ValueError(f"{path}: {shorten(key)} is not an argument.{nearest_argument(str(key), parser)}")
        action = actions[key]
        parser.set_defaults(**{key: _convert_value(value, action, f"{path}: {key}")})
        action.required = False


def nearest_argument(key: str, parser: ArgumentParser) -> str:
    """Return a sentence that names the argument nearest to `key`, or says where all are listed."""
    names = [action.dest for action in parser._actions]
    close = get_close_matches(key.lstrip("-").replace("-", "_"), names, n=1)
    return f" Did you mean {close[0]!r}?" if close else " `--help` lists them all."


class _PlainLoader(yaml.SafeLoader):
    """
    Reads mappings, lists, words and numbers, and each of them once: no tags, which ask for other types, and no anchors
    and aliases, with which a short file can stand for terabytes.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        for name in ("anchor", "tag"):
            if getattr(event, name, None) is not None:
                raise yaml.composer.ComposerError(None, None, f"no {name} is read here", event.start_mark)
        if self.depth == _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {_MAX_DEPTH}", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _read_mapping(path: str) -> dict[str, Any]:
    loader = None
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        loader = _PlainLoader(content.decode("utf-8-sig"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ValueError("expected lines of `argument: value`, found something else at the top level")
        _refuse_duplicates(root)
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{path}{line}: {error.problem}. Write one `argument: value` a line.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}. Write one `argument: value` a line.") from error
    finally:
        if loader is not None:
            loader.dispose()


def _refuse_duplicates(node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"the key on line {line} is not a word")
        if key.value in lines:
            raise ValueError(f"{shorten(key.value)} stands on line {lines[key.value]} and on line {line}, keep one")
        lines[key.value] = line
        _refuse_duplicates(value)


def _convert_value(value: Any, action: Action, place: str) -> Any:
    if value is None and action.default is None:
        return None
    if action.nargs == "+":
        return [_convert_word(item, action, place) for item in (value if isinstance(value, list) else [value])]
    return _convert_word(value, action, place)


def _convert_word(value: Any, action: Action, place: str) -> Any:
    if value is None or isinstance(value, list):
        raise ValueError(f"{place}={shorten(value)}: one value is needed here.")
    if isinstance(value, bool) and (action.choices or action.type in (None, str)):
        raise ValueError(
            f"{place}={value!r}: YAML reads a bare yes, no, on or off as true or false. Put the word in quotes."
        )
    try:
        word = json.dumps(value) if isinstance(value, dict) else str(value)
        converted = action.type(word) if action.type else word
    except (ValueError, TypeError, ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", "value")
        raise ValueError(f"{place}={shorten(value)} does not read as {kind}: {shorten(str(error))}.") from error
    if action.choices and converted not in action.choices:
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"{place}={shorten(value)} is not allowed. Choose one of {choices}.")
    return converted
