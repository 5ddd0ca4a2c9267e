"""The results of a comparison on disk: one file a run, so that a comparison that is killed loses one run at most."""

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from finetuning.json_reading import read_json, shorten

from comparison.run import Result


class Store:
    """
    Results in `folder/results`, of runs made with the same settings.

    Args:
        folder: of the comparison.
        settings: everything that changes what a run gives, as JSON holds it.

    Raises:
        `ValueError`: if the folder holds a comparison with other settings, naming the first that differs, or a file
            in it is damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder / "results"
        self.settings = json.loads(json.dumps(settings))
        self._path = folder / "settings.json"
        if self._path.exists():
            self._require_same()

    def open(self) -> None:
        """Make the folder and write the settings down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, self.settings)

    def load(self) -> list[Result]:
        """Return the results that are there."""
        return [_read_result(file) for file in sorted(self.folder.glob("*/*.json"))]

    def add(self, slug: str, result: Result) -> None:
        """Write one result."""
        file = self.folder / slug / f"rate{result.rate:g}_seed{result.seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, result.to_dict())

    def _require_same(self) -> None:
        found = _read(self._path)
        for name in sorted(found.keys() | self.settings.keys()):
            if found.get(name) != self.settings.get(name):
                shown = name if name in self.settings else shorten(name)  # anything may stand in the file
                raise ValueError(
                    f"{self._path}: the comparison there was made with {shown}={shorten(found.get(name))}, "
                    f"this one has {shorten(self.settings.get(name))}. Name another --output_dir, or delete that "
                    "folder."
                )


def write_whole(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, "JSON of this comparison", "Delete it to have it made again.")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. Delete it to have it made again.")
    return content


def _read_result(path: Path) -> Result:
    content = _read(path)
    if content.keys() != {f.name for f in fields(Result)}:
        raise ValueError(f"{path} is not a result of this version. Delete it to run that arm, rate and seed again.")
    for name, value in content.items():
        if not _KINDS[name](value):
            raise ValueError(
                f"{path} is not a result: {name}={shorten(value)}. Delete it to run that arm, rate and seed again."
            )
    return Result(**content)


def _is_number(value: Any) -> bool:
    """Tell whether `value` is a number that also fits a float; `True` and `False` are not numbers."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_count(value: Any) -> bool:
    return type(value) is int and _is_number(value) and value >= 0


def _is_time(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _are_evals(value: Any) -> bool:
    """Metrics may be `NaN` or infinite: a run that diverged is a result."""
    return isinstance(value, list) and all(
        isinstance(point, dict) and "step" in point and all(map(_is_number, point.values())) for point in value
    )


_KINDS: dict[str, Callable[[Any], bool]] = {
    "arm": lambda value: isinstance(value, str),
    "rate": lambda value: _is_time(value) and value > 0,
    "seed": _is_count,
    "evals": _are_evals,
    "step_seconds": lambda value: value is None or _is_time(value),
    "eval_seconds": lambda value: value is None or _is_time(value),
    "start_seconds": _is_time,
    "peak_bytes": lambda value: value is None or _is_count(value),
    "trained": _is_count,
    "stored": _is_count,
    "environment": lambda value: isinstance(value, dict),
}
