"""The Trainer swap does what a user of Trainer expects, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import (
    EvalPrediction,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGAMixin, LoRAGATrainer, Seq2SeqLoRAGATrainer
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.adapters.storage import anchored_parameter_names
from lora_ga_trainer.saving.record import read_record, record_of_model
from lora_ga_trainer.starts.prepare import prepare_adapter


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}
FEW = {"num_samples": 8}


def swap(folder: Any, lora_ga: dict[str, Any] | None = None, **changes: Any) -> LoRAGATrainer:
    """The trainer under test on tiny Llama; `changes` go to the training arguments."""
    rows = changes.pop("rows", None) or tiny.causal_rows(24)
    extra = {key: changes.pop(key) for key in ("eval_dataset", "compute_metrics", "callbacks") if key in changes}
    torch.manual_seed(11)
    return LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(folder, **changes),
        train_dataset=rows,
        peft_config=LoraConfig(**LORA),
        lora_ga_config=LoRAGAConfig(**(FEW | (lora_ga or {}))),
        **extra,
    )


def adapter_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_bitwise(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name, value in left.items() if not torch.equal(value, right[name])]
    assert not different, different[:3]


class OrderRecorder(TrainerCallback):
    """Remembers the losses, which depend on the data order, the dropout masks and the weights."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


class Stream(IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


class FactorsByHand(TrainerCallback):
    """Copies given factors into an expanded adapter where the probe would have written them."""

    def __init__(self, factors: dict[str, Tensor]) -> None:
        self.factors = factors

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if name in self.factors:
                parameter.copy_(self.factors[name])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["map-style", "iterable"])
