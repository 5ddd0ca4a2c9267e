"""The benchmarks run, and print what their tables are made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "recipes" / "benchmarks"

pytestmark = pytest.mark.slow


def run(name: str, output: Path) -> dict:
    command = [sys.executable, str(FOLDER / name), "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text(encoding="utf-8"))


def test_the_cost_of_a_start(tmp_path: Path) -> None:
    found = run("probe.py", tmp_path / "found.json")
    assert set(found["rounds"][0]) == {"floor", "ours", "peft"}
    assert all(row["seconds"] > 0 for row in found["rounds"][0].values())
    assert found["rounds"][0]["ours"]["state"] == found["rounds"][0]["peft"]["state"], "tiny layers are kept whole"


def test_the_cost_of_an_anchored_step(tmp_path: Path) -> None:
    found = run("anchored.py", tmp_path / "found.json")
    assert len(found["rounds"]) == 3
    assert set(found["summary"]["peaks"]) == {"plain", "anchored"}


def test_the_cost_of_lora_pro(tmp_path: Path) -> None:
    found = run("lora_pro.py", tmp_path / "found.json")
    assert found["results"]["adamw"]["throughput"] == 1.0


def test_the_cost_of_singular_vectors(tmp_path: Path) -> None:
    found = run("factorise.py", tmp_path / "found.json")
    assert set(found["rounds"]) == {"512x1024", "1024x1024"}
    assert all(seconds > 0 for rows in found["rounds"].values() for row in rows for seconds in row.values())
