"""Training samples outside training: taken from the trainer's own dataloader, cut, counted, and their loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .borrow import preserved_rng
from .collectives import gather_integers


if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import Trainer

IGNORED_LABEL = -100


@dataclass
class Piece:
    """
    Part of one micro-batch of this process.

    Args:
        batch: the inputs, cut to the samples of this piece. A process that has none left runs one sample that does not
            count, because sharded models need every process in every pass.
        mine: samples of this process in the piece.
        samples: samples of all processes in the piece.
        part: which of the parts given by the bounds the piece belongs to.
    """

    batch: dict[str, Any]
    mine: int
    samples: int
    part: int


def sample_pieces(trainer: Trainer, bounds: Sequence[int]) -> Iterator[Piece]:
    """
    Yield the first `bounds[-1]` samples of the training data, split into parts at the `bounds`.

    Samples are numbered over all processes in the order of training: those of rank 0 of the first round of
    micro-batches, then of rank 1, and so on. A micro-batch that a bound falls into is cut there, so the parts do not
    depend on the micro-batch size or the number of processes. Samples that `even_batches` repeats to fill the last
    round do not count. A micro-batch that can't be cut (its tensors do not share a batch dimension) counts whole, in
    the part of its first sample.

    Args:
        trainer: its `get_train_dataloader()` is called once.
        bounds: increasing sample numbers at which the parts end.
    """
    loader = trainer.get_train_dataloader()
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    rank, taken, last = trainer.accelerator.process_index, 0, None
    batches = iter(loader)
    while taken < bounds[-1]:
        batch = next(batches, None)
        size = 0 if batch is None else find_batch_size(batch)
        last = batch if batch is not None else last
        everyone = gather_integers(trainer, size, int(batch is None or is_cuttable(batch, size)))
        sizes, cuttable = [row[0] for row in everyone], all(row[1] for row in everyone)
        real = _real_samples(loader, sum(sizes))
        if real == 0 or last is None:
            return
        first_of_mine = taken + sum(sizes[:rank])
        ends = [min(bound, taken + real) for bound in bounds] if cuttable else [taken + real] * len(bounds)
        start = taken
        for part, end in enumerate(ends):
            if end <= start or (not cuttable and start >= bounds[part]):
                continue
            low = min(max(start - first_of_mine, 0), size)
            high = min(max(end - first_of_mine, 0), size)
            piece = take(last, low, high, size) if high > low else take(last, 0, 1, find_batch_size(last))
            yield Piece(piece, mine=high - low, samples=end - start, part=part)
            start = end
        taken += real


def _real_samples(loader: DataLoader, seen: int) -> int:
    """Return how many of the round's samples are not repeats: `remainder` is set for the last round only."""
    at_end = getattr(loader, "end_of_dataloader", False)
    remainder = getattr(loader, "remainder", -1)
    return min(seen, remainder) if at_end and remainder > 0 else seen


def is_cuttable(batch: Mapping[str, Any], size: int) -> bool:
    """Tell whether every tensor and list of the batch has one entry a sample."""
    lengths = [_length(value) for value in batch.values()]
    return all(length in (None, size) for length in lengths)


def _length(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() > 0 else None
    return len(value) if isinstance(value, (list, tuple)) else None


def take(batch: Mapping[str, Any], low: int, high: int, size: int) -> dict[str, Any]:
    """Return samples `low` to `high` of a batch of `size`; values without a batch dimension are kept."""
    return {
        key: value[low:high] if _length(value) == size and (low, high) != (0, size) else value
        for key, value in batch.items()
    }


def count_items(trainer: Trainer, batch: Mapping[str, Any]) -> float:
    """
    Count what the loss of this batch is a mean over: labels that are not ignored, or samples where there are no
    labels.

    Counts as the Trainer does: causal losses shift their labels, so the first of each row is no target.
    """
    labels = batch.get("shift_labels")
    if labels is None and "labels" in batch:
        labels = batch["labels"]
        if isinstance(labels, Tensor) and getattr(trainer, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
    if isinstance(labels, Tensor):
        return float(labels.ne(IGNORED_LABEL).sum().item())
    return float(find_batch_size(batch))


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Count the input tokens of a batch, padding left out where a mask tells it; 0 where inputs are not tokens."""
    for name in ("attention_mask", "input_ids"):
        value = batch.get(name)
        if isinstance(value, Tensor):
            return int(value.ne(0).sum().item()) if name == "attention_mask" else value.numel()
    return 0


def mean_loss(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any], items: float) -> Tensor:  # ()
    """
    Compute the trainer's own loss of one micro-batch, a mean over its `items`, with the graph attached.

    Raises:
        `ValueError`: if the batch gives no loss, because it has no labels.
    """
    inputs = trainer._prepare_inputs(dict(batch))
    divisor = torch.tensor(max(items, 1.0), device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        try:
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=divisor)
        except ValueError as error:
            if "labels" in batch:
                raise
            raise ValueError(
                f"The train dataset has no labels: its batches hold {sorted(batch)} and the model returned no loss. "
                "Add a `labels` column, use a data collator that makes one, or override `compute_loss`."
            ) from error
    return loss.mean()


def require_rewindable(trainer: Trainer) -> None:
    """
    Refuse a stream that the probe would use up.

    A data set without a length is started twice and must give the same first batch both times.

    Raises:
        `ValueError`: advising `probe_dataset`.
    """
    if not isinstance(trainer.train_dataset, IterableDataset):
        return
    first, second = _first_batch(trainer), _first_batch(trainer)
    if first is not None and (second is None or not _equal(first, second)):
        raise ValueError(
            f"The train dataset is a stream ({type(trainer.train_dataset).__name__}) that does not start over: a "
            "second pass gave another first batch, so a probe would take samples away from training. Pass a separate "
            "data set as `probe_dataset=`, or make the stream's __iter__ start from the beginning."
        )


def _first_batch(trainer: Trainer) -> Mapping[str, Any] | None:
    with preserved_rng():
        return next(iter(trainer.get_train_dataloader()), None)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b)
