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

from lora_ga_trainer import LoRAGAConfig, LoRAGAMixin
from lora_ga_trainer.saving.record import read_record


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(str(completion).count("a")) for completion in completions]


def sdpo(folder: Path) -> Trainer:
    library = optional.require("trl.experimental.sdpo")
    kind = type("Mine", (LoRAGAMixin, library.SDPOTrainer), {})
    asked = [{"prompt": [{"role": "user", "content": row["p"]}], "privileged_context": "a"} for row in ROWS]
    torch.manual_seed(7)
    return kind(
        tiny.llama(),
        args=library.SDPOConfig(
            **tiny_trl.settings(folder, save_strategy="steps", save_steps=2),
            num_generations=4,
            max_completion_length=6,
            teacher_model_kind="ema",
        ),
        train_dataset=Dataset.from_list(asked),
        processing_class=tiny_trl.tokenizer(),
        reward_funcs=reward,
        peft_config=tiny_trl.lora(),
        lora_ga_config=LoRAGAConfig(num_samples=8),
    )


ROWS = tiny_trl.rows(32, "p")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sdpo_starts_the_student_and_not_its_teacher(tmp_path: Path) -> None:
    trainer = sdpo(tmp_path)
    trainer.train()
    assert trainer.lora_ga_report.metrics()["lora_ga/layers_initialised"] == 14
    assert read_record(tmp_path / "checkpoint-2") is not None
    assert read_record(tmp_path / "checkpoint-2" / "teacher") is None


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
