"""Training samples outside training: taken from the trainer's own dataloader, cut, counted, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..engines.collectives import gather_integers
from ..engines.devices import preserved_rng
from .borrow import attribute, switch_off_grad


if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import Trainer

IGNORED_LABEL = -100
_SAMPLES = "lora_ga_samples"


@dataclass
class Piece:
    """
    Part of one micro-batch of this process.

    Args:
        batch: what the loss takes, prepared by the trainer, cut to the samples of this piece. A process that has none
            left runs a sample that does not count, because sharded models need every process in every pass.
        mine: samples of this process in the piece.
        samples: samples of all processes in the piece.
        part: which of the parts given by the bounds the piece belongs to.
    """

    batch: dict[str, Any]
    mine: int
    samples: int
    part: int


@dataclass
class _MicroBatch:
    """A prepared micro-batch, how many samples it was made of, and whether it can be cut between them."""

    batch: Mapping[str, Any]
    size: int
    cuttable: bool

    def take(self, low: int, high: int) -> dict[str, Any]:
        """Return samples `low` to `high`, or the first one if there are none of them; whole if it can't be cut."""
        if not self.cuttable or (low, high) == (0, self.size):
            return dict(self.batch)
        return take(self.batch, *((low, high) if high > low else (0, 1)), self.size)


class _CountingCollator:
    """Wraps a collator so that each batch records its sample count, which may differ from its row count."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __getattr__(self, name: str) -> Any:
        """Show what the collator itself has to a `get_train_dataloader` that looks for it."""
        if name == "collate":  # asked for while a worker unpickles this
            raise AttributeError(name)
        return getattr(self.collate, name)

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        if isinstance(batch, MutableMapping):
            batch[_SAMPLES] = torch.ones(len(samples))  # one entry a sample, so that it is dispatched as others are
        return batch


def sample_pieces(trainer: Trainer, bounds: Sequence[int]) -> Iterator[Piece]:
    """
    Yield the first `bounds[-1]` samples of the training data, split into parts at the `bounds`.

    Samples are numbered over all processes in the order of training: those of rank 0 of the first round of
    micro-batches, then of rank 1, and so on. A micro-batch that a bound falls into is cut there, so the parts do not
    depend on the micro-batch size or the number of processes. Samples that `even_batches` repeats to fill the last
    round do not count. A micro-batch that can't be cut counts whole, in the part of its first sample: its tensors do
    not share a batch dimension, or its rows are not its samples (packed into one row, two rows a pair, or made by the
    trainer itself from what the data loader gave).

    Args:
        trainer: its `get_train_dataloader()` is called once.
        bounds: increasing sample numbers at which the parts end.
    """
    with attribute(trainer, "data_collator", _CountingCollator(trainer.data_collator)):
        loader = trainer.get_train_dataloader()
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    rank, taken, last = trainer.accelerator.process_index, 0, None
    batches = iter(loader)
    while taken < bounds[-1]:
        batch = next(batches, None)
        last = last if batch is None else _prepare(trainer, batch)
        size = 0 if batch is None or last is None else last.size
        everyone = gather_integers(trainer, size, int(batch is None or last is None or last.cuttable))
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
            yield Piece(last.take(low, high), mine=high - low, samples=end - start, part=part)
            start = end
        taken += real
        _count_step(trainer)


def _prepare(trainer: Trainer, batch: Any) -> _MicroBatch:
    """Let the trainer prepare a micro-batch as it does in a step of training."""
    samples = batch.pop(_SAMPLES, None) if isinstance(batch, MutableMapping) else None
    inputs = trainer._prepare_inputs(batch)
    rows = find_batch_size(inputs)
    if not isinstance(batch, Mapping):
        return _MicroBatch(inputs, rows, cuttable=False)
    size = rows if samples is None else len(samples)
    return _MicroBatch(inputs, size, cuttable=size == rows and is_cuttable(inputs, size))


def _count_step(trainer: Trainer) -> None:
    """Count a micro-batch as TRL's trainers do that write their samples themselves, many micro-batches at once."""
    if type(vars(trainer).get("_step")) is int:
        trainer._step += 1


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


def count_items(trainer: Trainer, piece: Piece) -> float:
    """
    Count what the loss of this piece is a mean over: labels that are not ignored, or samples where there are no
    labels.

    Counts as the Trainer does: causal losses shift their labels, so the first of each row is no target.
    """
    labels = piece.batch.get("shift_labels")
    if labels is None and "labels" in piece.batch:
        labels = piece.batch["labels"]
        if isinstance(labels, Tensor) and getattr(trainer, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
    if isinstance(labels, Tensor):
        return float(labels.ne(IGNORED_LABEL).sum().item())
    return float(piece.mine)


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Count the input tokens of a batch, padding left out where a mask tells it; 0 where inputs are not tokens."""
    for names in (("attention_mask",), ("prompt_mask", "completion_mask")):  # TRL keeps what a model wrote apart
        if all(isinstance(batch.get(name), Tensor) for name in names):
            return sum(int(batch[name].ne(0).sum().item()) for name in names)
    tokens = batch.get("input_ids")
    return tokens.numel() if isinstance(tokens, Tensor) else 0


def mean_loss(trainer: Trainer, model: nn.Module, batch: Mapping[str, Any], items: float) -> Tensor:  # ()
    """
    Compute the trainer's own loss of one prepared micro-batch, a mean over its `items`, with the graph attached.

    The model is borrowed: no parameter requires grad when its backward pass runs checkpointed layers again either.

    Raises:
        `ValueError`: if the batch gives no loss, because it has no labels.
    """
    divisor = torch.tensor(max(items, 1.0), device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        try:
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=divisor)
        except ValueError as error:
            if "labels" in batch or "did not return a loss" not in str(error):
                raise
            raise ValueError(
                f"The train dataset has no labels: its batches hold {sorted(batch)} and the model returned no loss. "
                "Add a `labels` column, use a data collator that makes one, or override `compute_loss`."
            ) from error
    switch_off_grad(model)
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
