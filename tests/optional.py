"""Libraries that some tests need and a plain installation lacks."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def require(name: str) -> ModuleType:
    """
    Import a module, or skip the test with the reason where it is not installed.

    Where the environment variable `CI` is set nothing may be left out: there a missing module is an error. So is, on
    every machine, a module that is installed and can't be imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        if os.environ.get("CI"):
            raise RuntimeError(
                f"{name} is not installed, and CI is set: a test that needs it may not skip."
            ) from error
        pytest.skip(f"{name} is not installed: pip install -e '.[test]'", allow_module_level=True)
