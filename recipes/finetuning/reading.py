"""Read rows: json, jsonl, csv, tsv, and folders of text files, one folder a class."""

import csv
import gzip
import re
from pathlib import Path
from typing import Any

import pandas
from datasets import ClassLabel, Dataset, load_dataset

from finetuning.json_reading import shorten


SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
_MAX_DEPTH = 100
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[][{}]|[^][{}",:\s]+')  # a word in quotes, a bracket, a bare word
UNQUOTED_TABS = {"sep": "\t", "quoting": csv.QUOTE_NONE}  # a .tsv file does not quote: a lone " is a character


def read_local(path: str, column_names: list[str] | None = None) -> Dataset:
    """
    Read a file, or a folder of class folders, into one row an example.

    Args:
        path (`str`):
            A `.json` (a list of objects), `.jsonl`, `.csv` or `.tsv` file, or either with `.gz`, or a folder.
        column_names (`list[str]`, *optional*):
            The columns of a `.csv` or `.tsv` file without a header line.

    Returns:
        `Dataset`: the file's columns, all text for `.csv` and `.tsv`; `text` and `label` for a folder.

    Raises:
        `FileNotFoundError`: if there is nothing at `path`.
        `ValueError`: if the suffix is none of these, the file can't be read as what its suffix says, or the folder
            holds no text files in class folders.
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. A hub data set goes into dataset_name.")
    if place.is_dir():
        return _read_class_folders(place)
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: {suffix!r} is not a known format. Use {', '.join(SUFFIXES)} or a folder.")
    try:
        if suffix in (".json", ".jsonl"):
            _require_rows(place)
            return load_dataset("json", data_files=path, split="train")
        return _read_table(place, column_names, UNQUOTED_TABS if suffix == ".tsv" else {})
    except Exception as error:  # of Arrow, datasets, gzip or pandas; an empty file is a StopIteration
        cause = shorten(str(error.__cause__ or error))
        raise ValueError(f"{path} can't be read as {suffix}: {cause}. Mend the file.") from error


def _require_rows(file: Path) -> None:
    """
    Refuse what ends the process inside Arrow: nesting of 100,000 levels, and a bare `null` in the place of a row.

    Raises:
        `ValueError`: if anything stands outside of objects and lists, or is nested deeper than rows ever are.
    """
    depth = 0
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            few = line.count(b"[") + line.count(b"{") <= _MAX_DEPTH
            if depth == 0 and few and line[:1] == b"{" and line[-1:] == b"}" and b"null" not in line:
                continue  # a row of its own, as nearly all are
            for token in _TOKEN.finditer(line):
                change = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
                if depth + change > _MAX_DEPTH:
                    raise ValueError(f"line {number} is nested deeper than {_MAX_DEPTH}")
                if depth + change < 0 or depth == change == 0:
                    raise ValueError(f"line {number}: {shorten(token[0])} is not a row, rows are objects")
                depth += change


def read_hub(name: str, config: str | None, split: str, label_field: str | None = None) -> Dataset:
    """Read one split of a hub data set, with class numbers turned into the names that it has for them."""
    rows = load_dataset(name, config, split=split)
    label = rows.features.get(label_field)
    if isinstance(label, ClassLabel):
        names = [None if number is None or number < 0 else label.names[number] for number in rows[label_field]]
        rows = rows.remove_columns(label_field).add_column(label_field, names)
    return rows


def _read_table(file: Path, column_names: list[str] | None, options: dict[str, Any]) -> Dataset:
    # All of it as text, which `datasets`' own reader can't be asked for: "007" and "NA" stay what they are.
    table = pandas.read_csv(file, names=column_names, dtype=str, keep_default_na=False, **options)
    return Dataset.from_pandas(table, preserve_index=False)


def _read_class_folders(folder: Path) -> Dataset:
    files = sorted(folder.glob("*/*.txt"))
    if not files:
        raise ValueError(
            f"{folder}: no text files at <class>/<name>.txt under it. Point to the folder of class folders."
        )
    return Dataset.from_dict({"text": [_read_text(file) for file in files], "label": [f.parent.name for f in files]})


def _read_text(file: Path) -> str:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError:  # older corpora: Windows' Western alphabet
        return raw.decode("cp1252", errors="replace").strip()
