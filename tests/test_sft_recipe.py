"""The recipe for TRL's SFTTrainer, run whole on a tiny model in a folder and a file of a few rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import optional
import pytest
import tiny
import tiny_trl
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from test_trainer import logits_of


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))  # as `python recipes/sft_trl.py` does


@pytest.fixture
def recipe() -> Any:
    optional.require("trl")
    import sft_trl

    return sft_trl


def write_rows(folder: Path, kind: str) -> str:
    pairs = tiny_trl.rows(24, "prompt", "completion")
    turns = lambda row: [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    rows = pairs if kind == "pairs" else [{"messages": turns(row)} for row in pairs]
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


SHORT = """
lora_r: 4
lora_target_modules: all-linear
num_samples: 6
max_length: 32
eval_fraction: 0.25
max_steps: 2
per_device_train_batch_size: 4
save_strategy: "no"
disable_tqdm: true
use_cpu: true
bf16: false
"""


def run(recipe: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the program with the YAML above and return what it wrote to its folder."""
    settings = folder / "short.yaml"
    settings.write_text(SHORT, encoding="utf-8")
    base = tiny_trl.save_model(folder / "base")
    common = ("--config", str(settings), "--model_name_or_path", str(base), "--output_dir", str(folder / "out"))
    monkeypatch.setattr(sys, "argv", ["sft_trl.py", *common, *arguments])
    recipe.main()
    return {name: json.loads((folder / "out" / f"{name}_results.json").read_text()) for name in ("train", "eval")}


@pytest.mark.parametrize(
    ("kind", "extra"), [("pairs", ()), ("messages", ()), ("messages", ("--packing", "true", "--max_length", "48"))]
)
def test_rows_become_an_adapter_that_plain_peft_loads(recipe, monkeypatch, capsys, tmp_path, kind, extra):
    results = run(recipe, monkeypatch, tmp_path, "--train_file", write_rows(tmp_path, kind), *extra)
    assert results["train"]["train_loss"] > 0
    assert results["eval"]["eval_loss"] > 0
    assert 0 <= results["eval"]["eval_mean_token_accuracy"] <= 1
    printed = capsys.readouterr().out
    assert "lora_ga: 14 layers initialised from" in printed
    assert f"adapter saved to {tmp_path / 'out'}" in printed
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.peft_config["default"].r, model.peft_config["default"].lora_dropout) == (8, 0.05), "TRL's dropout"
    assert not torch.equal(logits_of(model), logits_of(tiny.llama()))
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(tiny.llama()))


def test_the_start_can_be_left_out_and_the_command_line_wins(recipe, monkeypatch, capsys, tmp_path):
    rows = write_rows(tmp_path, "pairs")
    results = run(recipe, monkeypatch, tmp_path, "--train_file", rows, "--init", "none", "--max_steps", "3")
    assert "lora_ga" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "lora_ga_report.json").exists()
    assert results["train"]["epoch"] == pytest.approx(3 / 5, abs=0.01), "three steps of the five of 18 rows"
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    assert model.peft_config["default"].r == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give exactly one of the two"),
        (("--train_file", "rows.jsonl", "--lerning_rate", "1"), "Did you mean 'learning_rate'"),
        (("--train_file", "rows.jsonl"), r"rows\.jsonl: no such file or folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(recipe, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(recipe, monkeypatch, tmp_path, *arguments)


def test_a_hub_data_set_is_asked_for_by_its_name(recipe, monkeypatch, tmp_path):
    from finetuning import reading

    asked = []
    rows = tiny_trl.dataset(24, "text")
    monkeypatch.setattr(reading, "load_dataset", lambda name, config, split: asked.append((name, split)) or rows)
    run(recipe, monkeypatch, tmp_path, "--dataset_name", "someone/texts", "--eval_split", "test")
    assert asked == [("someone/texts", "train"), ("someone/texts", "test")]


def test_the_shipped_yaml_parses_and_opens_with_what_it_is_for(recipe):
    from finetuning.arguments import parse

    path = RECIPES / "configs" / "sft_trl.yaml"
    text = path.read_text(encoding="utf-8")
    opening = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in opening.splitlines())
    assert "accelerate launch recipes/sft_trl.py --config recipes/configs/sft_trl.yaml" in opening
    arguments = ["--config", str(path), "--train_file", "rows.jsonl"]
    model, rows, start, training = parse(arguments, recipe.ARGUMENTS)
    written = yaml.safe_load(text)
    assert (model.model_name_or_path, model.lora_target_modules) == (written["model_name_or_path"], "all-linear")
    assert (start.num_samples, rows.max_eval_samples) == (written["num_samples"], written["max_eval_samples"])
    assert (training.max_length, training.bf16) == (written["max_length"], False)
