"""
Files that this package and its recipes read are read whole or refused by name, whatever bytes they hold.

10,500 cases: 2,500 records, 1,500 results, 750 settings, 750 files of answers and 2,400 YAML files here, 2,000 saved
probes in test_fuzz_probe.py, 600 files of rows in test_fuzz_rows.py. Without the slow ones a twentieth.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile import Law, damaged, deep, edited_objects, fuzz_file, json_texts, object_text, scalars
from hypothesis import strategies as st


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))  # as `python recipes/finetune.py` does

from answering.answers import answer_missing, read_records
from comparison.run import Result
from comparison.store import Store
from evaluate_glue import saved_class_names
from finetuning.arguments import DataArguments, LoraArguments, ModelArguments, make_parser, parse
from finetuning.yaml_defaults import replace_defaults

from lora_ga_trainer import LoRAGAConfig
from lora_ga_trainer.maths.inits import INITS
from lora_ga_trainer.saving.record import FILE_NAME, StartRecord, read_record, write_record


def counts(number: int) -> pytest.MarkDecorator:
    """A twentieth of the cases by default, all of them among the slow tests."""
    return pytest.mark.parametrize("count", [number // 20, pytest.param(number, marks=pytest.mark.slow)])


RECORD = {"format": 1, "init": "lora_ga", "rank": 4, "anchored": True, "base": "0123456789abcdef0123456789abcdef"}


@counts(2500)
def test_a_record(count: int, tmp_path: Path) -> None:
    folder, copy = tmp_path / "adapter", tmp_path / "copy"
    folder.mkdir()
    copy.mkdir()

    def check(record: StartRecord) -> None:
        assert record.anchored == INITS[record.init].anchored
        assert 1 <= record.rank < 2**31
        write_record(record, copy)
        assert read_record(copy) == record

    law = Law(folder, lambda: read_record(folder), check, FILE_NAME)
    fuzz_file(folder / FILE_NAME, damaged(edited_objects(RECORD) | json_texts()), law, count)


RESULT = {
    "arm": "lora", "rate": 0.001, "seed": 0, "evals": [{"step": 4, "eval_loss": math.nan}], "step_seconds": None,
    "eval_seconds": 0.5, "start_seconds": 1.0, "peak_bytes": 10, "trained": 5, "stored": 7, "environment": {},
}  # fmt: skip


@counts(1500)
def test_a_result_of_a_comparison(count: int, tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    store.open()
    file = tmp_path / "results" / "lora" / "rate0.001_seed0.json"
    file.parent.mkdir()

    def check(results: list[Result]) -> None:
        (result,) = results
        assert 0 < result.rate < math.inf
        assert f"{result.rate:g} {result.start_seconds:.1f} {result.trained:,}"
        assert all(isinstance(float(value), float) for point in result.evals for value in point.values())
        assert json.loads(json.dumps(result.to_dict())).keys() == RESULT.keys()

    law = Law(tmp_path, store.load, check, file.name)
    fuzz_file(file, damaged(edited_objects(RESULT) | json_texts()), law, count)


@counts(750)
def test_the_settings_of_a_comparison(count: int, tmp_path: Path) -> None:
    """What is taken for the settings of this comparison says the same of every name; a missing one counts as null."""
    ours = {"max_steps": 4, "prompt_template": "{prompt}", "train_file": None, "rates": [0.1]}
    file = tmp_path / "settings.json"

    def check(store: Store) -> None:
        found = json.loads(file.read_bytes())
        assert {name: value for name, value in found.items() if value is not None} == {
            name: value for name, value in ours.items() if value is not None
        }

    law = Law(tmp_path, lambda: Store(tmp_path, ours), check, file.name)
    fuzz_file(file, damaged(edited_objects(ours) | edited_objects({**ours, "lora_r": 8})), law, count)


@pytest.mark.parametrize("name", ["\ud800", "x" * 20_000], ids=["surrogate", "long"])
def test_a_name_of_the_settings_that_cannot_be_shown_is_shown_in_short(name: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({name: 1}))
    with pytest.raises(ValueError, match=r"settings\.json") as error:
        Store(tmp_path, {})
    assert len(str(error.value).encode("utf-8")) < 1_000 + len(str(tmp_path))


ANSWER = {"id": 0, "prompt": "1 + 1", "model": "m", "answer": "2"}


@counts(750)
def test_a_file_of_answers(count: int, tmp_path: Path) -> None:
    """A line that a stopped run left unfinished is cut off; every other line counts."""
    path = tmp_path / "answers.jsonl"

    def read() -> list[dict[str, Any]]:
        before = path.read_bytes()
        try:
            return answer_missing(path, [{**ANSWER, "id": 0}], lambda batch: [ANSWER for _ in batch], 1)
        finally:
            path.write_bytes(before)

    def check(records: list[dict[str, Any]]) -> None:
        assert [(record["id"], record["prompt"]) for record in records] == [(0, "1 + 1")]

    lines = st.lists(edited_objects(ANSWER) | json_texts(), min_size=1, max_size=3)
    texts = lines.map(lambda some: "".join(line + "\n" for line in some))
    fuzz_file(path, damaged(texts), Law(tmp_path, read, check, path.name), count)


def test_a_file_of_answers_that_is_refused_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('[]\n{"id": 1, "pro')
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1"):
        read_records(path)
    assert path.read_text() == '[]\n{"id": 1, "pro'


@pytest.mark.parametrize("content", ["7", "{}", "[1]", '["a"', "[" * 100_000, "\x00"], ids=lambda content: content[:4])
def test_class_names(content: str, tmp_path: Path) -> None:
    (tmp_path / "class_names.json").write_text(content)
    with pytest.raises(ValueError, match=r"class_names\.json is not a list of class names"):
        saved_class_names(str(tmp_path))


# --- YAML ------------------------------------------------------------------------------------------------------------


PARSER = make_parser()
KEYS = [action.dest for action in PARSER._actions]
ODD_YAML = [
    "&a [1]", "*a", "&a {b: *a}", "!!python/object/apply:os.system [touch planted]", "!!python/name:os.system",
    "!!int x", "!!timestamp x", "!!bool maybe", "!!binary x", "!x 1", "<<: {a: 1}", "=", "? [1]", "{[1]: 2}",
    "{{a}: 1}", "!!set {a}", "{a: 2001-01-01}", "{1: 2}", "2001-01-01T00:00:00+99:99", "0b_", "0x_", ".nan", "~",
    "|\n  text", "- 1\n- 2", "'", '"\\uD800"', "%TAG ! x", "--- 1", "...", "{a: 1, a: 2}", "[{a: 1, a: 2}]", "@", "`",
]  # fmt: skip


def yaml_texts() -> st.SearchStrategy[str]:
    keys = st.sampled_from(KEYS) | st.sampled_from(["lora_rr", "~", "1", "? [a]", "!!str lora_r", "&a lora_r", "<<"])
    plain = st.sampled_from(["8", "0.5", "lora_ga", "true", "word", "[q_proj, v_proj]", "1e-3", "'on'"])
    values = plain | plain | st.sampled_from(ODD_YAML) | scalars() | json_texts()
    good = [
        "lora_r: 8",
        "init: lora_ga",
        "gamma: 0.5",
        "target_modules: [q_proj, v_proj]",
        "bf16: true",
        "task: seq2seq",
    ]
    lines = st.sampled_from(good) | st.tuples(keys, values).map(lambda line: f"{line[0]}: {line[1]}")
    several = st.lists(lines, min_size=1, max_size=3) | st.lists(st.sampled_from(good), min_size=1, unique=True)
    return several.map(lambda some: "".join(f"{line}\n" for line in some))


def bombs() -> st.SearchStrategy[str]:
    """A kilobyte that stands for 9^15 words, and nesting of each kind."""
    laughs = "a0: &a0 {x: 1}\n" + "".join(
        f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n" for n in range(1, 16)
    )
    kinds = [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")]
    nested = [f"lora_r: {deep(depth, *kind)}" for depth in (10, 300, 20_000) for kind in kinds]
    return st.sampled_from([laughs, f"lr_scheduler_kwargs: {{{laughs}}}", "@x*300000@", *nested])


@counts(2000)
def test_a_yaml_file(count: int, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    fresh = [(action, action.default, action.required) for action in PARSER._actions]

    def read() -> dict[str, Any]:
        PARSER._defaults.clear()
        for action, action.default, action.required in fresh:  # noqa: B007 - the loop puts them back
            pass
        replace_defaults(PARSER, str(path))
        return dict(PARSER._defaults)

    def check(found: dict[str, Any]) -> None:
        kinds = {action.dest: action for action in reversed(PARSER._actions)}
        for key, value in found.items():
            for item in value if isinstance(value, list) else [value]:
                assert not kinds[key].choices or item in kinds[key].choices
                assert item is None or isinstance(item, (str, int, float, Path))

    try:
        fuzz_file(path, damaged(yaml_texts() | bombs()), Law(tmp_path, read, check, path.name), count)
    finally:
        PARSER._defaults.clear()
        for action, action.default, action.required in fresh:  # noqa: B007
            pass


@counts(400)
def test_a_yaml_file_through_the_whole_command_line(count: int, tmp_path: Path, capsys: Any) -> None:
    """What the arguments make of the values is an error of argparse, which says what it wants, or names the file."""
    path = tmp_path / "run.yaml"
    types = (ModelArguments, DataArguments, LoraArguments, LoRAGAConfig)
    needed = ["--model_name_or_path", "m", "--train_file", "rows.jsonl"]

    def read() -> tuple[Any, ...]:
        try:
            return parse(["--config", str(path), *needed], types)
        except SystemExit as stop:
            name = "run.yaml" if stop.code == 2 else "another exit code"
            raise ValueError(f"{capsys.readouterr().err.splitlines()[-1]} ({name})") from stop

    def check(found: tuple[Any, ...]) -> None:
        assert [type(part) for part in found] == list(types)
        assert 0 < found[3].gamma < math.inf

    fields = {
        "lora_r": 8, "gamma": 16.0, "num_samples": 4, "init": "lora_ga", "keep_matching": ["a=b"], "max_length": 9,
        "probe_file": "p", "completion_pattern": "x", "eval_fraction": 0.5, "train_file": "t", "task": "causal-lm",
    }  # fmt: skip
    odd = ['"("', '"a=("', json.dumps("(" * 5000), '"a{99999999999}"', '["a=[a"]', "-1", "0.0", "1.5", '"="']
    values = st.sampled_from(odd) | scalars() | json_texts()
    plain = st.sampled_from(sorted(fields)).map(lambda name: (name, json.dumps(fields[name])))
    lines = st.lists(plain | st.tuples(st.sampled_from(sorted(fields)), values), max_size=3, unique_by=lambda f: f[0])
    fuzz_file(path, lines.map(object_text).map(str.encode), Law(tmp_path, read, check, path.name), count)
