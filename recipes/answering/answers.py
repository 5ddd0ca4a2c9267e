"""Files of answers: one JSON object a line, written batch by batch, and taken up again where a run stopped."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from finetuning.json_reading import parse_json, shorten
from finetuning.package_paths import resolve_reference
from finetuning.reading import read_local
from tqdm import tqdm


HUB = "hub"  # what stands for a file: the data set of that name on the hub
Question = dict[str, Any]
Record = dict[str, Any]


def read_questions(eval_file: str, hub_name: str, hub_config: str | None, split: str, columns: list[str]) -> Dataset:
    """
    Read the rows to answer from a file, or from the hub where `eval_file` is `"hub"`.

    Raises:
        `ValueError`: if there are none, or one of `columns` is missing.
    """
    if eval_file == HUB:
        place, rows = f"{hub_name} ({split})", load_dataset(hub_name, hub_config, split=split)
    else:
        place, rows = eval_file, read_local(resolve_reference(eval_file))
    missing = [name for name in columns if name not in rows.column_names]
    if missing or len(rows) == 0:
        found = f"no column {missing[0]!r}; it has {', '.join(rows.column_names)}" if missing else "no rows in it"
        raise ValueError(f"{place}: {found}. Rows with {', '.join(columns)} are needed.")
    return rows


def answer_missing(
    path: Path,
    questions: list[Question],
    answer: Callable[[list[Question]], list[Record]],
    batch_size: int,
    key: str = "id",
    same: tuple[str, ...] = ("prompt", "model"),
) -> list[Record]:
    """
    Answer the questions that `path` holds no answer to, and add each batch to it once it is done.

    Args:
        path (`Path`): the `.jsonl` file; made if it does not exist.
        questions (`list[dict]`): each has `key`, by which its record is known.
        answer (`Callable`): returns one record for each question of a batch; a record has the question's `key`.
        batch_size (`int`): questions to answer at once.
        key (`str`): what tells the questions apart.
        same (`tuple[str, ...]`): fields that a record must share with its question, or the file is another run's.

    Returns:
        `list[dict]`: the records, in the order of the questions.

    Raises:
        `ValueError`: if the file holds answers to other questions, or of another model.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    records = {}
    for record in read_records(path):
        if type(record.get(key)) not in (str, int):
            raise ValueError(
                f"{path}: {key}={shorten(record.get(key))} in {shorten(record)} names no question. Remove it."
            )
        records[record[key]] = record
    for question in questions:
        record = records.get(question[key])
        for name in same if record is not None else ():
            if record.get(name) != question[name]:
                raise ValueError(
                    f"{path}: the answer to {key}={question[key]!r} was given to another {name} "
                    f"({str(record.get(name))[:200]!r}, now {str(question[name])[:200]!r}). Choose another "
                    "--output, or remove the file."
                )
    missing = [question for question in questions if question[key] not in records]
    for start in tqdm(range(0, len(missing), batch_size), desc=f"answering {len(missing)} of {len(questions)}"):
        batch = answer(missing[start : start + batch_size])
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in batch)
        records.update((record[key], record) for record in batch)
    return [records[question[key]] for question in questions]


def read_records(path: Path) -> list[Record]:
    """
    Return the records of a file that may not exist; a last line that a stopped run left unfinished is cut off it.

    Raises:
        `ValueError`: if any other line is no JSON object.
    """
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            record = parse_json(line.decode("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error}). Remove the line or the file.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: {shorten(record)} is no object. Remove the line or the file.")
        records.append(record)
    if whole != raw:
        path.write_bytes(whole)
    return records


def share(hits: list[bool]) -> dict[str, float]:
    """Return the share of hits and its binomial standard error, sqrt(p (1 - p) / n)."""
    p = sum(hits) / len(hits)
    return {"value": p, "standard_error": math.sqrt(p * (1 - p) / len(hits)), "n": len(hits)}


def report(name: str, results: dict[str, Any], path: Path) -> None:
    """Print the results in one line and write them beside the answers, as `<answers>.results.json`."""
    place = path.with_suffix(".results.json")
    place.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    words = []
    for key, value in results.items():
        if isinstance(value, dict):
            words.append(f"{key}={value['value']:.4f} (standard error {value['standard_error']:.4f}, n={value['n']})")
        else:
            words.append(f"{key}={value:.4f}" if isinstance(value, float) else f"{key}={value}")
    print(f"{name}: {', '.join(words)}")
    print(f"answers in {path}, results in {place}")
