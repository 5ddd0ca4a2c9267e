"""Trainers with a `training_step` of their own, data loaders that give nothing, and figures by second."""

from __future__ import annotations

import time
from typing import Any

import pytest
import reference
import tiny
import torch
from test_probe import assert_equal_gradients, causal_loss, exact, probe, stack
from torch import Tensor
from transformers import Trainer

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGATrainer


class Tripled(Trainer):
    """Trains on three times the loss, and a penalty, without `compute_loss`."""

    def loss_of(self, model: Any, inputs: Any) -> Tensor:
        outputs = model(**inputs)
        return 3 * outputs.loss + 0.1 * outputs.logits.square().mean()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.optimizer and self.optimizer.zero_grad()
        loss = self.loss_of(model, inputs)
        self.backward(loss)
        return loss.detach()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)


class TripledByHand(Tripled):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class TripledByAutograd(Tripled):
    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward([loss])


class Silent(Tripled):
    def backward(self, loss: Tensor) -> None:
        """Forget to learn."""


class Around(Trainer):
    """Does something beside the step of the class above, whose loss is that of `compute_loss`."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        type(self).steps.append(1)
        return super().training_step(*args, **kwargs)


def make(kind: type, folder: Any, rows: list[dict[str, Any]], **more: Any) -> Any:
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    settings |= more.pop("args", {})
    model = tiny.with_lora(tiny.llama(), target_modules=["q_proj", "up_proj"])
    return kind(model, tiny.arguments(folder, **settings), train_dataset=rows, **more)


@pytest.mark.parametrize("kind", [Tripled, TripledByHand, TripledByAutograd])
def test_the_gradient_is_that_of_the_loss_that_a_step_of_its_own_trains(kind: type, tmp_path: Any) -> None:
    rows = tiny.causal_rows(8, ragged=False)
    trainer = make(kind, tmp_path, rows)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    found = probe(trainer, exact(num_samples=8))
    plain, backward = tiny.llama().eval(), Tensor.backward

    def loss() -> Tensor:
        logits = plain(input_ids=stack(rows)["input_ids"]).logits
        return 3 * causal_loss(plain, rows) + 0.1 * logits.square().mean()

    assert_equal_gradients(found, reference.whole_sample_gradient(plain, list(found), loss))
    assert Tensor.backward is backward
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_step_of_its_own_trains_as_without_a_probe(tmp_path: Any) -> None:
    """It runs to the end in training, and nowhere else."""
    kind = type("Ours", (Tripled, LoRAGATrainer), {})
    config = LoRAGAConfig(num_samples=8, probe_order="train")
    trainer = make(kind, tmp_path, tiny.causal_rows(24), lora_ga_config=config)
    assert trainer.train().global_step == 4
    report = trainer.lora_ga_report
    assert report.loss_after == pytest.approx(report.loss_before, abs=1e-5)
    first = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert report.loss_before == pytest.approx(first, rel=1e-4)


def test_a_step_without_a_backward_pass_is_an_error_that_says_so(tmp_path: Any) -> None:
    trainer = make(
        type("Quiet", (Silent, LoRAGATrainer), {}), tmp_path, tiny.causal_rows(8), lora_ga_config=LoRAGAConfig()
    )
    with pytest.raises(ValueError, match=r"Quiet\.training_step made no backward pass.*accelerator\.backward"):
        trainer.train()


def test_a_step_that_calls_the_one_above_it_is_not_run_by_the_probe(tmp_path: Any) -> None:
    kind = type("Ours", (Around, LoRAGATrainer), {"steps": []})
    make(kind, tmp_path, tiny.causal_rows(24), lora_ga_config=LoRAGAConfig(num_samples=8)).train()
    assert len(kind.steps) == 4


def test_a_step_that_was_put_around_the_trainers_is_not_run_by_the_probe(tmp_path: Any) -> None:
    trainer = make(
        LoRAGATrainer, tmp_path, tiny.causal_rows(24), lora_ga_config=LoRAGAConfig(num_samples=8, probe_order="train")
    )
    original, calls = trainer.training_step, []

    def around(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args)

    trainer.training_step = around
    trainer.train()
    assert len(calls) == 4


@pytest.mark.parametrize("rows", [5, 8])
def test_fewer_rows_than_a_batch_are_named_where_uneven_batches_are_dropped(rows: int, tmp_path: Any) -> None:
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    trainer = make(
        LoRAGATrainer, tmp_path, tiny.causal_rows(rows), args=settings, lora_ga_config=LoRAGAConfig(num_samples=8)
    )
    if rows == 8:
        assert trainer.train().global_step == 4
        return
    with pytest.raises(ValueError, match=r"5 rows, a round takes 8 on each of 1 processes.*drop_last=True"):
        trainer.train()


def test_a_loader_that_gives_nothing_is_named(tmp_path: Any) -> None:
    class Nothing(LoRAGATrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SubsetRandomSampler([])

    trainer = make(Nothing, tmp_path, tiny.causal_rows(8), lora_ga_config=LoRAGAConfig())
    with pytest.raises(ValueError, match=r"gave no batch. Its data set has 8 rows"):
        trainer.train()


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_figures_by_second_leave_the_start_out(way: str, tmp_path: Any, monkeypatch: Any) -> None:
    """A start that takes 3 s beside 4 steps: what is reported is what the steps took."""
    from lora_ga_trainer import callback

    original = callback.start_adapter

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(3)
        return original(*args, **kwargs)

    monkeypatch.setattr(callback, "start_adapter", slow)
    settings = {"include_num_input_tokens_seen": "all"}
    config = LoRAGAConfig(num_samples=8)
    if way == "mixin":
        trainer = make(LoRAGATrainer, tmp_path, tiny.causal_rows(24), args=settings, lora_ga_config=config)
    else:
        trainer = make(Trainer, tmp_path, tiny.causal_rows(24), args=settings)
        trainer.add_callback(LoRAGACallback(trainer, config))
    begin = time.perf_counter()
    metrics = trainer.train().metrics
    whole = time.perf_counter() - begin
    runtime = metrics["train_runtime"]
    assert 0 < runtime < whole - 2.9
    assert metrics["train_samples_per_second"] == pytest.approx(16 / runtime, rel=0.01, abs=0.002)
    assert metrics["train_steps_per_second"] == pytest.approx(4 / runtime, rel=0.01, abs=0.002)
    rates = [log["train_tokens_per_second"] for log in trainer.state.log_history if "train_tokens_per_second" in log]
    assert rates[0] > 48 / (whole - 2.9)
    assert trainer.state.log_history[-1]["train_runtime"] == runtime
    assert trainer.state.num_input_tokens_seen == 4 * 4 * 12

    started = next(found for found in trainer.callback_handler.callbacks if isinstance(found, LoRAGACallback))
    assert 3 < started.start_seconds < whole
    trainer.args.max_steps = 8
    trainer.train()
    assert started.start_seconds == 0, "a second run has no start to leave out"
