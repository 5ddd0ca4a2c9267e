"""Filters: the rows to use and the part of a column to learn, by regular expressions, and words for values."""

import re
from typing import Any

from datasets import Dataset

from finetuning.arguments import DataArguments


Row = dict[str, Any]


def filter_rows(rows: Dataset, args: DataArguments, place: str) -> Dataset:
    """
    Return the rows in which all of `keep_matching` and none of `drop_matching` are found.

    Raises:
        `ValueError`: if a column is missing, or no row is left; `place` says where the rows came from.
    """
    keep, drop = _compile_pairs(args.keep_matching), _compile_pairs(args.drop_matching)
    for column, _ in keep + drop:
        if column not in rows.column_names:
            raise ValueError(f"{place}: no column {column!r} to match; it has {', '.join(rows.column_names)}.")
    if not keep + drop:
        return rows

    def is_kept(row: Row) -> bool:
        return all(_matches(row, pair) for pair in keep) and not any(_matches(row, pair) for pair in drop)

    left = rows.filter(is_kept, desc="choosing rows")
    if len(left) == 0:
        raise ValueError(
            f"{place}: none of {len(rows)} rows is left by keep_matching={args.keep_matching} and "
            f"drop_matching={args.drop_matching}. Loosen one of them."
        )
    return left


def completion_of(text: str, args: DataArguments) -> str:
    """
    Return what is learned of a completion column: the first match of `completion_pattern`, in the words for it.

    Raises:
        `ValueError`: if the pattern is not found, or `label_words` knows no word for the value.
    """
    if args.completion_pattern is not None:
        match = re.search(args.completion_pattern, text)
        if match is None:
            raise ValueError(
                f"completion_pattern={args.completion_pattern!r} is not found in {text[:200]!r}. Leave such rows out "
                "with keep_matching, or change the pattern."
            )
        text = match.group()
    if args.label_words is None:
        return text
    words = word_for_value(args.label_words)
    if text not in words and text not in words.values():
        raise ValueError(
            f"{args.completion_field}: {text!r} has no word in label_words={args.label_words}. Add {text}=its word."
        )
    return words.get(text, text)


def word_for_value(label_words: list[str]) -> dict[str, str]:
    """Return `{"0": "negative", ...}` for `["0=negative", ...]`."""
    return dict(pair.split("=", 1) for pair in label_words)


def _compile_pairs(pairs: list[str] | None) -> list[tuple[str, re.Pattern[str]]]:
    split = [pair.split("=", 1) for pair in pairs or []]
    return [(column, re.compile(expression)) for column, expression in split]


def _matches(row: Row, pair: tuple[str, re.Pattern[str]]) -> bool:
    column, expression = pair
    return row[column] is not None and expression.search(str(row[column])) is not None
