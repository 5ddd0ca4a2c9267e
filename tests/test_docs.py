"""What a reader meets first: docstrings as pydoc shows them, the length of the front page, files that it names."""

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
    text = pydoc.plain(pydoc.render_doc(public))
    doc = inspect.getdoc(public)
    assert doc.splitlines()[0] in text
    assert re.match(r"[A-Z`].*[.:]$", doc.split("\n\n")[0].replace("\n", " "))
    if inspect.isfunction(public):
        for parameter in inspect.signature(public).parameters:
            assert re.search(rf"\b{parameter}\b", doc), f"{name}: {parameter} is not explained"


def test_the_package_renders_with_pydoc_and_opens_with_its_letters():
    text = pydoc.plain(pydoc.render_doc(lora_ga_trainer))
    assert "`W` frozen base weight `(out, in)`" in text
    for name in lora_ga_trainer.__all__:
        assert name in text


def test_the_front_page_is_short_and_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    named = set(re.findall(r"(?:lora_ga_trainer|recipes|notebooks|tests)/[\w/.-]*\w\.(?:py|yaml|ipynb)", text))
    assert named
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert missing == []


def test_the_changes_begin_with_the_version_of_the_package():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert first == lora_ga_trainer.__version__
