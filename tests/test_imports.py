"""Imports run one way: the contracts in setup.cfg hold for the package, and each of them would notice a breach."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import optional
import pytest


ROOT = Path(__file__).resolve().parents[1]
ORDER, CIRCLES = "Imports run down", "No circle of imports"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the package in `folder` under the contracts in its setup.cfg."""
    optional.require("importlinter")
    program = "from importlinter.cli import lint_imports_command as main; main(['--no-cache'])"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)


def verdicts(output: str) -> dict[str, str]:
    """Return `KEPT` or `BROKEN` of each contract, by the beginning of its name; long names go over two lines."""
    found = re.findall(rf"^({ORDER}|{CIRCLES})[^.\n]*(?:\n[^.\n]*)? (KEPT|BROKEN)$", output, re.MULTILINE)
    return dict(found)


def test_the_contracts_hold() -> None:
    finished = lint(ROOT)
    assert finished.returncode == 0, finished.stdout
    assert verdicts(finished.stdout) == {ORDER: "KEPT", CIRCLES: "KEPT"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "lora_ga_trainer", tmp_path / "lora_ga_trainer")
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("maths/factors.py", "from ..config import LoRAGAConfig", {ORDER, CIRCLES}),  # config imports maths.inits
        ("maths/lora_pro.py", "from ..engines import devices", {ORDER}),  # wings of one floor
        ("optimizers/moments.py", "from ..saving import json_file", {ORDER}),
        ("saving/json_file.py", "def late():\n    from ..gradients import tap", {ORDER, CIRCLES}),  # inside a function
        ("starts/report.py", "from .. import callback", {ORDER, CIRCLES}),
        ("adapters/storage.py", "from . import layer", {CIRCLES}),  # within one wing
    ],
)
def test_a_breach_is_noticed(file: str, line: str, broken: set[str], copy: Path) -> None:
    with (copy / "lora_ga_trainer" / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    finished = lint(copy)
    assert finished.returncode == 1
    found = verdicts(finished.stdout)
    assert {contract for contract, verdict in found.items() if verdict == "BROKEN"} == broken, finished.stdout


def test_a_module_that_the_order_does_not_list_is_noticed(copy: Path) -> None:
    (copy / "lora_ga_trainer" / "extra.py").write_text("")
    finished = lint(copy)
    assert finished.returncode == 1
    assert "extra" in finished.stdout


def test_an_import_for_type_checkers_alone_is_none(copy: Path) -> None:
    with (copy / "lora_ga_trainer" / "maths" / "factors.py").open("a", encoding="utf-8") as module:
        module.write("\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..config import LoRAGAConfig\n")
    assert lint(copy).returncode == 0
