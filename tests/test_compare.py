"""A comparison as a whole: what it asks for, keeps, says before and after; and the program itself on a tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainingArguments


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import compare
import comparison.scheduler as scheduler
from comparison.arms import parse_arms
from comparison.outcome import Row, draw, reference_loss, shown_metric, to_json, to_table
from comparison.plan import clock, describe_plan, run_seconds
from comparison.run import Result
from comparison.settings import CompareArguments, metric_of, require_comparable
from comparison.store import Store
from comparison.sweep import Verdict
from finetuning.arguments import ARGUMENTS, LoraArguments, parse

from lora_ga_trainer import LoRAGAConfig


RECIPES = Path(compare.__file__).resolve().parent
WORDS = list("abcdefgh")


def result(
    arm: str = "lora", rate: float = 1e-3, seed: int = 0, losses=(0.8, 0.6, 0.5, 0.4), **changes: Any
) -> Result:
    evals = [{"step": 25 * (i + 1), "eval_loss": loss, "eval_accuracy": 1 - loss / 2} for i, loss in enumerate(losses)]
    figures = {
        "step_seconds": 0.5,
        "eval_seconds": 2.0,
        "start_seconds": 10.0,
        "peak_bytes": 2**30,
        "trained": 1000,
        "stored": 2000,
        "environment": {"commit": "0123456789ab"},
    }
    return Result(arm=arm, rate=rate, seed=seed, evals=evals, **(figures | changes))


# --- what comes out --------------------------------------------------------------------------------------------------


def test_a_row_reports_quarter_half_and_end_and_when_it_got_to_a_loss():
    row = Row("lora", Verdict((), 1e-3), {1e-3: 0.4}, [result(), result(seed=1, losses=(0.9, 0.7, 0.5, 0.2))])
    assert row.at(0.25, "eval_loss") == [0.8, 0.9]
    assert row.at(0.5, "eval_loss") == [0.6, 0.7]
    assert row.at(1, "eval_loss") == [0.4, 0.2]
    assert row.steps_to(0.55) == pytest.approx([62.5, 68.75])  # half and three quarters of the way from 50 to 75
    assert row.steps_to(0.8) == [25, pytest.approx(37.5)]
    assert row.steps_to(0.3) == [None, pytest.approx(75 + 25 * 2 / 3)]


def test_quarters_are_right_with_more_evaluations():
    row = Row("lora", Verdict((), 1e-3), {}, [result(losses=(8, 7, 6, 5, 4, 3, 2, 1))])
    assert [row.at(share, "eval_loss")[0] for share in (0.25, 0.5, 1)] == [7, 5, 1]


def test_the_table_names_winners_those_without_and_those_that_failed():
    rows = [
        Row("lora", Verdict((), 1e-3), {1e-3: 0.4}, [result(), result(seed=1, losses=(0.9, 0.7, 0.5, 0.2))]),
        Row(
            "lora_ga", Verdict((), 1e-2, "its best rate 0.01 is at the high end of its sweep"), {}, [result("lora_ga")]
        ),
        Row("full", Verdict((), None, "every rate ended without a finite score"), {1e-3: math.nan}, []),
    ]
    assert reference_loss(rows) == pytest.approx(0.3)
    lines = to_table(rows, "eval_accuracy", reference_loss(rows)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:5]]
    assert {len(row) for row in cells} == {len(lines[0].split("|")) - 2}
    assert cells[0][:6] == [
        "lora",
        "0.001",
        "0.850 (0.800 to 0.900)",
        "0.850 (0.800 to 0.900)",
        "0.650 (0.600 to 0.700)",
        "0.300 (0.200 to 0.400)",
    ]
    assert cells[0][6] == "1 of 2 seeds get there"
    assert cells[0][7:] == ["0.500", "10.0", "1.00", "1,000", "2,000"]
    assert cells[1][1] == "0.01 (no winner)"
    assert cells[1][6] == "never"
    assert cells[2][1] == "none"
    assert lines[-2:] == [
        "lora_ga: no winner, its best rate 0.01 is at the high end of its sweep.",
        "full: no winner, every rate ended without a finite score.",
    ]


def test_the_json_is_plain_json_whatever_diverged(tmp_path):
    diverged = result("lora", losses=(0.8, 0.6, 0.5, math.nan))  # an accuracy decides, and is a number all the same
    rows = [Row("full", Verdict((), None, "failed"), {1e-3: math.nan, 1e-2: math.inf}, [])]
    rows.append(Row("lora", Verdict((), 1e-3), {1e-3: 0.4}, [diverged]))
    text = json.dumps(to_json(rows, "eval_loss", {"max_steps": 4}), allow_nan=False)
    assert json.loads(text)["arms"][0]["swept"] == {"0.001": "nan", "0.01": "inf"}
    assert json.loads(text)["arms"][1]["runs"][0]["evals"][-1]["eval_loss"] == "nan"
    draw(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_accuracy_is_shown_beside_the_loss_that_decides():
    rows = [Row("lora", Verdict((), 1e-3), {}, [result()])]
    assert shown_metric(rows, "eval_loss") == "eval_accuracy"
    assert shown_metric(rows, "eval_macro_f1") == "eval_macro_f1"
    assert shown_metric([], "eval_loss") == "eval_loss"


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_the_plan_counts_runs_and_multiplies_what_a_run_takes():
    arms = parse_arms("lora,full", LoRAGAConfig(), LoraArguments())
    budget = CompareArguments(rates=[1e-3, 1e-2, 1e-1], seeds=[0, 1, 2])
    short = result(losses=(0.9,))
    assert run_seconds([short], steps=100, points=4) == 100 * 0.5 + 4 * 2.0 + 10.0
    plan = describe_plan(arms, budget, [], 100, lambda: short)
    assert "2 arms x (3 rates + 2 further seeds) = 10 runs of 100 steps, 0 of them done" in plan
    assert "About 68 s a run by a few steps of 'lora': 0 h 11 min for the 10 that are left" in plan
    done = [result(), result("full", start_seconds=12.0), result("pissa", start_seconds=99.0)]
    plan = describe_plan(arms, budget, done, 100, lambda: pytest.fail("no trial is needed"))
    assert "2 of them done" in plan
    assert "About 69 s a run by 2 runs that are done: 0 h 09 min for the 8 that are left" in plan
    assert clock(3 * 3600 + 29) == "3 h 00 min"


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_results_come_back_as_they_were(tmp_path):
    store = Store(tmp_path, {"max_steps": 4})
    store.open()
    ours = [result(), result("lora_ga:gamma=4", 3e-4, 2, peak_bytes=None)]
    store.add("lora", ours[0])
    store.add("lora_ga_gamma=4", ours[1])
    assert Store(tmp_path, {"max_steps": 4}).load() == ours


def test_a_comparison_with_other_settings_is_not_continued(tmp_path):
    Store(tmp_path, {"max_steps": 4, "lora_r": 8}).open()
    with pytest.raises(ValueError, match="made with max_steps=4, this one has 8"):
        Store(tmp_path, {"max_steps": 8, "lora_r": 8})


@pytest.mark.parametrize("content", ["", "[]", '{"arm": "lora"}', '{"arm": '])
def test_a_damaged_result_is_named_and_not_skipped(tmp_path, content):
    store = Store(tmp_path, {})
    store.open()
    file = tmp_path / "results" / "lora" / "rate0.001_seed0.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(ValueError, match=r"rate0.001_seed0.json.*Delete it"):
        store.load()


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({"learning_rate": 1e-3}, {}, "learning_rate=0.001: every arm is swept over --rates"),
        ({"seed": 1}, {}, "seed=1: use --seeds"),
        ({"eval_strategy": "steps"}, {}, "eval_strategy=.*use --eval_points"),
        ({"resume_from_checkpoint": "x"}, {}, "continues by itself"),
        ({"max_steps": -1}, {}, "max_steps=-1: give the steps"),
        ({}, {"eval_points": 6}, "eval_points=6 must be a multiple of 4 that divides max_steps=24"),
        ({}, {"eval_points": 16}, "eval_points=16 must be"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, changes, budget, message):
    args = Seq2SeqTrainingArguments(str(tmp_path), **({"max_steps": 24, "report_to": []} | changes))
    with pytest.raises(ValueError, match=message):
        require_comparable(CompareArguments(**budget), args)


def test_the_metric_that_decides_is_turned_so_that_less_is_better(tmp_path):
    args = Seq2SeqTrainingArguments(str(tmp_path), report_to=[])
    assert metric_of(args) == ("eval_loss", 1.0)
    assert metric_of(replace(args, metric_for_best_model="accuracy")) == ("eval_accuracy", -1.0)
    assert metric_of(replace(args, metric_for_best_model="eval_wer", greater_is_better=False)) == ("eval_wer", 1.0)


# --- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A tiny classifier with a word-level tokenizer, and rows in which one letter tells the class."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(tmp_path / "base")
    tiny.bert(num_labels=2).save_pretrained(tmp_path / "base")
    rows = [{"text": " ".join(WORDS[(i + k) % 8] for k in range(5)), "label": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "arms": "lora,lora_ga+lora_pro",
        "rates": [1e-3, 1e-2],
        "seeds": [0, 1],
        "max_extensions": 1,
        "model_name_or_path": str(tmp_path / "base"),
        "task": "sequence-classification",
        "dtype": "float32",
        "train_file": str(tmp_path / "rows.jsonl"),
        "max_length": 8,
        "lora_r": 2,
        "num_samples": 8,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    return [w for k, v in settings.items() for w in (f"--{k}", *map(str, v if isinstance(v, list) else [v]))]


def call(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> list[tuple[str, float, int]]:
    """Run the program and return the runs that it made."""
    made = []
    run_arm = scheduler.run_arm

    def noted(task, arm, rate, seed, points, steps=None):
        result = run_arm(task, arm, rate, seed, points, steps)
        if steps is None:
            made.append((arm.name, rate, seed))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["compare.py", *command])
        patch.setattr(scheduler, "run_arm", noted)
        compare.main()
    return made


def test_the_program_compares_continues_and_reports(tmp_path, command, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, [*command, "--plan_only", "true"]) == []
    plan = capsys.readouterr().out
    assert "2 arms x (2 rates + 1 further seeds) = 6 runs of 4 steps, 0 of them done" in plan
    assert not (out / "comparison.json").exists()

    made = call(monkeypatch, command)
    printed = capsys.readouterr().out
    found = json.loads((out / "comparison.json").read_text())
    assert [row["arm"] for row in found["arms"]] == ["lora", "lora_ga+lora_pro"]
    assert len(made) == len(set(made)) == len(list((out / "results").glob("*/*.json")))
    assert {seed for _, _, seed in made[:4]} == {0}  # sweeps first
    assert (out / "comparison.png").stat().st_size > 1000
    assert (out / "comparison.md").read_text().strip() in printed
    for row in found["arms"]:
        scores = {float(rate): score for rate, score in row["swept"].items()}
        assert row["best_rate"] == min(scores, key=scores.get)
        assert row["winner"] == (min(scores) < row["best_rate"] < max(scores))
        assert [run["seed"] for run in row["runs"]] == ([0, 1] if row["winner"] else [0])
    assert found["settings"]["max_steps"] == 4

    # One result lost, as by a kill: that run alone is made again, and gives the same.
    lost = next((out / "results" / "lora").glob("rate0.001_seed0.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    assert call(monkeypatch, command) == [("lora", 1e-3, 0)]
    assert json.loads(lost.read_text())["evals"] == before["evals"]

    # Nothing left to do: the report is made from what is there. More arms go into the same folder.
    assert call(monkeypatch, command) == []
    more = [*command, "--arms", "lora,lora_one", "--seeds", "0", "--max_extensions", "0"]
    assert {name for name, _, _ in call(monkeypatch, more)} == {"lora_one"}
    rows = json.loads((out / "comparison.json").read_text())["arms"]
    assert [[run["seed"] for run in row["runs"]] for row in rows] == [[0], [0]], (
        "arms are averaged over the same seeds"
    )

    with pytest.raises(ValueError, match="made with lora_r=2, this one has 4"):
        call(monkeypatch, [*command, "--lora_r", "4"])


@pytest.mark.slow
def test_two_processes_compare_as_one(tmp_path, command):
    """Both decide alike, one writes; each micro-batch is half as large, so that runs see the same examples."""
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(RECIPES / "accelerate" / "two_cpu_processes.yaml"),
    ]
    halves = ["--per_device_train_batch_size", "2", "--seeds", "0", "--max_extensions", "0"]
    finished = subprocess.run(
        [sys.executable, *launch, str(RECIPES / "compare.py"), *command, *halves],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(RECIPES.parent)},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert finished.stdout.count("2 arms x (2 rates + 0 further seeds) = 4 runs") == 1
    assert [len(row["swept"]) for row in found["arms"]] == [2, 2]
    assert len(list((tmp_path / "out" / "results").glob("*/*.json"))) == 4
    assert found["settings"]["world_size"] == 2


def test_a_metric_that_results_do_not_have_is_named():
    """In a new run the Trainer says so; here the results were made before."""
    asked = SimpleNamespace(metric="eval_bleu", sign=-1.0)
    with pytest.raises(ValueError, match="no 'eval_bleu' among eval_loss, eval_accuracy"):
        scheduler.Comparison.score(asked, result())


def test_held_out_rows_are_needed(command, monkeypatch):
    with pytest.raises(ValueError, match=r"eval_fraction=0.0: a comparison needs held-out rows"):
        call(monkeypatch, [*command, "--eval_fraction", "0"])


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("compare_*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_comparison_parses_and_opens_with_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    opening = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert f"accelerate launch recipes/compare.py --config recipes/configs/{path.name}" in opening
    rows = [] if "train_file:" in text else ["--train_file", "rows.jsonl"]
    model, _, lora, config, args, budget = parse(["--config", str(path), *rows], types=(*ARGUMENTS, CompareArguments))
    assert model.model_name_or_path == yaml.safe_load(text)["model_name_or_path"]
    require_comparable(budget, args)
    parse_arms(budget.arms, config, lora)
