"""Whatever goes wrong in the probe: the model is left as it was found, the error says what happened, a retry works."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate.utils.memory import should_reduce_batch_size
from spy import Spy
from test_engines import free_port
from torch import Tensor
from transformers import TrainerCallback

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.adapters.find import find_adapted_layers


# What `Trainer.train` itself leaves of a training that fails: its data loader.
OF_TRAINING = ("loaders", "references", "sync")
MARK = tiny.VOCABULARY - 1  # a first token that marks a row as poisoned
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
NO_CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate"


def rows(poisoned: int | None = 9) -> list[dict[str, Tensor]]:
    """16 rows; `poisoned` lies in the third micro-batch of four."""
    found = tiny.causal_rows(16)
    for number, row in enumerate(found):
        row["input_ids"][0] = MARK if number == poisoned else 1
    return found


def make(folder: Any, act: Callable[[Any, Tensor], Tensor] | None = None, **changes: Any) -> LoRAGATrainer:
    """
    A trainer whose loss is `act(outputs, loss)` on a poisoned micro-batch.

    Its layers are sketched, so that they turn before the poison comes.
    """

    class Poisoned(LoRAGATrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if act is not None and (inputs["input_ids"][:, 0] == MARK).any():
                loss = act(outputs, loss)
            return (loss, outputs) if return_outputs else loss

    settings = {"train_dataset": rows(), "lora_ga_config": LoRAGAConfig(num_samples=16, sketch_size=2)} | changes
    model = tiny.with_lora(tiny.llama(hidden_size=64), r=1, lora_dropout=0.1)
    batch = {"per_device_train_batch_size": settings.pop("batch_size", 4)}
    arguments = tiny.arguments(folder, train_sampling_strategy="sequential", **batch)
    return Poisoned(model, arguments, **settings)


def raising(error: BaseException) -> Callable[[Any, Tensor], Tensor]:
    def act(outputs: Any, loss: Tensor) -> Tensor:
        raise error

    return act


def interrupt(outputs: Any, loss: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGINT)  # what Ctrl-C sends
    return loss


CASES: dict[str, tuple[Callable, type[BaseException], str]] = {
    "a NaN loss": (lambda _, loss: loss * math.nan, ValueError, r"Probe batch \d: the loss is nan\. No weight was"),
    "an infinite loss": (lambda _, loss: loss + math.inf, ValueError, r"Probe batch \d: the loss is inf\. No weight"),
    "an infinite gradient": (
        lambda outputs, loss: loss + (outputs.logits - outputs.logits.detach()).sum() * torch.finfo().max * 10,
        ValueError,
        r"Probe batch \d: .* not finite|the loss is nan",
    ),
    "no GPU memory": (
        raising(torch.OutOfMemoryError(OUT_OF_MEMORY)),
        torch.OutOfMemoryError,
        r"CUDA out of memory(.|\n)*Lower per_device_train_batch_size",
    ),
    "no memory": (raising(RuntimeError(NO_CPU_MEMORY)), RuntimeError, r"(.|\n)*Lower per_device_train_batch_size"),
    "an error of the model": (raising(RuntimeError("sizes do not match")), RuntimeError, r"^sizes do not match$"),
    "Ctrl-C": (interrupt, KeyboardInterrupt, ""),
}


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """As in a terminal: a shell that starts a program in the background makes it ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_left_as_it_was_found(case: str, tmp_path: Path) -> None:
    act, kind, message = CASES[case]
    trainer = make(tmp_path, act)
    before = Spy(trainer)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(kind, match=message) as caught:
        trainer.train()
    before.assert_same(Spy(trainer), but=OF_TRAINING)
    assert trainer.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.lora_ga_report is None
    assert not list(tmp_path.glob("**/*.safetensors"))
    if "memory" in case and kind is torch.OutOfMemoryError:
        assert should_reduce_batch_size(caught.value), "accelerate's auto_find_batch_size must know it"


