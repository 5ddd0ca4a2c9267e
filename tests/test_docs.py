"""Check what a reader meets first: docstrings as pydoc shows them, and the files that the README and the docs name."""

from __future__ import annotations

import inspect
import pydoc
import re
from pathlib import Path

import pytest

import lora_ga_trainer


ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", lora_ga_trainer.__all__)
def test_every_public_name_renders_with_pydoc_and_explains_what_it_takes(name):
    public = getattr(lora_ga_trainer, name)
    if isinstance(public, dict):  # a registry: its entries say what they are
        assert public
        assert all(entry.about for entry in public.values())
        return
    text = pydoc.plain(pydoc.render_doc(public))
    doc = inspect.getdoc(public)
    assert doc.splitlines()[0] in text
    assert re.match(r"[A-Z`].*[.:]$", doc.split("\n\n")[0].replace("\n", " "))
    if inspect.isfunction(public):
        for parameter in inspect.signature(public).parameters:
            assert re.search(rf"\b{parameter}\b", doc), f"{name}: {parameter} is not explained"


def test_the_package_renders_with_pydoc_and_opens_with_its_letters():
    text = pydoc.plain(pydoc.render_doc(lora_ga_trainer))
    listed = set(re.findall(r"^ {8}([A-Z]|[a-z])(?:, \w+)*  +\S", text, re.MULTILINE))
    assert {"W", "G", "A", "s", "r", "k"} <= listed
    for name in lora_ga_trainer.__all__:
        assert name in text


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(r"(?:lora_ga_trainer|recipes|notebooks|tests|docs)/[\w/.-]*\w\.(?:py|yaml|ipynb|rst)", text)
    )
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert missing == []


def test_the_pages_name_the_programs_and_the_notebooks():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    programs = {path.name for path in (ROOT / "recipes").glob("*.py")} - {"__init__.py"}
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert programs
    assert notebooks
    assert sorted(name for name in programs | notebooks if name not in text) == []


def test_the_changes_begin_with_the_version_of_the_package():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert first == lora_ga_trainer.__version__
