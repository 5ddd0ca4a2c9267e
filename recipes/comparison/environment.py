"""The machine and the libraries that a figure was measured on."""

import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import peft
import torch
import transformers


@functools.cache
def commit() -> str | None:
    """Return the commit of this checkout, with `-dirty` behind it where files were changed; `None` outside of git."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None


def environment() -> dict[str, Any]:
    """Return device, threads, commit and the versions that decide."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
