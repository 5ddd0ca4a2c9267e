"""Failure of one process, told to all: none is left waiting for it in the next collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..engines.collectives import gather_integers
from .estimate import NonFiniteGradient


if TYPE_CHECKING:
    from transformers import Trainer

UNCHANGED = "No weight was changed."
_FINE, _FAILED, _NON_FINITE = 0, 1, 2


@contextmanager
def failing_together(trainer: Trainer, number: int) -> Iterator[None]:
    """
    Let every process fail if one does inside. Collective at the end.

    Args:
        trainer: whose processes these are.
        number: of the probe's batch, for the message of the processes that did not fail.

    Raises:
        What was raised inside on the process where it was, on the others `NonFiniteGradient` or `RuntimeError`.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = _with_advice(raised)
    code = _FINE if error is None else _NON_FINITE if isinstance(error, NonFiniteGradient) else _FAILED
    codes = [row[0] for row in gather_integers(trainer, code)]
    if error is not None:
        raise error
    if any(codes):
        # The kind has to be the same everywhere: a non-finite gradient is tried again with a smaller loss scale.
        kind = NonFiniteGradient if max(codes) == _NON_FINITE else RuntimeError
        failed = [rank for rank, code in enumerate(codes) if code]
        raise kind(f"Probe batch {number} failed on process {failed[0]}, whose error says why. {UNCHANGED}")


def _with_advice(error: Exception) -> Exception:
    """Return the error; where memory ran out, one of its type that also says what to change."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in text:
        return error
    # The first sentence is the allocator's: `auto_find_batch_size` looks for its words.
    advice = type(error)(
        f"{text}\nThis was in the probe of LoRA-GA, which holds its sketches, and what one micro-batch of training "
        f"holds. {UNCHANGED} Lower per_device_train_batch_size (and raise "
        "gradient_accumulation_steps), turn on gradient_checkpointing, or lower LoRAGAConfig.sketch_size; fewer "
        "num_samples do not help."
    )
    advice.__cause__ = error
    return advice
