"""
One run that is killed twenty times, beside the same run undisturbed: `python kill_run.py FOLDER SEED`.

Libraries are imported once; every attempt is a fork, a process of its own that trains until SIGKILL ends it. A moment
is the n-th event of a phase: a module's forward pass, a factor about to be written, a substep or a step of the
optimizer, a file about to be written or half written. Either the process kills itself there, or it is killed from
outside some milliseconds later, wherever it is by then.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft.config
import peft.peft_model
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState

import lora_ga_trainer.starts.start
from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer


STEPS, SAVED = 10, 2
WINDOWS = STEPS // SAVED  # window w: the steps that lead to checkpoint w, and its writing; 0 is the start
PHASES = ("start", "probe", "factors", "train", "checkpoint")


@dataclass(frozen=True)
class Moment:
    """
    When a process is killed.

    Args:
        phase, window, event: the n-th event of a phase in a window.
        fraction: what is left of a file that is cut at this event.
        delay: seconds after the event, from outside; `None`: the process kills itself at the event.
    """

    phase: str
    window: int
    event: int
    fraction: float
    delay: float | None


class Progress:
    """What a process has reached, in memory that outlives it."""

    _FORMAT = struct.Struct("5i")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._FORMAT.size)
        self.values = [0, 0, -1, 0, -1]  # phase, window, event, whether the moment has come, step resumed from

    @property
    def values(self) -> list[int]:
        return list(self._FORMAT.unpack(self._memory[:]))

    @values.setter
    def values(self, values: list[int]) -> None:
        self._memory[:] = self._FORMAT.pack(*values)


class Watch(TrainerCallback):
    """Counts the events of one process, and ends or holds it when its moment has come."""

    def __init__(self, progress: Progress, moment: Moment | None) -> None:
        self.progress, self.moment = progress, moment
        self.phase, self.window, self.reached = "start", 0, False
        self.counts: Counter[str] = Counter()
        self.resumed_from = -1

    def event(self, written: Path | None = None) -> None:
        key = f"{self.phase} {self.window}"
        here, moment = (self.phase, self.window, self.counts[key]), self.moment
        self.counts[key] += 1
        if moment is not None and here == (moment.phase, moment.window, moment.event):
            self.reached = True
        place = [PHASES.index(self.phase), self.window, here[2]]
        self.progress.values = [*place, int(self.reached), self.resumed_from]
        if self.reached and moment.delay is None:
            if written is not None:
                os.truncate(written, int(written.stat().st_size * moment.fraction))
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def within(self, phase: str, window: int) -> Iterator[None]:
        outside = self.phase, self.window
        self.phase, self.window = phase, window
        self.event()
        yield
        self.event()
        self.phase, self.window = outside

    def hold(self) -> None:
        """Wait to be killed."""
        while self.reached:
            time.sleep(1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resumed_from = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.phase, self.window = "train", state.global_step // SAVED + 1
        if self.moment is not None and self.window > self.moment.window:
            self.hold()
        self.event()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.event()

    on_pre_optimizer_step = on_optimizer_step = on_step_end = on_substep_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hold()


def install(watch: Watch) -> None:
    """Put events into the libraries. For good: the process ends with its run."""

    def forward(*_: Any) -> None:
        if watch.phase in ("probe", "train"):
            watch.event()

    def write_layer(write: Callable[..., None], *args: Any) -> None:
        with watch.within("factors", 0):
            write(*args)

    def save_checkpoint(save: Callable[..., None], trainer: Any, *args: Any) -> None:
        with watch.within("checkpoint", trainer.state.global_step // SAVED):
            save(trainer, *args)

    def probe(estimate: Callable[..., Any], trainer: Any, *args: Any) -> Any:
        watch.resumed_from = trainer.state.global_step  # the start comes before `on_train_begin` of any other callback
        with watch.within("probe", 0):
            return estimate(trainer, *args)

    def cut(path_of: Callable[..., Any], write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if watch.phase != "checkpoint":
            return write(*args, **kwargs)
        watch.event()
        written = write(*args, **kwargs)
        watch.event(Path(path_of(*args, **kwargs)))
        return written

    def replace(move: Callable[..., Path], partial: Path, target: Path) -> Path:
        if watch.phase == "checkpoint":
            watch.event(partial)
        return move(partial, target)

    second = lambda _, path, **kwargs: path
    adapter_config = lambda _, folder, **kwargs: Path(folder) / "adapter_config.json"
    torch.nn.modules.module.register_module_forward_hook(forward)
    for owner, name, around in (
        (lora_ga_trainer.starts.start, "load_or_estimate", probe),
        (lora_ga_trainer.starts.start, "write_start", write_layer),
        (Trainer, "_save_checkpoint", save_checkpoint),
        (peft.peft_model, "safe_save_file", functools.partial(cut, second)),
        (peft.config.PeftConfigMixin, "save_pretrained", functools.partial(cut, adapter_config)),
        (torch, "save", functools.partial(cut, second)),
        (TrainerState, "save_to_json", functools.partial(cut, second)),
        (Path, "replace", replace),
    ):
        setattr(owner, name, _wrapped(around, getattr(owner, name)))


def _wrapped(around: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    return call


def make_trainer(folder: Path, watch: Watch) -> LoRAGATrainer:
    torch.manual_seed(11)
    return LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(
            folder, max_steps=STEPS, save_strategy="steps", save_steps=SAVED, gradient_accumulation_steps=2
        ),
        train_dataset=tiny.causal_rows(24),  # three steps an epoch: checkpoints lie inside of epochs
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1),
        lora_ga_config=LoRAGAConfig(num_samples=8),
        callbacks=[watch],
    )


def train(folder: Path, watch: Watch) -> None:
    """Go on with the run in `folder`, as a user's script would, and leave the weights it ends with."""
    install(watch)
    trainer = make_trainer(folder, watch)
    if steps_of(folder):
        try:
            trainer.train(resume_from_checkpoint=True)
        except ValueError as error:
            if "No valid checkpoint found in output directory" not in str(error):
                raise
            print(error)
            trainer.train()
    else:
        trainer.train()
    weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    torch.save(weights, folder / "weights.pt")
    (folder / "counts.json").write_text(json.dumps(watch.counts))


