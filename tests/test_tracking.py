"""Trackers get the figures of a start, and its picture where they take one, as the libraries themselves keep them."""

from __future__ import annotations

import io
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
import tiny
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.starts.tracking import PICTURE_NAME, send_picture


# 6 samples are asked for; micro-batches of 4 are not cut.
FIGURES = {"samples": 8, "layers_initialised": 4, "layers_plain": 0}


def make(folder: Path, *report_to: str, **changes: Any) -> LoRAGATrainer:
    callbacks = changes.pop("callbacks", None)
    return LoRAGATrainer(
        tiny.with_lora(tiny.llama(), target_modules=["q_proj", "down_proj"]),
        tiny.arguments(folder, max_steps=2, report_to=list(report_to), **changes),
        train_dataset=tiny.causal_rows(8),
        lora_ga_config=LoRAGAConfig(num_samples=6),
        callbacks=callbacks,
    )


def pixels(source: Any) -> np.ndarray:
    with Image.open(source) as image:
        return np.asarray(image.convert("RGB"))


def test_tensorboard_files_hold_the_figures_and_the_picture(tmp_path: Path) -> None:
    optional.require("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(tmp_path, "tensorboard")
    trainer.train()
    (events,) = (tmp_path / "runs").rglob("events*")
    read = EventAccumulator(str(events))
    read.Reload()
    for name, value in FIGURES.items():
        assert [(event.step, event.value) for event in read.Scalars(f"train/lora_ga/{name}")] == [(0, value)]
    assert len(read.Scalars("train/loss")) == 2
    (picture,) = read.Images(PICTURE_NAME)
    assert picture.step == 0
    shown = pixels(io.BytesIO(picture.encoded_image_string))
    assert np.array_equal(shown, trainer.lora_ga_report.picture())
    assert shown.std() > 10, "a blank picture"


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    library = optional.require("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield library
    library.teardown()  # ends the run and the process that writes it


def test_wandb_offline_keeps_the_figures_and_the_picture(tmp_path: Path, wandb: Any) -> None:
    trainer = make(tmp_path / "run", "wandb")
    trainer.train()
    summary = dict(wandb.run.summary)
    folder = Path(wandb.run.dir)
    wandb.finish()
    for name, value in FIGURES.items():
        assert summary[f"train/lora_ga/{name}"] == value
    shown = summary[PICTURE_NAME]
    assert shown["_type"] == "image-file"
    assert np.array_equal(pixels(folder / shown["path"]), trainer.lora_ga_report.picture())
    (record,) = folder.parent.glob("run-*.wandb")
    assert b"train/lora_ga/samples" in record.read_bytes()


def test_trackio_keeps_the_figures_and_the_picture(tmp_path: Path) -> None:
    optional.require("trackio")
    project = tmp_path.name.replace("_", "-")
    trainer = make(tmp_path, "trackio", project=project)
    trainer.train()
    folder = Path(os.environ["TRACKIO_DIR"])
    with sqlite3.connect(folder / f"{project}.db") as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by step")]
    (figures,) = (row for row in rows if "train/lora_ga/samples" in row)
    assert {name: figures[f"train/lora_ga/{name}"] for name in FIGURES} == FIGURES
    (picture,) = (row[PICTURE_NAME] for row in rows if PICTURE_NAME in row)
    shown = pixels(folder / "media" / picture["file_path"])
    assert np.array_equal(shown, trainer.lora_ga_report.picture())


class FigureReader(TrainerCallback):
    """A tracker that takes no pictures."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logged.update(logs)


def test_without_a_tracker_that_takes_pictures_none_is_drawn_and_no_library_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("wandb", "trackio", "matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    reader = FigureReader()
    with caplog.at_level(logging.WARNING, logger="lora_ga_trainer"):
        make(tmp_path, callbacks=[reader]).train()
    assert {name: reader.logged[f"lora_ga/{name}"] for name in FIGURES} == FIGURES
    assert caplog.text == ""


class Writer:
    """Stands in for TensorBoard's writer."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.scalars: list[str] = []
        self.pictures: list[str] = []

    def add_image(self, name: str, picture: np.ndarray, step: int, dataformats: str) -> None:
        if self.fails:
            raise OSError("disk full")
        self.pictures.append(name)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append(name)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def test_a_tracker_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    optional.require("tensorboard")
    broken, sound = Writer(fails=True), Writer()
    trainer = make(tmp_path, callbacks=[TensorBoardCallback(broken), TensorBoardCallback(sound)])
    with caplog.at_level(logging.WARNING, logger="lora_ga_trainer"):
        trainer.train()
    assert trainer.state.global_step == 2
    (record,) = (record for record in caplog.records if record.name == "lora_ga_trainer.starts.tracking")
    assert "TensorBoardCallback did not take the picture (OSError('disk full')). Training goes on." in record.message
    assert sound.pictures == [PICTURE_NAME], "one that fails does not keep it from the others"
    assert "train/lora_ga/samples" in broken.scalars


def test_without_matplotlib_trackers_get_the_figures_and_the_log_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optional.require("tensorboard")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    writer = Writer()
    with caplog.at_level(logging.WARNING, logger="lora_ga_trainer"):
        make(tmp_path, callbacks=[TensorBoardCallback(writer)]).train()
    assert (writer.pictures, "train/lora_ga/samples" in writer.scalars) == ([], True)
    (record,) = caplog.records
    assert "no picture of them: GradientReport.plot draws with matplotlib: pip install matplotlib" in record.message


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_sends(first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optional.require("tensorboard")
    trainer = make(tmp_path)
    trainer.train()
    writer = Writer()
    trainer.add_callback(TensorBoardCallback(writer))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: first)
    send_picture(trainer, trainer.lora_ga_report)
    assert writer.pictures == ([PICTURE_NAME] if first else [])