def test_the_probe_leaves_no_trace(kind: str, workers: int, tmp_path: Any) -> None:
    """20 steps with dropout 0.1 are bitwise those of a run whose factors were written by hand, without a probe."""
    rows = tiny.causal_rows(48)
    data = rows if kind == "map-style" else Stream(rows)
    settings = {"max_steps": 20, "dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    started: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            if not started:
                started.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    seen = OrderRecorder()
    probed = swap(tmp_path / "probed", rows=data, callbacks=[Keep(), seen], **settings)
    probed.train()

    torch.manual_seed(11)
    model = tiny.with_lora(tiny.llama(), **LORA)
    prepare_adapter(model, LoRAGAConfig(**FEW))
    by_hand = OrderRecorder()
    plain = Trainer(
        model,
        tiny.arguments(tmp_path / "plain", **settings),
        train_dataset=data,
        callbacks=[FactorsByHand(started), by_hand],
    )
    norm = LoRAGATrainer._clip_grad_norm
    plain._clip_grad_norm = norm.__get__(LoRAGATrainerClipping(plain))  # the norm counts tied halves once in both
    plain.train()
    assert seen.losses == by_hand.losses
    assert_bitwise(adapter_of(probed), adapter_of(plain))


class LoRAGATrainerClipping:
    """Gives a plain Trainer's accelerator and arguments to the mixin's clipping."""

    def __init__(self, trainer: Trainer) -> None:
        self.accelerator, self.args = trainer.accelerator, trainer.args

    def _counts_tied_halves(self, model: nn.Module) -> bool:
        return True


def test_init_none_is_trainer_to_the_bit(tmp_path: Any) -> None:
    ours = swap(tmp_path / "ours", {"init": "none"}, weight_decay=0.1)
    ours.train()
    torch.manual_seed(11)
    plain = Trainer(
        tiny.with_lora_seedless(tiny.llama(), **LORA),
        tiny.arguments(tmp_path / "plain", weight_decay=0.1),
        train_dataset=tiny.causal_rows(24),
    )
    plain.train()
    assert_bitwise(adapter_of(ours), adapter_of(plain))
    assert ours.lora_ga_report is None
    assert [log.get("loss") for log in ours.state.log_history] == [log.get("loss") for log in plain.state.log_history]


def test_the_adapter_moves_and_the_base_does_not(tmp_path: Any) -> None:
    trainer = swap(tmp_path)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = adapter_of(trainer)
    trainer.train()
    assert_bitwise(base, {n: p.detach() for n, p in trainer.model.named_parameters() if not p.requires_grad})
    assert all(not torch.equal(value, before[name]) for name, value in adapter_of(trainer).items())
    report = trainer.lora_ga_report
    assert report.samples == 8
    assert report.loss_before == pytest.approx(report.loss_after, abs=1e-6)


def test_lora_ga_lowers_the_loss_faster_than_plain_lora_at_the_same_rate(tmp_path: Any) -> None:
    """The first SGD step moves along the best rank-2r gradient: the loss after it must be lower than plain LoRA's."""
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    rows = tiny.causal_rows(16)
    losses = {}
    for init in ("lora_ga", "none"):
        trainer = swap(tmp_path / init, {"init": init, "num_samples": 16}, rows=rows, eval_dataset=rows, **settings)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses[init] = trainer.evaluate()["eval_loss"] - before
    assert losses["lora_ga"] < 2 * losses["none"] < 0


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_two_steps_and_a_resume_of_two_are_four_steps(init: str, tmp_path: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    whole = swap(tmp_path / "whole", {"init": init}, **settings)
    whole.train()
    resumed = swap(tmp_path / "resumed", {"init": init}, **settings)
    calls = []
    resumed.compute_loss_func = None
    original = resumed.compute_loss
    resumed.compute_loss = lambda *a, **k: calls.append(1) or original(*a, **k)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(calls) == 2, "a resume must not probe again"
    assert resumed.lora_ga_report is None
    assert_bitwise(adapter_of(whole), adapter_of(resumed))
    losses = lambda trainer: [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses(whole) == losses(resumed)
    for name in ("optimizer.pt", "scheduler.pt"):
        left, right = (
            torch.load(tmp_path / run / "checkpoint-4" / name, weights_only=True) for run in ("whole", "resumed")
        )
        assert_same_state(left, right)


def assert_same_state(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same_state(a, b)
    else:
        assert left == right


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import tiny
from test_trainer import swap
from transformers import TrainerCallback

class KillAt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

swap({folder!r}, save_strategy="steps", save_steps=2, lr_scheduler_type="constant", callbacks=[KillAt()]).train()
"""


def test_a_run_killed_between_two_checkpoints_resumes_bitwise(tmp_path: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = swap(tmp_path / "whole", **settings)
    whole.train()
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    resumed = swap(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_bitwise(adapter_of(whole), adapter_of(resumed))


def logits_of(model: nn.Module) -> Tensor:
    model.eval()
    ids = torch.stack([row["input_ids"] for row in tiny.causal_rows(3, seed=5)])
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_every_folder_loads_with_plain_peft_on_the_clean_base(init: str, lora: dict[str, Any], tmp_path: Any) -> None:
    settings = LORA | lora
    if "modules_to_save" in lora:
        settings["target_modules"] = ["q_proj", "down_proj"]
    torch.manual_seed(11)
    trainer = LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(tmp_path / "run", save_strategy="steps", save_steps=4),
        train_dataset=tiny.causal_rows(24),
        peft_config=LoraConfig(**settings),
        lora_ga_config=LoRAGAConfig(init=init, **FEW),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    trainer.model.save_pretrained(tmp_path / "direct")
    trained = logits_of(trainer.model)
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "model", tmp_path / "direct"):
        stock = PeftModel.from_pretrained(tiny.llama(), folder)
        assert torch.equal(logits_of(stock), trained), folder
        assert json.loads((folder / "lora_ga.json").read_text())["init"] == init
    merged = PeftModel.from_pretrained(tiny.llama(), tmp_path / "model").merge_and_unload()
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-3, atol=2e-5)
    if "modules_to_save" not in lora:
        trainer.model.eval()
        with trainer.model.disable_adapter():
            assert torch.equal(logits_of(trainer.model), logits_of(tiny.llama()))


def test_lora_one_starts_one_normalised_gradient_step_away(tmp_path: Any) -> None:
    """`s B0 A0 = -(s / gamma) [G]_r / S[0]`: its largest singular value is `s / gamma`, and the loss is lower."""
    rows = tiny.causal_rows(16)
    trainer = swap(tmp_path, {"init": "lora_one", "gamma": 4.0, "num_samples": 16}, rows=rows, max_steps=1)
    trainer.args.learning_rate = 0.0
    trainer.train()
    for layer in find_adapted_layers(trainer.model):
        product = layer.s * layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
        assert torch.linalg.matrix_norm(product, ord=2).item() == pytest.approx(layer.s / 4.0, rel=1e-4)
    assert trainer.lora_ga_report.loss_after < trainer.lora_ga_report.loss_before


def test_lora_one_with_dora_recomputes_the_magnitude(tmp_path: Any) -> None:
    torch.manual_seed(11)
    trainer = LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=tiny.causal_rows(8),
        peft_config=LoraConfig(**LORA, use_dora=True),
        lora_ga_config=LoRAGAConfig(init="lora_one", gamma=4.0, **FEW),
    )
    trainer.train()
    for layer in find_adapted_layers(trainer.model):
        adapted = layer.base.weight + layer.s * layer.lora_B.weight @ layer.lora_A.weight
        torch.testing.assert_close(layer.dora_parameter, adapted.norm(dim=1), rtol=1e-5, atol=1e-6)


def test_load_best_model_at_end(tmp_path: Any) -> None:
    """The metric falls, then rises: the best checkpoint is the one after two steps."""
    scores = iter([0.5, 0.1, 0.9, 0.9, 0.9])

    def metrics(_: EvalPrediction) -> dict[str, float]:
        return {"score": next(scores)}

    trainer = swap(
        tmp_path,
        max_steps=4,
        eval_dataset=tiny.causal_rows(4),
        compute_metrics=metrics,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint-2")
    assert torch.equal(logits_of(trainer.model), logits_of(stock))
    assert anchored_parameter_names(trainer.model), "the best model must still be anchored"


def test_a_second_train_continues_without_a_probe(tmp_path: Any) -> None:
    trainer = swap(tmp_path, max_steps=2)
    trainer.train()
    first, report = adapter_of(trainer), trainer.lora_ga_report
    calls = []
    original = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: calls.append(1) or original(*a, **k)
    trainer.train()
    assert len(calls) == 2
    assert trainer.lora_ga_report is report
    moved = adapter_of(trainer)
    shift = max((moved[name] - first[name]).abs().max().item() for name in first)
    assert 0 < shift < 0.01, "two AdamW steps at 1e-3, not a new start"


def test_sft_then_another_trainer_on_the_same_adapter_continues_anchored(tmp_path: Any) -> None:
    first = swap(tmp_path / "first", max_steps=2)
    first.train()
    before = adapter_of(first)
    second = LoRAGATrainer(
        first.model,
        tiny.arguments(tmp_path / "second", max_steps=2),
        train_dataset=tiny.causal_rows(24, seed=4),
        lora_ga_config=LoRAGAConfig(**FEW),
    )
    second.train()
    assert second.lora_ga_report is None
    shift = max((adapter_of(second)[name] - value).abs().max().item() for name, value in before.items())
    assert 0 < shift < 0.01


def test_auto_find_batch_size_initialises_once(tmp_path: Any, monkeypatch: Any) -> None:
    class OutOfMemoryOnce(TrainerCallback):
        def __init__(self) -> None:
            self.raised = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.raised and state.global_step == 1:
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    reports = []
    trainer = swap(tmp_path, auto_find_batch_size=True, callbacks=[OutOfMemoryOnce()])
    monkeypatch.setattr("lora_ga_trainer.callback.publish", lambda trainer, report, **options: reports.append(report))
    trainer.train()
    assert len(reports) == 1
    assert trainer.state.global_step == 4
    assert trainer._train_batch_size < 4


def test_hyperparameter_search_starts_every_trial_anew(tmp_path: Any) -> None:
    """What `hyperparameter_search` does for each trial: `train(trial=...)`, which calls `model_init`."""
    made = []

    def model_init() -> nn.Module:
        made.append(tiny.llama())
        return made[-1]

    trainer = LoRAGATrainer(
        model_init=model_init,
        args=tiny.arguments(tmp_path, max_steps=2),
        train_dataset=tiny.causal_rows(24),
        peft_config=LoraConfig(**LORA),
        lora_ga_config=LoRAGAConfig(**FEW),
    )
    trainer.train()
    first, first_report = adapter_of(trainer), trainer.lora_ga_report
    trainer.train()
    assert trainer.lora_ga_report is not first_report
    assert_bitwise(first, adapter_of(trainer))
    assert find_adapted_layers(trainer.model)[0].stored_rank == 8, (
        "the user's LoraConfig must not grow with every trial"
    )


def test_the_callback_alone_gives_the_same_start(tmp_path: Any) -> None:
    swapped = swap(tmp_path / "swap", max_grad_norm=0.0, weight_decay=0.1)
    swapped.train()
    torch.manual_seed(11)
    plain = Trainer(
        tiny.with_lora_seedless(tiny.llama(), **LORA),
        tiny.arguments(tmp_path / "callback", max_grad_norm=0.0, weight_decay=0.1),
        train_dataset=tiny.causal_rows(24),
    )
    callback = LoRAGACallback(plain, LoRAGAConfig(**FEW))
    plain.add_callback(callback)
    plain.train()
    assert callback.report.samples == 8
    assert_bitwise(adapter_of(swapped), adapter_of(plain))


def test_the_mixin_makes_any_trainer_one(tmp_path: Any) -> None:
    class Doubled(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            out = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            return (2 * out[0], out[1]) if return_outputs else 2 * out

    class Mine(LoRAGAMixin, Doubled):
        pass

    torch.manual_seed(11)
    mine = Mine(
        tiny.with_lora_seedless(tiny.llama(), **LORA),
        tiny.arguments(tmp_path / "mine"),
        train_dataset=tiny.causal_rows(24),
        lora_ga_config=LoRAGAConfig(**FEW),
    )
    mine.train()
    plain = swap(tmp_path / "plain")
    plain.train()
    ours, theirs = mine.lora_ga_report.layers, plain.lora_ga_report.layers
    for a, b in zip(ours, theirs, strict=True):
        assert a.singular_values == pytest.approx([2 * value for value in b.singular_values], rel=1e-4)


def test_seq2seq(tmp_path: Any) -> None:
    trainer = Seq2SeqLoRAGATrainer(
        tiny.t5(),
        Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, predict_with_generate=True
        ),
        train_dataset=tiny.causal_rows(16),
        peft_config=LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
        lora_ga_config=LoRAGAConfig(**FEW),
    )
    trainer.train()
    assert {layer.action for layer in trainer.lora_ga_report.layers} == {"initialised"}


def test_anchored_parameters_are_not_decayed(tmp_path: Any) -> None:
    """With a learning rate of 0 the Adam step is 0 and decay is `lr * wd`; so look at the groups themselves."""
    trainer = swap(tmp_path, weight_decay=0.1, max_steps=1)
    trainer.train()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert all(decay[name] == 0.0 for name in anchored_parameter_names(trainer.model))


def test_clipping_counts_the_gradient_of_a_once(tmp_path: Any) -> None:
    """The logged norm is that of LoRA-GA's gradients, and after clipping that norm is `max_grad_norm`."""
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            if state.global_step == 0:
                total = 0.0
                for layer in find_adapted_layers(model):
                    r = layer.stored_rank // 2
                    total += layer.lora_A.weight.grad[:r].square().sum().item()
                    total += layer.lora_B.weight.grad.square().sum().item()
                seen["clipped"] = total**0.5

    trainer = swap(tmp_path, max_grad_norm=0.01, max_steps=1, callbacks=[Look()])
    trainer.train()
    assert seen["clipped"] == pytest.approx(0.01, rel=1e-4)
    assert next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log) > 0.01


def test_push_to_hub_sends_what_plain_peft_can_load(tmp_path: Any, monkeypatch: Any) -> None:
    """A local stand-in for the hub keeps what would have been uploaded."""

    class Hub:
        def create_repo(self, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id="me/adapter")

        def upload_folder(self, folder_path: str, ignore_patterns: list[str], **kwargs: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "hub", ignore=shutil.ignore_patterns(*ignore_patterns))
            return "uploaded"

    # Which of these names the Trainer calls depends on the release of transformers.
    monkeypatch.setattr("transformers.trainer.hf_api", Hub, raising=False)
    monkeypatch.setattr("transformers.trainer.create_repo", Hub().create_repo, raising=False)
    monkeypatch.setattr("transformers.trainer.upload_folder", Hub().upload_folder, raising=False)
    trainer = swap(tmp_path / "run", max_steps=2)
    trainer.train()
    assert trainer.push_to_hub() == "uploaded"
    sent = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "lora_ga.json"} <= sent
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "hub")
    assert torch.equal(logits_of(stock), logits_of(trainer.model))


def test_what_is_pushed_while_training_has_its_record(tmp_path: Any, monkeypatch: Any) -> None:
    """The Trainer uploads `output_dir`, with the files of a checkpoint whose names it knows."""
    pushed = []

    def push(self: Any, checkpoint: str) -> None:
        pushed.append({path.name for path in Path(self.args.output_dir).iterdir()})

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", push)
    monkeypatch.setattr("transformers.Trainer.push_to_hub", lambda *_, **__: None)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    trainer = swap(tmp_path, **settings)
    trainer.train()
    assert len(pushed) == 2
    assert all("lora_ga.json" in names for names in pushed)
    assert read_record(tmp_path) == read_record(tmp_path / "checkpoint-2")


def test_a_second_adapter_starts_beside_an_anchored_one(tmp_path: Any) -> None:
    first = swap(tmp_path / "first", max_steps=1)
    first.train()
    model = first.model
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    args = tiny.arguments(tmp_path / "second", max_steps=2, learning_rate=1e-2)
    trainer = LoRAGATrainer(model, args, train_dataset=tiny.causal_rows(16), lora_ga_config=LoRAGAConfig(**FEW))
    trainer.train()
    assert [layer.action for layer in trainer.lora_ga_report.layers] == ["initialised", "initialised"]
    assert frozen
    assert all(torch.equal(dict(model.named_parameters())[name], before) for name, before in frozen.items())
    assert any(p.any() for name, p in model.named_parameters() if "lora_B.second" in name)


def test_a_trainer_without_train_data_evaluates_any_adapter_as_it_is(tmp_path: Any) -> None:
    trained = swap(tmp_path, max_steps=2)
    trained.train()
    trained.save_model()
    rows = tiny.causal_rows(4, seed=3)
    for trainable in (False, True):
        model = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=trainable)
        trainer = LoRAGATrainer(model, tiny.arguments(tmp_path / "eval"), eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(trained.evaluate(rows)["eval_loss"], rel=1e-6)
        trainer.train_dataset = rows
        trainer.args.max_steps = 1
        with pytest.raises(ValueError, match="made without a train_dataset, to evaluate"):
            trainer.train()


def test_a_collator_shows_its_attributes_to_a_trainer_that_looks_for_them(tmp_path: Any) -> None:
    class Padded:
        pad = 3

        def __call__(self, samples: Any) -> Any:
            return default_data_collator(samples)

    class Looks(LoRAGATrainer):
        def get_train_dataloader(self) -> Any:
            assert self.data_collator.pad == 3
            assert not hasattr(self.data_collator, "something_else")
            return super().get_train_dataloader()

    rows = tiny.causal_rows(16, ragged=False)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = Looks(
        tiny.llama(),
        tiny.arguments(tmp_path, max_steps=1, dataloader_num_workers=1),
        train_dataset=rows,
        data_collator=Padded(),
        peft_config=lora,
        lora_ga_config=LoRAGAConfig(**FEW),
    )
    trainer.train()
    assert trainer.lora_ga_report.samples == FEW["num_samples"]


def test_unreached_layers_stay_plain_and_are_reported(tmp_path: Any) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.unused = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.used(x) - labels).square().mean()}

    rows = [{"x": torch.randn(6), "labels": torch.randn(8)} for _ in range(8)]
    trainer = LoRAGATrainer(
        Half(),
        tiny.arguments(tmp_path, max_steps=1),
        train_dataset=rows,
        peft_config=LoraConfig(r=2, target_modules=["used", "unused"]),
        lora_ga_config=LoRAGAConfig(allow_unreached=True, **FEW),
    )
    unused = next(layer for layer in find_adapted_layers(trainer.model) if layer.name == "unused")
    before = unused.lora_A.weight.detach().clone()
    trainer.train()
    actions = {layer.name: layer.action for layer in trainer.lora_ga_report.layers}
    assert actions == {"used": "initialised", "unused": "plain start: never reached by the loss"}
    assert torch.equal(unused.lora_A.weight.detach(), before)
    assert before[:2].any()
    assert not unused.lora_B.weight.any()


