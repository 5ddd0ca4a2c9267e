"""What the README says is what happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

import lora_ga_trainer


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_block_is_the_main_command_and_the_second_the_tests() -> None:
    (language, main), (_, tests) = BLOCKS[:2]
    assert language == "bash"
    assert main.endswith("accelerate launch recipes/finetune.py --config recipes/configs/quickstart.yaml\n")
    assert tests.endswith("python -m pytest -n 2 --dist loadfile\n")
    assert (ROOT / "recipes" / "configs" / "quickstart.yaml").exists()


def test_the_example_runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    example = next(code for language, code in BLOCKS if language == "python")
    tiny.bert(num_labels=2).save_pretrained(tmp_path / "model")
    rows = tiny.class_rows(32, classes=2)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"MODEL": str(tmp_path / "model"), "rows": rows}
    exec(compile(example, "README.md", "exec"), names)
    assert names["trainer"].lora_ga_report.samples == 32
    assert names["trainer"].state.global_step == 20


def test_every_name_and_field_it_mentions_exists() -> None:
    table = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    fields = lora_ga_trainer.LoRAGAConfig().to_dict()
    assert table
    assert set(table) <= set(fields)
    for name in ("LoRAGAMixin", "LoRAGACallback", "load_adapter", "export_adapter"):
        assert name in README
        assert name in lora_ga_trainer.__all__


def test_the_public_names_are_documented() -> None:
    for name in lora_ga_trainer.__all__:
        assert getattr(lora_ga_trainer, name).__doc__, name


def test_figures_are_not_older_than_their_source() -> None:
    """The sketch's table in the code and the default it argues for agree."""
    from lora_ga_trainer.gradients import sketch

    assert "**64, 1/16 1/4 1/2, 64**" in sketch.__doc__
    assert sketch.sketch_columns(lora_ga_trainer.LoRAGAConfig(), 8) == 64
    assert sketch.turning_points(lora_ga_trainer.LoRAGAConfig().num_samples) == [4, 16, 32, 64]
