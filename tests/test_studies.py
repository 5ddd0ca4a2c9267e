"""The studies behind the docs run, and show what the docs say of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "studies"))

import lora_pro_from_zero


def rows_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    """Run the study. Returns the cells of its table by the correction."""
    monkeypatch.setattr(sys, "argv", ["study", "--inits", "none", "--seeds", "0", *words])
    lora_pro_from_zero.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {correction: [loss, change] for _, correction, _, loss, _, change in rows}


def test_from_zero_a_correction_moves_A_as_the_rate_lets_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """At a rate of 1e-9 nothing moves. At 1e-3 `lora_pro` moves `A` about as far as AdamW does (docs/lora_pro.md)."""
    results = ["--results", str(tmp_path / "found.jsonl")]
    still = rows_of(monkeypatch, capsys, "--rates", "1e-9", "--steps", "3", *results)
    assert {change.split()[0] for _, change in still.values()} == {"0.000"}
    assert set(still) == {"none", "lora_pro", "lora_pro_adamw"}
    found = rows_of(
        monkeypatch, capsys, "--corrections", "none", "lora_pro", "--rates", "1e-3", "--steps", "30", *results
    )
    moved = {correction: float(change.split()[0]) for correction, (_, change) in found.items()}
    assert moved["lora_pro"] == pytest.approx(moved["none"], rel=0.25)


def test_a_second_run_of_the_study_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--corrections", "none", "--rates", "1e-3", "--steps", "2", "--results", str(tmp_path / "found.jsonl")]
    first = rows_of(monkeypatch, capsys, *words)
    monkeypatch.setattr(lora_pro_from_zero, "train", None)
    assert rows_of(monkeypatch, capsys, *words) == first