def test_a_zero_gradient_leaves_a_plain_start_and_is_named(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.live, self.dead = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.live(x) + 0.0 * self.dead(x) - labels).square().mean()}

    rows = [{"x": torch.randn(6), "labels": torch.randn(8)} for _ in range(8)]
    trainer = LoRAGATrainer(
        Dead(),
        tiny.arguments(tmp_path, max_steps=1),
        train_dataset=rows,
        peft_config=LoraConfig(r=2, target_modules=["live", "dead"]),
        lora_ga_config=LoRAGAConfig(**FEW),
    )
    dead = next(layer for layer in find_adapted_layers(trainer.model) if layer.name == "dead")
    before = dead.stored_A.detach().clone()
    with caplog.at_level("WARNING", logger="lora_ga_trainer"):
        trainer.train()
    actions = {layer.name: layer.action for layer in trainer.lora_ga_report.layers}
    assert actions == {"live": "initialised", "dead": "plain start: zero gradient"}
    assert caplog.text.count("1 of the 2 adapted layers is zero") == 1
    assert "whose B is zero: dead." in caplog.text
    assert torch.equal(dead.stored_A.detach(), before)
    assert before[:2].any()
    assert not dead.stored_B.any()


DDP = """
import sys
sys.path.insert(0, {tests!r})
import os, torch
torch.set_num_threads(1)
assert os.environ["WORLD_SIZE"] == "2"
from test_trainer import swap
trainer = swap({folder!r}, max_steps=3, per_device_train_batch_size=2, lora_ga={{"num_samples": 10}})
trainer.model.get_base_model().config.attention_dropout = 0.0
for module in trainer.model.modules():
    if isinstance(module, torch.nn.Dropout):
        module.p = 0.0
trainer.train()
assert trainer.accelerator.num_processes == 2
torch.save({{n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}},
           {folder!r} + f"/rank{{trainer.accelerator.process_index}}.pt")
trainer.lora_ga_report.to_json({folder!r} + f"/report{{trainer.accelerator.process_index}}.json")
from processes import end_processes
end_processes()
"""


