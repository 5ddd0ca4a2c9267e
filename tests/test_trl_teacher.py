"""TRL's SDPO, whose own callback makes a second adapter that its loss needs, and the order of callbacks behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optional
import pytest
import tiny
import tiny_trl
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGAMixin
from lora_ga_trainer.saving.record import read_record


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(str(completion).count("a")) for completion in completions]


def sdpo(way: str, folder: Path) -> Trainer:
    library = optional.require("trl.experimental.sdpo")
    asked = [{"prompt": [{"role": "user", "content": row["p"]}], "privileged_context": "a"} for row in ROWS]
    start = LoRAGAConfig(num_samples=8)
    kind = type("Mine", (LoRAGAMixin, library.SDPOTrainer), {}) if way == "mixin" else library.SDPOTrainer
    torch.manual_seed(7)
    trainer = kind(
        tiny.llama(),
        args=library.SDPOConfig(
            **tiny_trl.settings(folder, save_strategy="steps", save_steps=2),
            num_generations=4,
            max_completion_length=6,
            teacher_model_kind="ema",
            success_reward_threshold=0.0,
        ),
        train_dataset=Dataset.from_list(asked),
        processing_class=tiny_trl.tokenizer(),
        reward_funcs=reward,
        peft_config=tiny_trl.lora(),
        **({"lora_ga_config": start} if way == "mixin" else {}),
    )
    if way == "callback":
        trainer.add_callback(LoRAGACallback(trainer, start))
    return trainer


ROWS = tiny_trl.rows(32, "p")
both_ways = pytest.mark.parametrize("way", ["mixin", "callback"])


@both_ways
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sdpo_starts_the_student_and_not_its_teacher(way: str, tmp_path: Path) -> None:
    trainer = sdpo(way, tmp_path)
    trainer.train()
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, LoRAGACallback))
    assert callback.report.metrics()["lora_ga/layers_initialised"] == 14
    assert read_record(tmp_path / "checkpoint-2") is not None
    assert read_record(tmp_path / "checkpoint-2" / "teacher") is None


class Seeds(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(5)


@both_ways
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first_step_is_plains_where_the_random_numbers_are(way: str, tmp_path: Path) -> None:
    """The teacher copies the form of an anchored adapter. It is twice as large, and draws more of them when made."""
    logs = []
    for name in ("plain", way):
        trainer = sdpo(name, tmp_path / name)
        trainer.add_callback(Seeds())
        trainer.train()
        logs.append(next(log for log in trainer.state.log_history if "loss" in log))
    plain, ours = logs
    assert plain["self_distillation/distillation_loss"] != 0
    differ = [
        name for name in plain if name not in ("grad_norm", "step_time") and plain[name] != pytest.approx(ours[name])
    ]
    assert differ == []


class Remembers(TrainerCallback):
    def __init__(self, order: list[str], name: str) -> None:
        self.order, self.name = order, name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        started = kwargs["model"].peft_config["default"].record.initialised
        self.order.append(f"{self.name} {'after' if started else 'before'} the start")


def test_the_trainers_own_callbacks_come_before_the_start_and_the_users_after_it(tmp_path: Path) -> None:
    order: list[str] = []

    class Adds(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(Remembers(order, "own"))

    class Mine(LoRAGAMixin, Adds): ...

    trainer = Mine(
        tiny.with_lora(tiny.llama()),
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(16),
        callbacks=[Remembers(order, "given")],
        lora_ga_config=LoRAGAConfig(num_samples=8),
    )
    trainer.add_callback(Remembers(order, "added"))
    trainer.train()
    assert order == ["own before the start", "given after the start", "added after the start"]


def test_with_the_callback_alone_the_trainers_own_are_those_of_the_classes_that_it_names(tmp_path: Path) -> None:
    order: list[str] = []

    class Own(Remembers): ...

    kind = type(
        "Adds", (Trainer,), {"setup": lambda self: self.add_callback(Named(order, "own")), "__module__": "own"}
    )
    given = [Remembers(order, "given")]
    trainer = kind(
        tiny.with_lora(tiny.llama()), tiny.arguments(tmp_path), train_dataset=tiny.causal_rows(16), callbacks=given
    )
    trainer.setup()
    trainer.add_callback(Own(order, "added"))
    trainer.add_callback(LoRAGACallback(trainer, LoRAGAConfig(num_samples=8)))
    trainer.train()
    assert order == ["own before the start", "given after the start", "added after the start"]


class Named(Remembers):
    """One that the class of the trainer names."""