@pytest.mark.parametrize("case", ["a NaN loss", "Ctrl-C"])
def test_a_second_try_starts_as_the_first_would_have(case: str, tmp_path: Path) -> None:
    trainer = make(tmp_path / "poisoned", CASES[case][0])
    with pytest.raises(CASES[case][1]):
        trainer.train()
    trainer.train_dataset = rows(poisoned=None)
    healthy = make(tmp_path / "healthy", train_dataset=rows(poisoned=None))
    for each in (trainer, healthy):
        torch.manual_seed(7)  # of the dropout in training
        each.train()
    assert trainer.lora_ga_report.metrics()["lora_ga/layers_initialised"] == len(trainer.lora_ga_report.layers)
    for (name, found), expected in zip(
        trainer.model.state_dict().items(), healthy.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_labels_that_are_all_ignored_are_an_error_and_one_such_batch_is_none(tmp_path: Path) -> None:
    nothing = rows(poisoned=None)
    for row in nothing:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = make(tmp_path / "all", train_dataset=nothing)
    before = Spy(trainer)
    with pytest.raises(ValueError, match="16 samples of the probe hold no label to learn from"):
        trainer.train()
    before.assert_same(Spy(trainer), but=OF_TRAINING)
    some = rows(poisoned=None)
    for row in some[:4]:  # the whole first micro-batch, and all that is seen before the first turning points
        row["labels"] = torch.full_like(row["labels"], -100)
    sketch = LoRAGAConfig(num_samples=16, sketch_size=4, probe_order="train")
    exact = LoRAGAConfig(num_samples=16, estimator="exact", probe_order="train")
    reports = []
    for name, config in (("sketch", sketch), ("exact", exact)):
        trainer = make(tmp_path / name, train_dataset=some, lora_ga_config=config)
        trainer.train()
        reports.append(trainer.lora_ga_report)
        assert reports[-1].items == sum(int(row["labels"][1:].ne(-100).sum()) for row in some)
    # Four columns keep too little of such gradients, so all layers are seen twice, and then whole.
    assert all(layer.seen_twice for layer in reports[0].layers)
    for ours, true in zip(*(report.layers for report in reports), strict=True):
        assert ours.singular_values == pytest.approx(true.singular_values, rel=1e-4)


class Raises(TrainerCallback):
    """A user's callback with a mistake in it."""

    def __init__(self, event: str, step: int = 0) -> None:
        self.event, self.step = event, step

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name == object.__getattribute__(self, "event"):
            return self._raise
        return object.__getattribute__(self, name)

    def _raise(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.step:
            raise LookupError("a mistake of the user's")


@pytest.mark.parametrize(("event", "step"), [("on_train_begin", 0), ("on_log", 0), ("on_step_end", 2)])
def test_a_users_callback_that_raises_leaves_the_adapter_whole(event: str, step: int, tmp_path: Path) -> None:
    """The start comes before any callback of the user's: all of it is written, and training can be tried again."""
    trainer = make(tmp_path, train_dataset=rows(poisoned=None), callbacks=[Raises(event, step)])
    before = Spy(trainer)
    with pytest.raises(LookupError, match="a mistake of the user's"):
        trainer.train()
    after = Spy(trainer)
    for name in ("requires_grad", "hooks", "dropouts"):
        assert before.seen[name] == after.seen[name], name
    moved = [
        layer.name
        for layer in find_adapted_layers(trainer.model)
        if layer.stored_B.detach()[:, 1:].any()  # [B - B0, B0]: B0 is zero before the start
    ]
    assert len(moved) == 14
    report = trainer.lora_ga_report
    trainer.remove_callback(Raises)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.lora_ga_report is report is not None


SCRIPT = Path(__file__).with_name("poison_run.py")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: Any) -> list[str]:
    folder = tmp_path_factory.mktemp("poison")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(SCRIPT), str(folder)]
    places = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=places, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [(folder / f"rank_{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "on_0", "on_1"),
    [
        (
            "nan",
            r"NonFiniteGradient: Probe batch \d failed on process 1",
            r"NonFiniteGradient: Probe batch \d: the loss",
        ),
        ("error", r"RuntimeError: Probe batch \d failed on process 1", "LookupError: on process 1 alone"),
    ],
)
def test_a_process_that_fails_alone_does_not_leave_the_others_waiting(
    case: str, on_0: str, on_1: str, two_processes: list[str]
) -> None:
    for met, expected in zip(two_processes, (on_0, on_1), strict=True):
        assert re.search(f"{case}: {expected}", met)


def test_a_process_without_data_takes_part(two_processes: list[str]) -> None:
    """Five samples in rounds of four: the last round has one, of process 0."""
    assert all("short: started, 5 samples" in met for met in two_processes)