def test_two_processes_give_the_start_of_one(tmp_path: Any) -> None:
    """2 processes x 2 samples see what 1 process x 4 samples sees; ranks agree bitwise."""
    two = tmp_path / "two"
    two.mkdir()
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(DDP.format(tests=str(Path(__file__).parent), folder=str(two))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    ranks = [torch.load(two / f"rank{i}.pt", weights_only=True) for i in range(2)]
    assert_bitwise(*ranks)
    one = swap(tmp_path / "one", max_steps=3, per_device_train_batch_size=4, lora_ga={"num_samples": 10})
    for module in one.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    one.train()
    reports = [json.loads((two / f"report{i}.json").read_text()) for i in range(2)]
    assert reports[0]["samples"] == reports[1]["samples"] == one.lora_ga_report.samples == 12
    assert reports[0]["items"] == one.lora_ga_report.items
    for ours, theirs in zip(one.lora_ga_report.layers, reports[0]["layers"], strict=True):
        assert ours.singular_values == pytest.approx(theirs["singular_values"], rel=1e-4)
    # The start agrees to rounding (signs are fixed); AdamW then moves entries of near-zero gradient by their sign.
    mine = adapter_of(one)
    far = [((value - mine[name]).abs() > 1e-4).float().mean().item() for name, value in ranks[0].items()]
    assert max(far) < 0.02


def test_record_survives_in_the_model(tmp_path: Any) -> None:
    trainer = swap(tmp_path, max_steps=1)
    assert record_of_model(trainer.model).initialised is False
    trainer.train()
    record = record_of_model(trainer.model)
    assert (record.initialised, record.init, record.rank, record.anchored) == (True, "lora_ga", 4, True)


@pytest.mark.parametrize("bare", [False, True])
def test_the_start_comes_before_what_other_callbacks_do_when_training_begins(bare: bool, tmp_path: Any) -> None:
    """A moving average that copies the weights in `on_train_begin` has to copy the start."""

    class Average(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            self.first = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}

    average = Average()
    model, rows = tiny.with_lora(tiny.llama()), tiny.causal_rows(16)
    args = tiny.arguments(tmp_path, max_steps=1, learning_rate=0.0)
    config = LoRAGAConfig(num_samples=8)
    if bare:
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[average])
        trainer.add_callback(LoRAGACallback(trainer, config))
    else:
        trainer = LoRAGATrainer(model, args, train_dataset=rows, callbacks=[average], lora_ga_config=config)
    trainer.train()
    assert any(value.any() for name, value in average.first.items() if "lora_B" in name)
    for name, value in average.first.items():
        assert torch.equal(value, model.state_dict()[name])  # at a rate of 0 the start is what is trained
