"""Settings that every test runs under."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path


# trackio reads it once, when it is imported; without it runs would go to the home folder.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models run slower on more threads, which also round differently; a recipe run in this process sets more."""
    torch.set_num_threads(1)


@pytest.fixture
def unpacked_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Keep bitsandbytes from packing 4-bit codes for CPUs with AVX-512 BF16 when a model is evaluated.

    Release 0.50.2 fails at that on layers of fewer than 32 outputs or 64 inputs, as tiny models have. A larger layer
    passes no gradient afterwards. Both happen with plain PEFT, too.
    """
    if importlib.util.find_spec("bitsandbytes"):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False here"))
