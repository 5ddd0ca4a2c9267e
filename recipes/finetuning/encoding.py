"""Turn rows into tokens and labels, one routine a task."""

import re
from collections.abc import Callable
from string import Formatter
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetuning.arguments import DataArguments
from finetuning.filtering import completion_of


IGNORED = -100  # the label that the loss leaves out
Row = dict[str, Any]
Features = dict[str, Any]


def encode(
    rows: Dataset,
    args: DataArguments,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    class_names: list[str] | None,
) -> Dataset:
    """
    Turn every row into what the model takes.

    Args:
        rows (`Dataset`): text columns, as read.
        args (`DataArguments`): which columns, which templates, how long.
        task (`str`): `"causal-lm"`, `"sequence-classification"` or `"seq2seq"`.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        class_names (`list[str]`, *optional*): the names of classes 0, 1, ... for classification.

    Returns:
        `Dataset`: the tokenizer's columns and `labels`; with `drop_too_long` without the rows that are too long.

    Raises:
        `ValueError`: if a column is missing or empty, `max_length` is more than the model can read, or every row is
            too long.
    """
    if args.max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length={args.max_length}, but {tokenizer.name_or_path} reads {tokenizer.model_max_length} tokens. "
            f"Use --max_length {tokenizer.model_max_length} or less."
        )
    limit = args.max_length + 1 if args.drop_too_long else args.max_length  # one more token tells what is too long
    encoders: dict[str, Callable[[Row], Features]] = {
        "causal-lm": lambda row: encode_completion(*fill_templates(row, args), tokenizer, limit),
        "seq2seq": lambda row: encode_pair(*fill_templates(row, args), tokenizer, limit),
        "sequence-classification": lambda row: encode_class(row, args, tokenizer, class_names or [], limit),
    }
    encoded = rows.map(encoders[task], remove_columns=rows.column_names, desc="encoding")
    return drop_too_long(encoded, args.max_length) if args.drop_too_long else encoded


def drop_too_long(encoded: Dataset, max_length: int) -> Dataset:
    """Return the rows of at most `max_length` tokens, labels included."""

    def fits(features: Features) -> bool:
        labels = features["labels"]
        return len(features["input_ids"]) <= max_length and (isinstance(labels, int) or len(labels) <= max_length)

    left = encoded.filter(fits, desc="dropping long rows")
    if len(left) == 0:
        raise ValueError(f"drop_too_long: all {len(encoded)} rows have more than max_length={max_length} tokens.")
    return left


def fill_templates(row: Row, args: DataArguments) -> tuple[str, str]:
    """Return the prompt and the completion of a row, each put into its template."""
    completion = completion_of(text_of(row, args.completion_field), args)
    values = {**row, "prompt": text_of(row, args.prompt_field), "completion": completion}
    for name in template_columns(args):
        if name in values:
            text_of(values, name)  # an error where the row has none, which the template would spell "None"
    return (
        fill_template(args.prompt_template, values, "prompt_template"),
        fill_template(args.completion_template, values, "completion_template"),
    )


def template_columns(args: DataArguments) -> list[str]:
    """Return the names in braces of both templates, without what follows a dot, a bracket or a colon."""
    templates = (args.prompt_template, args.completion_template)
    try:
        found = [name for template in templates for _, name, _, _ in Formatter().parse(template) if name]
    except ValueError:  # `fill_template` says which and why
        return []
    return list(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in found))


def fill_template(template: str, values: Row, name: str) -> str:
    """Put `values` where `template` has their names in braces; `name` is the argument that an error speaks of."""
    try:
        return template.format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{name}={template!r} cannot be filled in ({error!r}). Put one of {', '.join(values)} into "
            "braces, and write {{ and }} for braces that stay."
        ) from error


def text_of(row: Row, name: str) -> str:
    """Return a row's value as text, or say what is missing."""
    if row.get(name) is None:
        raise ValueError(f"a row has no {name!r}: {str(row)[:200]}. Name the right column, or mend the data.")
    return str(row[name])


def encode_completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Features:
    """
    Encode a prompt and its completion as one sequence whose labels are the completion's tokens and the end token.

    The two are encoded apart, as they are when the model writes: no token spans the border. What is too long loses
    the start of the prompt first (a start token stays); a completion longer than `max_length` by itself loses its end.
    """
    start, body = encode_prompt(prompt, tokenizer)
    tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    tail = tail[: max_length - len(start)]
    too_many = max(0, len(start) + len(body) + len(tail) - max_length)
    head = start + body[too_many:]
    ids = head + tail
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(head) + tail}


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the start token, where the tokenizer puts one before every text, and the tokens of a prompt."""
    body = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole, bos = tokenizer(prompt)["input_ids"], [tokenizer.bos_token_id]
    return (bos if whole[:1] == bos and body[:1] != bos else []), body


def encode_pair(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Features:
    """Encode a prompt for the encoder and its completion for the decoder, each cut at its end."""
    features = dict(tokenizer(prompt, truncation=True, max_length=max_length))
    features["labels"] = tokenizer(text_target=completion, truncation=True, max_length=max_length)["input_ids"]
    return features


def encode_class(
    row: Row, args: DataArguments, tokenizer: PreTrainedTokenizerBase, class_names: list[str], max_length: int
) -> Features:
    """Encode the text, or pair of texts, of a row and the number of its class."""
    texts = [text_of(row, name) for name in (args.text_field, args.text_pair_field) if name is not None]
    label = text_of(row, args.label_field)
    if label not in class_names:
        raise ValueError(f"a held-out row has the class {label!r}; the training rows have {', '.join(class_names)}.")
    return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": class_names.index(label)}