def attempt(folder: Path, log: Path, moment: Moment | None = None) -> tuple[int, list[int]]:
    """Run `train` in a process of its own; return how it ended and what it had reached."""
    progress = Progress()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            train(folder, Watch(progress, moment))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if moment is not None and moment.delay is not None:
        while not progress.values[3]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), progress.values
            time.sleep(2e-4)
        time.sleep(moment.delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), progress.values


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def loads(checkpoint: Path) -> bool:
    """Tell whether all that a resume needs can be loaded, by loading it."""
    try:
        load_file(checkpoint / "adapter_model.safetensors")
        for name in ("adapter_config.json", "lora_ga.json", "trainer_state.json"):
            json.loads((checkpoint / name).read_text())
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(checkpoint / name, weights_only=False)
    except Exception:
        return False
    return True


def draw(phase: str, window: int, events: int, generator: random.Random, seen: set[str]) -> Moment:
    """Draw a moment; the first of each phase is exact, so that every phase is met."""
    outside = phase in seen and window < WINDOWS and generator.random() < 0.4
    seen.add(phase)
    # The last event comes after the last file is whole: after the last checkpoint no step would be left to be killed.
    event = generator.randrange(events - (window == WINDOWS))
    return Moment(phase, window, event, generator.random(), generator.uniform(0, 0.03) if outside else None)


def main(folder: Path, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    trainer = make_trainer(folder, Watch(Progress(), None))  # here once: some libraries are imported when first used
    trainer.accelerator.unwrap_model(trainer.model)
    gc.freeze()  # or every fork copies what its first collection walks over
    generator = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    status, _ = attempt(whole, folder / "whole.log")
    assert status == 0, (folder / "whole.log").read_text()[-3000:]
    counts = json.loads((whole / "counts.json").read_text())

    phases = ["train"] * 6 + ["checkpoint"] * 7
    generator.shuffle(phases)
    plan = list(zip(sorted(generator.choices(range(1, WINDOWS + 1), k=len(phases))), phases, strict=True))
    plan = [(0, "probe")] * 4 + [(0, "factors")] * 3 + plan
    killed.mkdir()
    kills, seen = [], set()
    for number, (window, phase) in enumerate(plan):
        found = steps_of(killed)
        complete = max((step for step in found if loads(killed / f"checkpoint-{step}")), default=0)
        window = max(window, complete // SAVED + 1) if window else 0
        moment = draw(phase, window, counts[f"{phase} {window}"], generator, seen)
        log = folder / f"killed-{number}.log"
        status, (at_phase, at_window, event, _, resumed_from) = attempt(killed, log, moment)
        assert status == -signal.SIGKILL, f"{moment} ended with {status}: {log.read_text()[-3000:]}"
        kills.append(
            {
                "asked": vars(moment),
                "status": status,
                "phase": PHASES[at_phase],
                "window": at_window,
                "event": event,
                "found": found,
                "complete": complete,
                "resumed_from": resumed_from,
                "log": log.read_text(),
            }
        )
    status, values = attempt(killed, folder / "end.log")
    # A control: the same end of the run with the random numbers of an earlier checkpoint.
    other = folder / "other"
    shutil.copytree(whole / f"checkpoint-{STEPS - SAVED}", other / f"checkpoint-{STEPS - SAVED}")
    shutil.copy(whole / f"checkpoint-{SAVED}" / "rng_state.pth", other / f"checkpoint-{STEPS - SAVED}")
    control, _ = attempt(other, folder / "other.log")
    return {"kills": kills, "end": status, "end_resumed_from": values[4], "control": control, "counts": counts}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "report.json").write_text(json.dumps(main(place, int(sys.argv[2]))))
