"""A start, made known: the log, the trackers that a Trainer reports to, and a file in its output folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..saving.drawn_report import DrawnReport


if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

REPORT_NAME = "lora_ga_report.json"
PICTURE_NAME = "train/lora_ga/energy"  # beside the metrics, which the Trainer's callbacks log under `train/`


def publish(
    trainer: Trainer,
    report: DrawnReport,
    name: str = REPORT_NAME,
    picture: str = PICTURE_NAME,
    level: int = logging.INFO,
) -> None:
    """
    Log what was done, send its figures and picture to the trackers and write it to a file.

    A report that can't be written is a warning: training goes on.

    Args:
        trainer: in training.
        report: of the start, or of another thing that is done when training begins.
        name: of the file in the output folder.
        picture: its name at the trackers.
        level: of the line in the log.
    """
    logger.log(level, report.summary())
    # Not trainer.log: a class that overrides it flushes running figures of its own there (TRL's do).
    Trainer.log(trainer, report.metrics())
    send_picture(trainer, report, picture)
    write_report(trainer, report, name)


def write_report(trainer: Trainer, report: DrawnReport, name: str) -> None:
    """Write a report to a file in the output folder; one that can't be written is a warning."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report.to_json(folder / name)
    except OSError as error:
        logger.warning("%s was not written (%s). Training goes on.", folder / name, error)


def send_picture(trainer: Trainer, report: DrawnReport, name: str = PICTURE_NAME) -> None:
    """
    Hand the picture of a report to those of the trainer's trackers that take one: TensorBoard, wandb and trackio.

    Which trackers there are is what `TrainingArguments.report_to` and the callbacks say; no other one is imported. A
    tracker that fails, or a matplotlib that is not installed, is a warning in the log and no more.

    Args:
        trainer: a trainer in training that has logged, so that its trackers are set up; only the first process sends.
        report: what to draw.
        name: of the picture.
    """
    if not trainer.is_world_process_zero():
        return
    callbacks = trainer.callback_handler.callbacks
    ready = [(callback, send) for callback in callbacks for kind, send in _SENDERS if isinstance(callback, kind)]
    if not ready:
        return
    try:
        picture = report.picture()
    except ImportError as error:
        logger.warning("The trackers got the metrics and no picture of them: %s", error)
        return
    for callback, send in ready:
        try:
            send(callback, name, picture, trainer.state.global_step)
        except Exception as error:  # whatever a library raises on a full disk or a lost connection
            logger.warning("%s did not take the picture (%r). Training goes on.", type(callback).__name__, error)


def _to_tensorboard(callback: Any, name: str, picture: np.ndarray, step: int) -> None:
    callback.tb_writer.add_image(name, picture, step, dataformats="HWC")


def _to_wandb(callback: Any, name: str, picture: np.ndarray, step: int) -> None:
    import wandb

    wandb.log({name: wandb.Image(picture), "train/global_step": step})


def _to_trackio(callback: Any, name: str, picture: np.ndarray, step: int) -> None:
    import trackio

    trackio.log({name: trackio.Image(picture), "train/global_step": step})


_SENDERS = ((TensorBoardCallback, _to_tensorboard), (WandbCallback, _to_wandb), (TrackioCallback, _to_trackio))
