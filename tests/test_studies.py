"""The studies behind the docs run, and show what the docs say of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "studies"))

import lora_pro_from_zero


def test_the_steps_of_plain_lora_shrink_with_the_rate_and_the_papers_own_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate of 1e-9 AdamW leaves `A` where it is; `lora_pro_adamw` rewrites it (docs/lora_pro.md)."""
    rates = ["--rates", "1e-9", "--steps", "3", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["study", "--corrections", "none", "lora_pro_adamw", *rates])
    lora_pro_from_zero.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    moved = {correction: float(change.split()[0]) for correction, _, _, change in rows}
    assert moved["none"] == 0.0
    assert moved["lora_pro_adamw"] > 0.2
