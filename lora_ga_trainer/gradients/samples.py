"""Micro-batches outside training: taken whole from the trainer's own dataloader, counted, and their loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..engines.collectives import gather_integers
from .borrow import attribute, copy_containers
from .own_step import has_own_step, loss_of_step


if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import Trainer

IGNORED_LABEL = -100
_SAMPLES = "lora_ga_samples"


@dataclass
class MicroBatch:
    """
    One micro-batch of this process, as the trainer trains on it, never cut.

    A loss may look at its batch as a whole (in-batch negatives, batch norms), so a part of it is another loss.

    Args:
        batch: what the loss takes, prepared by the trainer. A process that has none left runs its last one again,
            which does not count, because sharded models need every process in every pass.
        size: samples that it was made of.
        share: of them that counts: 1, 0, or in between where `even_batches` filled it up with repeats.
        samples: of all processes, repeats left out.
    """

    batch: Any
    size: int
    share: float
    samples: int


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
        # Collators may take entries out of samples, or write into them. The data set may hand out the same ones again.
        batch = self.collate(_own(samples))
        if isinstance(batch, MutableMapping):
            batch[_SAMPLES] = torch.ones(len(samples))  # one entry a sample, so that it is dispatched as others are
        return batch


def micro_batches(trainer: Trainer, num_samples: int, skip: int = 0) -> Iterator[MicroBatch]:
    """
    Yield micro-batches of the training data until at least `num_samples` samples have passed. Collective.

    Samples are counted over all processes, and the end is where a round of micro-batches, one a process, ends. A
    collator may pack samples into one row or make two rows of one; what counts is what it was given. Where the trainer
    makes the samples itself, rows count.

    `even_batches` fills the last round up with samples that the data begins with. They can't be taken out of a loss
    that looks at its batch as a whole, so a micro-batch of which a part is repeats counts for that much less: the mean
    over its items is kept and its weight is that of its own samples. One that is all repeats counts for nothing.

    Args:
        trainer: its `get_train_dataloader()` is called once.
        num_samples: at least this many, if the data has them.
        skip: samples to pass over first, in whole rounds.

    Raises:
        `ValueError`: if the data loader has nothing from the start, for any process or for one of them, or nothing
            beyond what is passed over.
    """
    with attribute(trainer, "data_collator", _CountingCollator(trainer.data_collator)):
        loader = trainer.get_train_dataloader()
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    rank, taken, last = trainer.accelerator.process_index, 0, None
    batches = iter(loader)
    while taken < skip + num_samples:
        batch = next(batches, None)
        last = last if batch is None else _prepare(trainer, batch)
        of_processes = gather_integers(trainer, 0 if batch is None or last is None else last[1], int(last is not None))
        sizes = [size for size, _ in of_processes]
        real = _real_samples(loader, sum(sizes))
        if real == 0 and taken == 0:
            raise ValueError(_no_batch(trainer))
        if real == 0 and taken <= skip:
            raise ValueError(
                f"The train dataloader gave {taken} samples and {skip} of them were to be passed over: there is no "
                "other half. Use more data, or a smaller num_samples."
            )
        if real == 0:
            return
        if last is None or not all(
            has_any for _, has_any in of_processes
        ):  # told to all, so that none waits for the others
            raise ValueError(
                f"The train dataloader gave {sizes} samples to the processes: one has nothing to run. Use fewer "
                "processes, or more data."
            )
        size = sizes[rank]
        own = min(max(real - sum(sizes[:rank]), 0), size)  # repeats stand at the end of the round
        if taken >= skip:
            yield MicroBatch(last[0], size=size, share=own / size if size else 0.0, samples=real)
        taken += real
        _count_step(trainer)


def _no_batch(trainer: Trainer) -> str:
    """Say why a data loader may give nothing."""
    args, dataset = trainer.args, trainer.train_dataset
    rows = f"{len(dataset)} rows" if isinstance(dataset, Sized) else "no length"
    if not args.dataloader_drop_last:
        return f"The train dataloader gave no batch. Its data set has {rows}: check what filters and samples it."
    processes = trainer.accelerator.num_processes
    return (
        f"The train dataloader gave no batch. The data set has {rows}, a round takes {trainer._train_batch_size} on "
        f"each of {processes} processes, and dataloader_drop_last=True leaves out what does not fill one. Lower "
        "per_device_train_batch_size, or set dataloader_drop_last=False."
    )


def _prepare(trainer: Trainer, batch: Any) -> tuple[Any, int]:
    """Let the trainer prepare a micro-batch as it does in a step of training; return its samples' number, too."""
    counted = batch.pop(_SAMPLES, None) if isinstance(batch, MutableMapping) else None
    inputs = trainer._prepare_inputs(batch)
    return inputs, _count_rows(inputs) if counted is None else len(counted)


