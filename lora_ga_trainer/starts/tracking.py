"""A start, made known: the log, the trackers that a Trainer reports to, and a file in its output folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .report import GradientReport


if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

REPORT_NAME = "lora_ga_report.json"
PICTURE_NAME = "train/lora_ga/energy"  # beside the metrics, which the Trainer's callbacks log under `train/`


def publish(trainer: Trainer, report: GradientReport) -> None:
    """
    Log what a start did, send its figures and picture to the trackers and write `lora_ga_report.json`.

    A report that can't be written is a warning: training goes on.
    """
    started = report.metrics()["lora_ga/layers_initialised"]
    logger.log(logging.INFO if started else logging.WARNING, report.summary())
    # Not trainer.log: a class that overrides it flushes running figures of its own there (TRL's do).
    Trainer.log(trainer, report.metrics())
    send_picture(trainer, report)
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report.to_json(folder / REPORT_NAME)
    except OSError as error:
        logger.warning("%s was not written (%s). Training goes on.", folder / REPORT_NAME, error)


def send_picture(trainer: Trainer, report: GradientReport) -> None:
    """
    Hand the picture of a start to those of the trainer's trackers that take one: TensorBoard, wandb and trackio.

    Which trackers there are is what `TrainingArguments.report_to` and the callbacks say; no other one is imported. A
    tracker that fails, or a matplotlib that is not installed, is a warning in the log and no more.

    Args:
        trainer: a trainer in training that has logged, so that its trackers are set up; only the first process sends.
        report: what to draw.
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
        logger.warning("The trackers got the metrics of the start and no picture of it: %s", error)
        return
    for callback, send in ready:
        try:
            send(callback, picture, trainer.state.global_step)
        except Exception as error:  # whatever a library raises on a full disk or a lost connection
            logger.warning("%s did not take the picture (%r). Training goes on.", type(callback).__name__, error)


def _to_tensorboard(callback: Any, picture: np.ndarray, step: int) -> None:
    callback.tb_writer.add_image(PICTURE_NAME, picture, step, dataformats="HWC")


def _to_wandb(callback: Any, picture: np.ndarray, step: int) -> None:
    import wandb

    wandb.log({PICTURE_NAME: wandb.Image(picture), "train/global_step": step})


def _to_trackio(callback: Any, picture: np.ndarray, step: int) -> None:
    import trackio

    trackio.log({PICTURE_NAME: trackio.Image(picture), "train/global_step": step})


_SENDERS = ((TensorBoardCallback, _to_tensorboard), (WandbCallback, _to_wandb), (TrackioCallback, _to_trackio))
