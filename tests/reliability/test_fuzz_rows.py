"""Files of rows, pickles in the place of every file that is read, and code that comes with a model."""

from __future__ import annotations

import ast
import gzip
import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hostile import Law, damaged, edited_objects, fuzz_file, json_texts
from hypothesis import strategies as st


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))  # as `python recipes/finetune.py` does

from answering.answers import read_records
from answering.generation import _read_adapter_config
from comparison.store import Store
from evaluate_glue import saved_class_names
from finetuning import models
from finetuning.arguments import ModelArguments, make_parser, parse
from finetuning.reading import read_local
from finetuning.yaml_defaults import replace_defaults
from test_fuzz_probe import Probe

from lora_ga_trainer.saving.record import read_record


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def rows_are_cached_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps an Arrow copy of each JSON file that it reads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def tables() -> st.SearchStrategy[str]:
    cells = st.sampled_from(["1", "NA", "", '"', '"a,b"', "a\tb", "\x00", "\r", "x", "é"]) | st.text(max_size=4)
    lines = st.lists(cells, max_size=4).map(",".join)
    return st.lists(lines, max_size=5).map("\n".join)


def json_rows() -> st.SearchStrategy[str]:
    return st.lists(edited_objects({"text": "a", "label": 1}) | json_texts(), max_size=4).map("\n".join)


KINDS = {
    "rows.csv": (tables, 200),
    "rows.tsv": (tables, 100),
    "rows.csv.gz": (lambda: tables().map(lambda text: gzip.compress(text.encode("utf-8", "replace"), mtime=0)), 200),
    "rows.json": (json_rows, 50),
    "rows.jsonl": (json_rows, 50),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_a_file_of_rows(name: str, share: int, tmp_path: Path) -> None:
    texts, count = KINDS[name]

    def check(rows: datasets.Dataset) -> None:
        assert isinstance(rows, datasets.Dataset)
        assert all(isinstance(column, str) for column in rows.column_names)
        for row in rows:
            assert row.keys() == set(rows.column_names)

    law = Law(tmp_path, lambda: read_local(str(tmp_path / name)), check, name)
    fuzz_file(tmp_path / name, damaged(texts()), law, count // share)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("start", ['{"a": ', "", '{"a": "["}\n{"a":\n '])
def test_rows_nested_without_end_are_refused_and_end_no_process(name: str, start: str, tmp_path: Path) -> None:
    content = (start + "[" * 100_000).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match=rf"{name} can't be read .* nested deeper"):
        read_local(str(tmp_path / name))


@pytest.mark.parametrize("content", ["null", '{"a": 1}\nnull\n', '{"a": 1} null {"a": 1}', "\ufeffnull", "]"])
def test_what_is_no_row_is_refused_and_ends_no_process(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl can't be read .* is not a row"):
        read_local(str(tmp_path / "rows.jsonl"))


def test_brackets_in_words_are_no_nesting(tmp_path: Path) -> None:
    text = '[{"text": "' + "[" * 1000 + '\\" [", "label": [[1]]}]'
    (tmp_path / "rows.json").write_text(text)
    assert read_local(str(tmp_path / "rows.json"))[0]["text"] == "[" * 1000 + '" ['


# --- pickles ---------------------------------------------------------------------------------------------------------


class Planted:
    """What unpickling it runs."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def checkpoint(planted: Planted) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": planted}, buffer)
    return buffer.getvalue()


def read_probe(path: Path) -> None:
    probe = Probe(path.parent / "made")
    probe.path.write_bytes(path.read_bytes())
    try:
        probe.read()
    except ValueError as error:
        raise ValueError(str(error)) from error


READERS: dict[str, Callable[[Path], Any]] = {
    "lora_ga.json": lambda path: read_record(path.parent),
    "probe.safetensors": read_probe,
    "settings.json": lambda path: Store(path.parent, {}),
    "results/lora/rate1_seed0.json": lambda path: Store(path.parents[2], {}).load(),
    "class_names.json": lambda path: saved_class_names(str(path.parent)),
    "adapter_config.json": lambda path: _read_adapter_config(str(path.parent)),
    "answers.jsonl": read_records,
    "run.yaml": lambda path: replace_defaults(models_parser(), str(path)),
    "rows.json": lambda path: read_local(str(path)),
    "rows.jsonl": lambda path: read_local(str(path)),
    "rows.csv": lambda path: read_local(str(path)),
    "rows.tsv": lambda path: read_local(str(path)),
}


def models_parser() -> Any:
    return make_parser((ModelArguments,))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_in_the_place_of_a_file_is_refused_and_not_run(name: str, kind: str, tmp_path: Path) -> None:
    planted = Planted(tmp_path / "planted")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "made").mkdir()
    path.write_bytes((pickle.dumps(planted) if kind == "pickle" else checkpoint(planted)) + b"\n")
    with pytest.raises((ValueError, OSError), match=path.name):
        READERS[name](path)
    assert not planted.marker.exists()
    if kind == "pickle":  # it would have worked
        pickle.loads(path.read_bytes())
    else:
        assert "archive/data.pkl" in zipfile.ZipFile(io.BytesIO(path.read_bytes())).namelist()
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert planted.marker.exists()


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for folder in ("lora_ga_trainer", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "np.load", "numpy.load", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load",
                "yaml.full_load", "eval"}  # fmt: skip


def test_nothing_here_can_read_a_pickle() -> None:
    found, seen = [], 0
    for path, tree in sources():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call):
                names, seen = [ast.unparse(node.func)], seen + 1
            found += [f"{path}:{node.lineno} {name}" for name in names if name in UNSAFE_MODULES | UNSAFE_CALLS]
    assert seen > 1000
    assert found == []


# --- code of a model -------------------------------------------------------------------------------------------------


def test_no_call_asks_for_code_of_a_repository() -> None:
    """`trust_remote_code` is what the arguments say or it is not given at all."""
    values = {
        ast.unparse(keyword.value)
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    }
    assert values == {"args.trust_remote_code"}


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_and_its_tokenizer_run_no_code_of_a_repository_unless_asked(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []

    class Stopped(Exception):
        pass

    def from_pretrained(name: str, **options: Any) -> None:
        given.append(options["trust_remote_code"])
        raise Stopped

    words = ["--model_name_or_path", "a/model", *(["--trust_remote_code"] if asked else [])]
    (args,) = parse(words, (ModelArguments,))
    for kind in (models.AutoTokenizer, *models.MODEL_CLASSES.values()):
        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    with pytest.raises(Stopped):
        models.load_tokenizer(args)
    for args.task in models.MODEL_CLASSES:
        with pytest.raises(Stopped):
            models.load_model(args, None, None)
    assert given == [asked] * 4
