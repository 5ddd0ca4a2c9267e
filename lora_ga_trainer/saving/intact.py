"""
Find checkpoints that were cut short, and choose the newest whole one.

`trainer_state.json` is the last file that the Trainer writes, but a machine that lost its power may have kept a later
file and lost a part of an earlier one, so every file that a resume reads is looked into. Only the ends of large files
are read (the header of a safetensors file, the directory of a torch file): a file of the right length whose middle
was lost is not recognised.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError, safe_open

from ..adapters.host import CONFIG_FILE, WEIGHTS_FILE, find_host, require_adapter
from .record import record_of_model, require_record


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")


def newest_complete_checkpoint(trainer: Trainer) -> str | None:
    """
    Choose the checkpoint of `output_dir` to resume from, the same on every process. Collective.

    A newer one that was cut short is skipped with a warning that names it and what is wrong with it. The first process
    lists the folders; one counts as complete if it is for every process, each of which looks at what it would load.

    Args:
        trainer: whose `args.output_dir` is looked through.

    Returns:
        Its folder; `None` where no checkpoint is complete.

    This trains from the beginning where no checkpoint is complete:

        trainer.train(resume_from_checkpoint=newest_complete_checkpoint(trainer))
    """
    for folder in gather_object([_checkpoints(trainer.args.output_dir)])[0]:
        problem = _problem(trainer, folder)
        if problem is None:
            return folder
        if trainer.is_world_process_zero():
            logger.warning("%s was cut short or damaged and is skipped: %s.", folder, problem)
    return None


def require_complete(trainer: Trainer, folder: str | os.PathLike[str]) -> None:
    """
    Refuse a checkpoint that was cut short. Collective; a folder that no process has is left to the Trainer.

    Raises:
        `ValueError`: on every process, naming the folder and what is missing or damaged.
    """
    if not any(gather_object([Path(folder).is_dir()])):
        return
    problem = _problem(trainer, folder)
    if problem is not None:
        raise ValueError(
            f"{folder} can't be resumed: {problem}. With resume_from_checkpoint=True the newest complete checkpoint "
            "of output_dir is taken."
        )


def _checkpoints(output_dir: str) -> list[str]:
    """List the folders of checkpoints, newest first, that `get_last_checkpoint` of transformers would know."""
    if not Path(output_dir).is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in Path(output_dir).iterdir() if path.is_dir()]
    steps = [(int(name[1]), path) for name, path in found if name]
    return [str(path) for _, path in sorted(steps, reverse=True)]


def _problem(trainer: Trainer, folder: str | os.PathLike[str]) -> str | None:
    """Say what any process finds wrong with a checkpoint; the same sentence on all of them."""
    faults = gather_object(["; ".join(_faults(trainer, Path(folder)))])
    if trainer.accelerator.num_processes > 1:
        faults = [fault and f"process {rank}: {fault}" for rank, fault in enumerate(faults)]
    return "; ".join(fault for fault in faults if fault) or None


def _faults(trainer: Trainer, folder: Path) -> Iterator[str]:
    """Yield what is missing or damaged of all that this process would load."""
    if not folder.is_dir():
        yield "the folder is not there"
        return
    paths = [folder / "trainer_state.json", *_weights(trainer, folder)]
    if not trainer.args.save_only_model:
        paths += [*_random_numbers(trainer, folder), *_optimizer(trainer, folder)]
    for path in paths:
        fault = _fault(path)
        if fault is not None:
            yield f"{path.relative_to(folder)} {fault}"
    model = trainer.accelerator.unwrap_model(trainer.model)
    expected = record_of_model(model)
    if expected is not None:
        try:
            require_record(require_adapter(model).place(folder), expected)
        except ValueError as error:
            yield str(error).rstrip(".")


def _weights(trainer: Trainer, folder: Path) -> list[Path]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    host, states = find_host(model), sorted(folder.glob("model*.safetensors"))
    if host is None or (states and record_of_model(model) is None):
        return states or [folder / "model.safetensors"]
    place = host.place(folder)
    weights = place / WEIGHTS_FILE
    if trainer.accelerator.distributed_type == DistributedType.FSDP and not weights.exists():
        return [place / CONFIG_FILE]  # sharded checkpoints keep the weights in a layout of their own
    # A model that the Trainer can only save whole has its adapter's files beside its state: see `reload`.
    return [place / CONFIG_FILE, weights, *states]


def _random_numbers(trainer: Trainer, folder: Path) -> list[Path]:
    """Name this process's file; none where the checkpoint was written by another number of processes."""
    args = trainer.args
    mine = folder / ("rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth")
    if mine.exists() or not any(folder.glob("rng_state*.pth")):
        return [mine]
    logger.warning(
        "%s has no %s: it was written by another number of processes. Process %d goes on with other random numbers.",
        folder,
        mine.name,
        args.process_index,
    )
    return []


def _optimizer(trainer: Trainer, folder: Path) -> list[Path]:
    engine = trainer.accelerator.distributed_type
    # FSDP keeps the optimizer in a layout of accelerate's own, which is not looked into.
    needed = () if engine in (DistributedType.DEEPSPEED, DistributedType.FSDP) else ("optimizer.pt", "scheduler.pt")
    paths = [folder / name for name in ("optimizer.pt", "scheduler.pt", "scaler.pt")]
    paths = [path for path in paths if path.name in needed or path.exists()]
    return paths + (_deepspeed(folder) if engine == DistributedType.DEEPSPEED else [])


def _deepspeed(folder: Path) -> list[Path]:
    latest = folder / "latest"  # written when every process is done: the name of the folder with their parts
    if _fault(latest) is not None:
        return [latest]
    parts = folder / latest.read_text(encoding="utf-8").strip()
    return sorted(parts.glob("*.pt")) or [parts / "mp_rank_00_model_states.pt"]


def _fault(path: Path) -> str | None:
    """Say what is wrong with one file."""
    if not path.is_file():
        return "is missing"
    try:
        _READ[path.suffix](path)
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile) as error:
        return f"is damaged ({error})"
    return None


def _read_json(path: Path) -> None:
    if not isinstance(json.loads(path.read_bytes()), dict):
        raise ValueError("not a JSON object")


def _read_safetensors(path: Path) -> None:
    """Read the header, which must account for every byte of the file."""
    with safe_open(path, framework="pt"):
        pass


def _read_torch(path: Path) -> None:
    """Read the directory, which ends the file, without unpickling anything."""
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise ValueError("not written by torch.save")


def _read_text(path: Path) -> None:
    if not path.read_text(encoding="utf-8").strip():
        raise ValueError("empty")


_READ = {
    ".json": _read_json,
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    "": _read_text,
}
