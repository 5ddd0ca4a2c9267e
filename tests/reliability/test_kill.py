"""A run that is killed by `kill -9` twenty times, in every phase, ends with the weights of the undisturbed run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


TESTS = Path(__file__).parents[1]
KILLS, STEPS, SAVED = 20, 10, 2
SEED = 0  # of the moments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    place = tmp_path_factory.mktemp("kill")
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "reliability" / "kill_run.py"), str(place), str(SEED)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return place


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def weights(folder: Path, run: str) -> dict[str, Tensor]:
    return torch.load(folder / run / "weights.pt", weights_only=True)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(value, right[name]) for name, value in left.items())


def last_state(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())


def test_every_kill_happened_and_every_phase_was_met(report: dict[str, Any]) -> None:
    kills = report["kills"]
    assert [kill["status"] for kill in kills] == [-signal.SIGKILL] * KILLS
    exact = [kill for kill in kills if kill["asked"]["delay"] is None]
    for kill in exact:
        place = [kill[key] for key in ("phase", "window", "event")]
        assert place == [kill["asked"][key] for key in ("phase", "window", "event")]
    met = Counter(kill["phase"] for kill in exact)
    assert set(met) == {"probe", "factors", "train", "checkpoint"}, met
    asked = Counter(kill["asked"]["phase"] for kill in kills)
    assert asked == {"probe": 4, "factors": 3, "train": 6, "checkpoint": 7}
    assert 0 < len(exact) < KILLS, "some of the kills come from outside"
    # The start is probed in every attempt before the first checkpoint, so a kill there costs nothing but time.
    assert all(kill["resumed_from"] == 0 for kill in kills if kill["phase"] in ("probe", "factors"))


def test_each_attempt_resumed_from_the_newest_checkpoint_that_can_be_loaded(report: dict[str, Any]) -> None:
    for kill in report["kills"]:
        assert kill["resumed_from"] == kill["complete"], kill["log"][-2000:]
    assert report["end"] == 0
    assert report["end_resumed_from"] == STEPS - SAVED


def test_a_checkpoint_that_was_cut_short_is_named_in_a_warning(report: dict[str, Any]) -> None:
    cut = 0
    for kill in report["kills"]:
        skipped = [int(step) for step in re.findall(r"checkpoint-(\d+) was cut short or damaged", kill["log"])]
        assert skipped == sorted((step for step in kill["found"] if step > kill["complete"]), reverse=True)
        cut += bool(skipped)
    assert cut > 0


def test_the_weights_are_bitwise_those_of_the_undisturbed_run(report: dict[str, Any], folder: Path) -> None:
    assert same(weights(folder, "whole"), weights(folder, "killed"))
    whole, killed = (last_state(folder, run) for run in ("whole", "killed"))
    losses = [log["loss"] for log in whole["log_history"] if "loss" in log]
    assert len(losses) == STEPS
    assert [log["loss"] for log in killed["log_history"] if "loss" in log] == losses
    assert sum("lora_ga/samples" in log for log in killed["log_history"]) == 1
    # A control: two steps on from the same checkpoint with random numbers of another step, other weights.
    assert report["control"] == 0
    assert not same(weights(folder, "whole"), weights(folder, "other"))
