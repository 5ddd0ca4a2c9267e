"""The types that the package ships (`py.typed`) hold for mypy, and what is excused says why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import optional


ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "lora_ga_trainer").rglob("*.py"))


def mypy(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    optional.require("mypy")
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=cwd, capture_output=True, text=True)


def test_mypy_passes_over_the_package(tmp_path: Path) -> None:
    finished = mypy("--config-file", "setup.cfg", "--cache-dir", str(tmp_path), cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"no issues found in {len(SOURCES)} source files" in finished.stdout


def test_its_settings_would_notice_a_wrong_and_a_missing_type(tmp_path: Path) -> None:
    """On a small package of the same name: a mistake in an annotated function, one without types, a blank excuse."""
    package = tmp_path / "lora_ga_trainer"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def wrong() -> int:\n    return 'a'\n\n\ndef untyped(a):\n    return a\n\n\nx: int = 'b'  # type: ignore\n"
    )
    settings = str(ROOT / "setup.cfg")
    finished = mypy("--config-file", settings, "--cache-dir", str(tmp_path / "cache"), cwd=tmp_path)
    assert re.findall(r"\[([\w-]+)\]$", finished.stdout, re.MULTILINE) == [
        "return-value",
        "no-untyped-def",
        "ignore-without-code",
    ]


def test_every_excuse_has_a_code_and_a_reason() -> None:
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[\w, -]+\]  # \w+( \S+)+$", line), f"{path}:{number}"
