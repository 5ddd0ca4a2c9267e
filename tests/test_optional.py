"""A missing library skips a test on a desk and fails it in CI."""

import sys
from pathlib import Path

import optional
import pytest


MISSING = "a_module_that_nobody_has_installed"


def test_an_installed_module_is_returned():
    assert optional.require("json.decoder") is sys.modules["json.decoder"]


def test_a_missing_module_skips_with_its_name_and_the_way_to_get_it(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=rf"{MISSING}\.part is not installed: pip install"):
        optional.require(f"{MISSING}.part")


def test_a_missing_module_is_an_error_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(RuntimeError, match=f"{MISSING} is not installed, and CI is set"):
        optional.require(MISSING)


def test_a_module_that_breaks_on_import_is_an_error_everywhere(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("CI", raising=False)
    (tmp_path / "broken_module_of_a_test.py").write_text(f"import {MISSING}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=MISSING):
        optional.require("broken_module_of_a_test")