def _count_rows(inputs: Any) -> int:
    """
    Count the rows of inputs that no collator has counted.

    Raises:
        `ValueError`: if there is nothing in them that has rows.
    """
    rows = _rows(inputs)
    if rows is None:
        raise ValueError(
            f"The batches of the train dataloader ({type(inputs).__name__}) hold no tensor or list to count samples "
            "by. Let the data collator return a dict."
        )
    return rows


def _rows(value: Any) -> int | None:
    """Return the length of the first tensor, or of the first list of samples or words; `None` where there is none."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() > 0 else None
    if isinstance(value, list) and not any(isinstance(entry, Tensor) for entry in value):
        return len(value)
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return next((rows for rows in map(_rows, entries) if rows is not None), None)


def _own(value: Any) -> Any:
    """Copy containers, tensors and arrays inside each other, not what else they hold."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.clone() if isinstance(value, Tensor) else value.copy()
    if type(value) in (dict, list, tuple):
        items = map(_own, value.values() if isinstance(value, dict) else value)
        return dict(zip(value, items, strict=True)) if isinstance(value, dict) else type(value)(items)
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key, item in value.items():
            new[key] = _own(item)
        return new
    return value


def _count_step(trainer: Trainer) -> None:
    """Count a micro-batch as TRL's trainers do that write their samples themselves, many micro-batches at once."""
    if type(vars(trainer).get("_step")) is int:
        trainer._step += 1


def _real_samples(loader: DataLoader, seen: int) -> int:
    """Return how many of the round's samples are not repeats: `remainder` is set for the last round only."""
    at_end = getattr(loader, "end_of_dataloader", False)
    remainder = getattr(loader, "remainder", -1)
    return min(seen, remainder) if at_end and remainder > 0 else seen


def count_items(trainer: Trainer, micro_batch: MicroBatch) -> float:
    """
    Count what the loss of a micro-batch is a mean over: labels that are not ignored, or samples where there are no
    labels.

    Counts as the Trainer does: causal losses shift their labels, so the first of each row is no target.
    """
    batch = micro_batch.batch if isinstance(micro_batch.batch, Mapping) else {}
    labels = batch.get("shift_labels")
    if labels is None and "labels" in batch:
        labels = batch["labels"]
        if isinstance(labels, Tensor) and getattr(trainer, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
    if isinstance(labels, Tensor):
        return float(labels.ne(IGNORED_LABEL).sum().item())
    return float(micro_batch.size)


def count_tokens(batch: Any) -> int:
    """Count the input tokens of a batch, padding left out where a mask tells it; 0 where inputs are not tokens."""
    if not isinstance(batch, Mapping):
        return 0
    for names in (("attention_mask",), ("prompt_mask", "completion_mask")):  # TRL keeps what a model wrote apart
        if all(isinstance(batch.get(name), Tensor) for name in names):
            return sum(int(batch[name].ne(0).sum().item()) for name in names)
    tokens = batch.get("input_ids")
    return tokens.numel() if isinstance(tokens, Tensor) else 0


def mean_loss(trainer: Trainer, model: nn.Module, batch: Any, items: float) -> Tensor:  # ()
    """
    Compute the trainer's own loss of one prepared micro-batch, a mean over its `items`, with the graph attached.

    Where the trainer has a `training_step` of its own that does not call the one of the class above it, it is the loss
    of the first backward pass there.

    Raises:
        `ValueError`: if the batch gives no loss, because it has no labels.
    """
    divisor = torch.tensor(max(items, 1.0), device=trainer.args.device)
    own = has_own_step(trainer)
    loss = (loss_of_step if own else _computed_loss)(trainer, model, _lent(batch), divisor)
    return loss.mean()


def _computed_loss(trainer: Trainer, model: nn.Module, batch: Any, divisor: Tensor) -> Tensor:
    with trainer.compute_loss_context_manager():
        try:
            return trainer.compute_loss(model, batch, num_items_in_batch=divisor)
        except ValueError as error:
            if "did not return a loss" not in str(error) or not isinstance(batch, Mapping) or "labels" in batch:
                raise
            raise ValueError(
                f"The train dataset has no labels: its batches hold {sorted(batch)} and the model returned no loss. "
                "Add a `labels` column, use a data collator that makes one, or override `compute_loss`."
            ) from error


def _lent(batch: Any) -> Any:
    """Return a copy that a loss may take entries out of, also of dicts inside it; the tensors are the same."""
    if not isinstance(batch, MutableMapping):
        return copy_containers(batch)
    lent = copy.copy(batch)
    for key, value in batch.items():
        lent[key] = copy_containers(value)
    return lent
