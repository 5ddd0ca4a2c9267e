"""From arguments to what the trainer takes: read, hold out, encode."""

from dataclasses import dataclass, replace

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetuning.arguments import DataArguments, SourceArguments
from finetuning.encoding import encode, template_columns, text_of
from finetuning.filtering import filter_rows
from finetuning.package_paths import resolve_reference
from finetuning.reading import read_hub, read_local


CLASSIFICATION = "sequence-classification"


@dataclass
class TaskData:
    """Hold the encoded rows, and for classification the names of classes 0, 1, ..."""

    train: Dataset
    eval: Dataset | None
    class_names: list[str] | None


def load_data(args: DataArguments, task: str, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Read the rows that `args` name, hold some out and encode them for `task`."""
    train, held_out = read_rows(args, task)
    class_names = find_class_names(train, args.label_field) if task == CLASSIFICATION else None
    unlimited = replace(args, max_train_samples=None, max_eval_samples=None)
    train, held_out = split_rows(train, held_out, unlimited if args.drop_too_long else args)
    train = encode(train, args, task, tokenizer, class_names)
    if held_out is not None:
        held_out = encode(held_out, args, task, tokenizer, class_names)
    if args.drop_too_long:  # rows are counted once it is known which stay
        train, held_out = limit_rows(train, held_out, args)
    return TaskData(train, held_out, class_names)


def load_rows(args: SourceArguments) -> tuple[Dataset, Dataset | None]:
    """Read the rows that `args` name, whatever their columns, and hold some out."""
    train = read_source(args, args.train_file, args.train_split)
    held_out = read_source(args, args.eval_file, args.eval_split) if args.eval_file or args.eval_split else None
    return split_rows(train, held_out, args)


def read_rows(args: DataArguments, task: str) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on and those given as held out (`None` without any)."""
    used = _list_columns(args, task)
    train = _read(args, args.train_file, args.train_split, used)
    if args.drop_duplicates:
        more = [] if task == CLASSIFICATION else [n for n in template_columns(args) if n in train.column_names]
        train = drop_duplicates(train, list(dict.fromkeys([*used, *more])))
    if args.eval_file is None and args.eval_split is None:
        return train, None
    return train, _read(args, args.eval_file, args.eval_split, used)


def read_held_out(args: DataArguments, task: str) -> Dataset:
    """
    Return the rows that a training run with these arguments holds out, without reading more than it takes.

    Raises:
        `ValueError`: if it holds out none.
    """
    if args.eval_file is not None or args.eval_split is not None:
        held_out = _read(args, args.eval_file, args.eval_split, _list_columns(args, task))
        return _choose_rows(held_out, args.max_eval_samples, args.split_seed)
    held_out = split_rows(*read_rows(args, task), args)[1]
    if held_out is None:
        raise ValueError("no rows are held out: eval_fraction=0 and no eval_file or eval_split. Give one of them.")
    return held_out


def split_rows(train: Dataset, held_out: Dataset | None, args: SourceArguments) -> tuple[Dataset, Dataset | None]:
    """
    Hold `eval_fraction` of the rows out where none are held out yet, then cut both parts to their limits.

    Which rows are held out depends on the rows and on `split_seed` alone.
    """
    if held_out is None and args.eval_fraction > 0:
        halves = train.train_test_split(test_size=args.eval_fraction, seed=args.split_seed)
        train, held_out = halves["train"], halves["test"]
    return limit_rows(train, held_out, args)


def limit_rows(train: Dataset, held_out: Dataset | None, args: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Cut both parts to `max_train_samples` and `max_eval_samples`, which rows stay depends on `split_seed`."""
    if held_out is not None:
        held_out = _choose_rows(held_out, args.max_eval_samples, args.split_seed)
    return _choose_rows(train, args.max_train_samples, args.split_seed), held_out


def drop_duplicates(rows: Dataset, columns: list[str]) -> Dataset:
    """Return the rows without those that say in `columns` what an earlier one said."""
    first: dict[tuple, int] = {}
    for index, key in enumerate(zip(*(map(str, rows[name]) for name in columns), strict=True)):
        first.setdefault(key, index)
    return rows.select(sorted(first.values()))


def find_class_names(rows: Dataset, label_field: str) -> list[str]:
    """Return the names of the classes, numbers in their order, words in the alphabet's."""
    names = {text_of({label_field: label}, label_field) for label in rows[label_field]}
    if len(names) < 2:
        raise ValueError(f"{label_field}: every training row has the class {names}. Classification needs two or more.")
    if all(name.lstrip("-").isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _list_columns(args: DataArguments, task: str) -> list[str]:
    if task == CLASSIFICATION:
        return [name for name in (args.text_field, args.text_pair_field, args.label_field) if name is not None]
    return [args.prompt_field, args.completion_field]


def read_source(args: SourceArguments, file: str | None, split: str | None, label_field: str | None = None) -> Dataset:
    """Read a file, or a split of the hub data set where there is none."""
    if file is not None:
        rows = read_local(resolve_reference(file), args.column_names)
    else:
        rows = read_hub(args.dataset_name, args.dataset_config, split, label_field)
    if len(rows) == 0:
        raise ValueError(f"{file or args.dataset_name}: no rows in it. Point to a file or split that has some.")
    return rows


def _read(args: DataArguments, file: str | None, split: str | None, used: list[str]) -> Dataset:
    rows = read_source(args, file, split, args.label_field)
    missing = [name for name in used if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{file or args.dataset_name}: no column {missing[0]!r}; it has {', '.join(rows.column_names)}. "
            "Set text_field and label_field, or prompt_field and completion_field."
        )
    return filter_rows(rows, args, file or args.dataset_name)


def _choose_rows(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(limit))
