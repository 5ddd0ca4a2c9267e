"""The site of `docs/`: it builds without a warning, its links lead somewhere, every public name has a place on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from optional import require

import lora_ga_trainer


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    require("sphinx")
    require("furo")
    require("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(source), str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def complaints(built: subprocess.CompletedProcess[str]) -> str:
    """Sphinx's warnings without what libraries log while the package is imported; all of it where there are none."""
    lines = [line for line in built.stderr.splitlines() if re.search(r"WARNING:|ERROR:|CRITICAL:", line)]
    return "\n".join(lines) or built.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    built = build(DOCS, target)
    assert built.returncode == 0, complaints(built)
    return target


def test_it_builds_without_a_warning_and_every_page_is_reached(site: Path) -> None:
    assert (site / "index.html").exists()
    pages = {page.stem for page in (*DOCS.glob("*.md"), *DOCS.glob("*.rst"))}
    reached = set(re.findall(r'href="([\w-]+)\.html"', (site / "index.html").read_text(encoding="utf-8")))
    assert pages - {"index"} <= reached


def test_every_public_name_has_a_place_and_its_docstring_is_shown(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    missing = [name for name in lora_ga_trainer.__all__ if f'id="lora_ga_trainer.{name}"' not in page]
    assert missing == [], "public names that docs/api.rst lacks"
    strays = re.findall(r"\[<code[^\]]{,200}\]|\[`\w+`\]", page)
    assert strays == [], "links of docstrings that stayed in brackets"


def test_every_field_of_the_config_is_explained(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    for field in lora_ga_trainer.LoRAGAConfig.__dataclass_fields__:
        assert f"<strong>{field}</strong>" in page, field


def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    """Under the settings of the site, to a page that is missing and to a name of this package that is missing."""
    source = tmp_path / "docs"
    (source / "_static").mkdir(parents=True)
    (source / "conf.py").write_text((DOCS / "conf.py").read_text(encoding="utf-8"), encoding="utf-8")
    (source / "index.md").write_text("# Home\n\n```{toctree}\npage\nname\n```\n", encoding="utf-8")
    (source / "page.md").write_text("# Page\n\nSee [nothing](nowhere.md).\n", encoding="utf-8")
    (source / "name.rst").write_text("Name\n====\n\n:py:obj:`lora_ga_trainer.Nothing`\n", encoding="utf-8")
    built = build(source, tmp_path / "site")
    assert built.returncode != 0
    (first, second) = sorted(complaints(built).splitlines())
    assert "name.rst" in first
    assert "lora_ga_trainer.Nothing" in first
    assert "page.md" in second
    assert "nowhere.md" in second
