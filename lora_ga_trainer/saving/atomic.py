"""Atomic writes: a file is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Lend a path beside `path` to write to, and move what was written there into its place.

    If anything inside raises, `path` stays what it was and the half-written file is removed.
    """
    target = Path(path)
    # In the same folder, hence on the same file system, where a move replaces the old file in one step.
    partial = target.with_name(target.name + ".partial")
    try:
        yield partial
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
