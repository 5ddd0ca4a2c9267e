"""TRL's trainers, with the mixin and with the callback alone, in real tiny trainings."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import optional
import pytest
import reference
import tiny
import tiny_trl
import torch
import torch.nn.functional as F
from clients.runs import Undo
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_inner_gradients import true_gradients
from test_probe import assert_equal_gradients, exact
from test_trainer import adapter_of, assert_bitwise, logits_of
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGAMixin, estimate_gradients, load_adapter
from lora_ga_trainer.adapters.find import find_adapted_layers


LORA = {"lora_dropout": 0.1}
# What a run's log says of the clock.
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time"}
# TRL's trainer, the columns of its rows, and settings beside those of every tiny run.
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "text": ("SFT", ("text",), {}),
    "completion": ("SFT", ("prompt", "completion"), {}),
    "packing": ("SFT", ("text",), {"packing": True, "max_length": 24}),
    "dpo": ("DPO", ("prompt", "chosen", "rejected"), {}),
    "dpo-unchecked": ("DPO", ("prompt", "chosen", "rejected"), {"gradient_checkpointing": False}),
    "dpo-precomputed": ("DPO", ("prompt", "chosen", "rejected"), {"precompute_ref_log_probs": True}),
    "kto": ("KTO", ("prompt", "completion", "label"), {}),
    "grpo": (
        "GRPO",
        ("prompt",),
        {
            "num_generations": 4,
            "max_completion_length": 6,
            "beta": 0.1,
            "gradient_accumulation_steps": 2,
            "log_completions": True,
        },
    ),
}
every_case = pytest.mark.parametrize("case", [case for case in CASES if case not in ("dpo-precomputed", "kto")])
both_ways = pytest.mark.parametrize("way", ["mixin", "callback"])


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    return optional.require("trl")


def reward(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") + text.count("e") - len(text) / 20 for text in completions]


def make(trl: ModuleType, case: str, way: str, folder: Any, lora_ga: dict[str, Any] | None = None, **changes: Any):
    """A trainer of TRL: plain, or with the start in one of the two ways; what is not `passed` goes to its config."""
    kind, columns, settings = CASES[case]
    trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    model = changes.pop("model", None)
    extra = {"reward_funcs": reward} if kind == "GRPO" else {}
    extra |= changes.pop("passed", {})
    if model is None:
        torch.manual_seed(7)
        model = tiny.llama()
        extra["peft_config"] = tiny_trl.lora(**LORA)
    rows = changes.pop("rows", None) or tiny_trl.dataset(56, *columns)
    start = LoRAGAConfig(**({"num_samples": 8} | (lora_ga or {})))
    if way == "mixin":
        trainer_class = type("Mine", (LoRAGAMixin, trainer_class), {})
        extra["lora_ga_config"] = start
    torch.manual_seed(11)
    trainer = trainer_class(
        model,
        args=config_class(**tiny_trl.settings(folder, **(settings | changes))),
        train_dataset=rows,
        processing_class=tiny_trl.tokenizer(),
        **extra,
    )
    if way == "callback":
        trainer.add_callback(LoRAGACallback(trainer, start))
    return trainer


def trained_logs(trainer: Trainer, *ignored: str) -> list[dict[str, float]]:
    """What the run logged, without the start's own line and the clock's figures."""
    logs = [log for log in trainer.state.log_history if "lora_ga/samples" not in log]
    return [{key: value for key, value in log.items() if key not in TIMES | set(ignored)} for log in logs]


@pytest.fixture(scope="module")
def plain_run(trl: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trainer]:
    """Runs a case with TRL alone, once."""

    @functools.cache
    def run(case: str) -> Trainer:
        trainer = make(trl, case, "plain", tmp_path_factory.mktemp(case))
        trainer.train()
        return trainer

    return run


def files_of(trainer: Trainer) -> set[str]:
    folder = Path(trainer.args.output_dir)
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"lora_ga_report.json"}


@both_ways
@every_case
def test_a_start_that_is_undone_leaves_trls_own_run_to_the_bit(
    trl: ModuleType, plain_run: Callable[[str], Trainer], case: str, way: str, tmp_path: Path
) -> None:
    """The same metrics at every step, the same order of rows, dropout masks and generated texts, the same weights."""
    plain = plain_run(case)
    undone = make(trl, case, way, tmp_path, {"init": "lora_one"})
    undone.add_callback(Undo(undone))
    undone.train()
    assert trained_logs(undone) == trained_logs(plain)
    assert len(trained_logs(plain)) == 3
    assert_bitwise(adapter_of(undone), adapter_of(plain))
    assert files_of(undone) == files_of(plain)


def test_the_probe_sends_no_timings_to_a_tracker(
    trl: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL times the parts of a step and hands that to wandb directly, past the Trainer's callbacks."""
    profiling = importlib.import_module("trl.extras.profiling")
    sent: list[dict[str, float]] = []
    monkeypatch.setattr(profiling, "is_wandb_available", lambda: True)
    monkeypatch.setattr(profiling, "wandb", SimpleNamespace(run="a run", log=sent.append), raising=False)
    counts = {}
    for way in ("plain", "mixin"):
        trainer = make(trl, "grpo", way, tmp_path / way, log_completions=False)
        trainer.args.report_to = ["wandb"]
        trainer.train()
        counts[way] = len(sent)
        sent.clear()
    assert counts["mixin"] == counts["plain"] > 0


class AtStepZero(TrainerCallback):
    """Keeps the logits that the model gives before the first step."""

    logits: Tensor

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        assert all(parameter.grad is None for parameter in model.parameters())
        if state.global_step == 0:
            self.logits = logits_of(model)
            model.train()


@both_ways
@every_case
def test_step_zero_is_the_base_and_only_the_adapter_moves(
    trl: ModuleType, plain_run: Callable[[str], Trainer], case: str, way: str, tmp_path: Path
) -> None:
    """With the function of step zero every figure of step one is that of plain TRL, and the token count of any."""
    trainer = make(trl, case, way, tmp_path)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    before, look = adapter_of(trainer), AtStepZero()
    trainer.add_callback(look)
    trainer.train()
    assert torch.equal(look.logits, logits_of(tiny.llama()))
    assert_bitwise({n: p.detach() for n, p in trainer.model.named_parameters() if n in frozen}, frozen)
    with trainer.model.disable_adapter():
        assert torch.equal(logits_of(trainer.model), logits_of(tiny.llama()))
    assert all(not torch.equal(value, before[name]) for name, value in adapter_of(trainer).items())

    ours, theirs = trained_logs(trainer, "grad_norm"), trained_logs(plain_run(case), "grad_norm")
    assert ours[0] == theirs[0]
    if case != "grpo":  # what is written from the second step on depends on the first
        assert [log.get("num_tokens") for log in ours] == [log.get("num_tokens") for log in theirs]


# --- gradients -----------------------------------------------------------------------------------------------------


def probe(trainer: Trainer, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    estimate = estimate_gradients(trainer, exact(**changes))
    return {name: estimator.state()["G"].double() for name, estimator in estimate.estimators.items()}, estimate


def documents(rows: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """The tokens and labels of every document, one by one, packed or not."""
    found = []
    for row in rows:
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        parts = zip(
            torch.tensor(row["input_ids"]).split(lengths), torch.tensor(row["labels"]).split(lengths), strict=True
        )
        found += list(parts)
    return found


def sft_loss(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """The mean over the labels of all documents, each alone in its forward pass."""
    total, items = torch.zeros(()), 0
    for tokens, labels in documents(rows):
        logits = model(input_ids=tokens[None]).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        items += int(labels[1:].ne(-100).sum())
    return total / items


@pytest.mark.parametrize(
    ("case", "batch_size", "samples"),
    [("text", 3, 9), ("completion", 4, 8), ("completion", 3, 9), ("packing", 4, 8), ("packing", 3, 9)],
)
def test_sft_gives_the_gradient_of_the_item_weighted_loss(
    trl: ModuleType, case: str, batch_size: int, samples: int, tmp_path: Path
) -> None:
    """A sample is a row of the train dataset, also where the collator packs rows into one. Batches stay whole."""
    trainer = make(
        trl,
        case,
        "callback",
        tmp_path,
        per_device_train_batch_size=batch_size,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=2,
    )
    found, estimate = probe(trainer, num_samples=8)
    rows = trainer.train_dataset.select(range(samples)).to_list()
    assert estimate.samples == samples
    assert estimate.items == sum(int(labels[1:].ne(-100).sum()) for _, labels in documents(rows))
    if case == "completion":
        assert any(row["labels"][1] == -100 for row in rows), "the prompt is no label"
    if case == "packing":
        assert any(len(row["seq_lengths"]) > 1 for row in rows)
    plain = tiny.llama()
    assert_equal_gradients(found, reference.whole_sample_gradient(plain, list(found), lambda: sft_loss(plain, rows)))


def completion_logp(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:  # ()
    tokens = torch.tensor([prompt + completion])
    logps = model(input_ids=tokens).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(completion))


def dpo_loss(model: nn.Module, base: nn.Module, rows: list[dict[str, Any]], beta: float) -> Tensor:
    """Equation 7 of arXiv 2305.18290, pair by pair, with a frozen copy as the reference."""
    total = torch.zeros(())
    for row in rows:
        ratio = torch.zeros(())
        for column, sign in (("chosen_ids", 1), ("rejected_ids", -1)):
            with torch.no_grad():
                held = completion_logp(base, row["prompt_ids"], row[column])
            ratio = ratio + sign * (completion_logp(model, row["prompt_ids"], row[column]) - held)
        total = total - F.logsigmoid(beta * ratio)
    return total / len(rows)


@pytest.mark.parametrize("case", ["dpo", "dpo-precomputed"])
@pytest.mark.parametrize(("batch_size", "asked", "samples"), [(4, 8, 8), (4, 6, 8), (3, 8, 9), (2, 5, 6)])
def test_dpo_counts_pairs_and_never_cuts_them(
    trl: ModuleType, case: str, batch_size: int, asked: int, samples: int, tmp_path: Path
) -> None:
    """A micro-batch of n pairs has 2n rows; cut among them, chosen answers would be compared with chosen ones."""
    trainer = make(
        trl,
        case,
        "callback",
        tmp_path,
        per_device_train_batch_size=batch_size,
        train_sampling_strategy="sequential",
    )
    found, estimate = probe(trainer, num_samples=asked)
    assert (estimate.samples, estimate.items) == (samples, samples)
    rows = trainer.train_dataset.select(range(samples)).to_list()
    plain, base = tiny.llama(), tiny.llama()
    loss = lambda: dpo_loss(plain, base, rows, trainer.beta)
    assert estimate.loss == pytest.approx(loss().item(), rel=1e-6)
    assert_equal_gradients(found, reference.whole_sample_gradient(plain, list(found), loss))


def policy_loss(model: nn.Module, slices: list[dict[str, Tensor]]) -> Tensor:
    """GRPO's loss (arXiv 2402.03300, equation 3) where the policy is the one that wrote: a mean over completions."""
    total, count = torch.zeros(()), 0
    for inputs in slices:
        for row in range(len(inputs["advantages"])):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
            written = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
            logps = model(input_ids=torch.cat([prompt, written])[None]).logits[0].log_softmax(-1)
            logps = logps[len(prompt) - 1 : -1].gather(1, written[:, None])[:, 0]
            total = total - inputs["advantages"][row] * (logps - logps.detach()).exp().mean()
            count += 1
    return total / count


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
def test_grpo_writes_each_completion_once_and_gives_the_policy_gradient(
    trl: ModuleType, estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writing of 8 completions serves two micro-batches of 4, which a turning point inside one does not change."""
    written = []
    judge = reward
    monkeypatch.setattr(
        sys.modules[__name__], "reward", lambda completions, **_: written.append(completions) or judge(completions)
    )
    model = tiny.with_lora(tiny.llama(), r=1)
    trainer = make(trl, "grpo", "callback", tmp_path, model=model, loss_type="grpo", beta=0.0)
    slices, compute = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kw: slices.append(dict(inputs)) or compute(model, inputs, **kw)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    size = 2 if estimator == "sketch" else None
    # A second look would let the trainer write the same completions once more.
    config = LoRAGAConfig(num_samples=12, estimator=estimator, sketch_size=size, min_energy_kept=None)
    estimate = estimate_gradients(trainer, config)
    assert estimate.samples == 12
    assert any(e.sketched for e in estimate.estimators.values()) == (estimator == "sketch")
    texts = [str(inputs["completion_ids"].tolist()) for inputs in slices]
    looked = estimator == "sketch"  # 4 of 12 samples are more than a quarter: the first slice is run twice
    assert len(set(texts)) == 3, "three different slices"
    assert texts[looked:] == list(dict.fromkeys(texts))
    assert len(written) == 2
    if estimator == "sketch":
        return
    found = {name: estimator.state()["G"].double() for name, estimator in estimate.estimators.items()}
    plain = tiny.llama()
    true = reference.whole_sample_gradient(plain, list(found), lambda: policy_loss(plain, slices))
    assert_equal_gradients(found, true, rtol=1e-5)


def test_the_router_loss_of_experts_counts_whole_under_accumulation(trl: ModuleType, tmp_path: Path) -> None:
    """TRL divides it by the micro-batches of a step; the probe's micro-batches are steps of their own."""
    generator = torch.Generator().manual_seed(2)
    rows = Dataset.from_list([{"text": tiny_trl.words(7, generator)} for _ in range(4)])
    trainer = make(
        trl,
        "text",
        "callback",
        tmp_path,
        model=tiny.with_lora(tiny.qwen3_moe(), target_modules=["q_proj", "v_proj"]),
        rows=rows,
        router_aux_loss_coef=0.5,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
    )
    found, _ = probe(trainer, num_samples=4)
    plain = tiny.qwen3_moe()
    ids = torch.tensor(trainer.train_dataset["input_ids"])

    def loss() -> Tensor:
        outputs = plain(input_ids=ids, attention_mask=torch.ones_like(ids), output_router_logits=True)
        tokens = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return tokens + 0.5 * outputs.aux_loss

    assert_equal_gradients(found, reference.whole_sample_gradient(plain, list(found), loss))


# --- the reference of DPO ------------------------------------------------------------------------------------------


def reference_logps(trainer: Any) -> Tensor:
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    return torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))


def base_logps(trainer: Any) -> Tensor:
    rows, base = trainer.train_dataset.select(range(4)).to_list(), tiny.llama()
    columns = ("chosen_ids", "rejected_ids")
    with torch.no_grad():
        return torch.stack([completion_logp(base, row["prompt_ids"], row[c]) for c in columns for row in rows])


@both_ways
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_the_reference_is_the_base_from_the_first_step_to_the_last(
    trl: ModuleType, init: str, wrapped: bool, way: str, tmp_path: Path
) -> None:
    """Given a PeftModel, TRL adds a copy of its adapter as the reference, before the start is written."""
    model = {"model": tiny.with_lora(tiny.llama(), **LORA)} if wrapped else {}
    trainer = make(trl, "dpo", way, tmp_path, {"init": init}, max_steps=4, **model)
    assert set(trainer.model.peft_config) == ({"default", "ref"} if wrapped else {"default"})
    before = reference_logps(trainer)
    torch.testing.assert_close(before, base_logps(trainer), rtol=1e-5, atol=1e-5)
    trainer.train()
    assert torch.equal(reference_logps(trainer), before)
    first, *_, last = (log for log in trainer.state.log_history if "rewards/margins" in log)
    names = ("rewards/margins", "rewards/chosen", "rewards/rejected")
    if init == "lora_ga":
        assert [first[name] for name in names] == [0.0, 0.0, 0.0]
    else:  # a step away from the base already, on the side of the chosen answers
        assert first["rewards/margins"] > 0
    assert last["rewards/margins"] != 0
    if wrapped:
        trainer.model.set_adapter("ref")
        assert torch.equal(logits_of(trainer.model), logits_of(tiny.llama()))


def test_dpo_after_sft_on_one_anchored_adapter_refers_to_what_sft_made(trl: ModuleType, tmp_path: Path) -> None:
    """TRL copies the anchored factors into a plain adapter of rank 2r, which is the same function."""
    sft = make(trl, "completion", "mixin", tmp_path / "sft", max_steps=4)
    sft.train()
    sft.save_model()
    model = load_adapter(tiny.llama(), tmp_path / "sft")
    made = logits_of(sft.model)
    dpo = make(trl, "dpo", "mixin", tmp_path / "dpo", model=model, max_steps=4)
    assert torch.equal(logits_of(dpo.model), made)
    before = adapter_of(dpo)
    dpo.train()
    assert dpo.lora_ga_report is None, "it continues without a probe"
    logs = [log for log in dpo.state.log_history if "rewards/margins" in log]
    assert (logs[0]["rewards/chosen"], logs[0]["rewards/rejected"]) == (0.0, 0.0)
    assert logs[-1]["rewards/margins"] != 0
    after = adapter_of(dpo)
    for layer in find_adapted_layers(dpo.model):
        name = f"base_model.model.{layer.name}"
        A, B = f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"
        upper, lower = (after[A] - before[A]).chunk(2)
        torch.testing.assert_close(upper, lower, rtol=0, atol=1e-7)
        assert torch.equal(after[B][:, layer.stored_rank // 2 :], before[B][:, layer.stored_rank // 2 :])
        assert not torch.equal(after[A], before[A])
    dpo.save_model()
    trained = logits_of(dpo.model)
    dpo.model.set_adapter("ref")
    assert torch.equal(logits_of(dpo.model), made)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "dpo")
    assert torch.equal(logits_of(stock), trained)


@pytest.mark.usefixtures("unpacked_codes")
@pytest.mark.parametrize("case", ["completion", "dpo"])
def test_a_base_that_trl_quantises_is_the_function_of_step_zero(trl: ModuleType, case: str, tmp_path: Path) -> None:
    """Given a name and a quantisation TRL loads the base itself, and turns the adapter into bf16."""
    optional.require("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    trainer = make(
        trl,
        case,
        "mixin",
        tmp_path / "out",
        model=str(tiny_trl.save_model(tmp_path / "base")),
        model_init_kwargs={"dtype": "float32"},
        passed={"quantization_config": config, "peft_config": tiny_trl.lora(**LORA)},
    )
    look = AtStepZero()
    trainer.add_callback(look)
    trainer.train()
    with trainer.model.disable_adapter():
        assert torch.equal(look.logits, logits_of(trainer.model))
    assert not torch.equal(look.logits, logits_of(trainer.model))
    assert {parameter.dtype for parameter in adapter_of(trainer).values()} == {torch.bfloat16}
    assert {layer.action for layer in trainer.lora_ga_report.layers} == {"initialised"}


# --- folders, streams, processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["packing", "dpo"])
def test_two_steps_and_a_resume_of_two_are_four_steps(trl: ModuleType, case: str, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make(trl, case, "mixin", tmp_path / "whole", **changes)
    whole.train()
    resumed = make(trl, case, "mixin", tmp_path / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.lora_ga_report is None
    assert_bitwise(adapter_of(whole), adapter_of(resumed))
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "resumed" / "checkpoint-4")
    assert torch.equal(logits_of(stock), logits_of(whole.model))


def test_an_adapter_of_experts_loads_on_the_clean_base_after_sft(trl: ModuleType, tmp_path: Path) -> None:
    """SFTTrainer turns the router loss on in the model's config, which says nothing about the weights."""
    experts = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    base = tiny.qwen3_moe()
    assert not base.config.output_router_logits
    trainer = make(trl, "text", "mixin", tmp_path, model=tiny.with_lora(base, **experts), gradient_checkpointing=False)
    assert base.config.output_router_logits
    trainer.train()
    trainer.save_model()
    again = load_adapter(tiny.qwen3_moe(), tmp_path)
    assert torch.equal(logits_of(again), logits_of(trainer.model))


@both_ways
@pytest.mark.parametrize(("case", "init"), [("text", "none"), ("dpo", "lora_ga"), ("grpo", "lora_ga")])
def test_b_alone_is_trained(trl: ModuleType, case: str, init: str, way: str, tmp_path: Path) -> None:
    trainer = make(trl, case, way, tmp_path, {"train_A": False, "init": init})
    started: dict[str, tuple[Tensor, Tensor]] = {}
    factors = lambda: {
        layer.name: (layer.stored_A.detach().clone(), layer.stored_B.detach().clone())
        for layer in find_adapted_layers(trainer.model)
    }

    class Keep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not started:
                started.update(factors())

    trainer.add_callback(Keep())
    trainer.train()
    for name, (A, B) in factors().items():
        assert torch.equal(A, started[name][0])
        assert not torch.equal(B, started[name][1])


def test_a_streamed_and_a_worker_read_dataset_give_the_same_start(trl: ModuleType, tmp_path: Path) -> None:
    rows = tiny_trl.dataset(16, "prompt", "completion")
    order = {"train_sampling_strategy": "sequential"}
    start = {"probe_order": "train"}  # a stream has no other one
    made = functools.partial(make, trl, "completion", "mixin")
    runs = {
        "plain": made(tmp_path / "a", start, rows=rows, **order),
        "stream": made(tmp_path / "b", start, rows=rows.to_iterable_dataset()),
        "workers": made(tmp_path / "c", start, rows=rows, dataloader_num_workers=2, **order),
    }
    for trainer in runs.values():
        trainer.train()
    plain = runs.pop("plain")
    for trainer in runs.values():
        assert trainer.lora_ga_report.items == plain.lora_ga_report.items
        assert trainer.lora_ga_report.layers == plain.lora_ga_report.layers


TWO = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
assert os.environ["WORLD_SIZE"] == "2"
import trl
from test_trl import START, make
for case in {cases!r}:
    order = {{}} if case == "grpo" else {{"train_sampling_strategy": "sequential"}}
    trainer = make(trl, case, "mixin", {folder!r}, START, per_device_train_batch_size=2, **order)
    trainer.train()
    place = {folder!r} + f"/{{case}}{{trainer.accelerator.process_index}}"
    trainer.lora_ga_report.to_json(place + ".json")
    torch.save({{n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}}, place + ".pt")
from processes import end_processes
end_processes()
"""
START = {"num_samples": 12, "estimator": "exact"}
TOGETHER = ("completion", "packing", "dpo", "grpo")


@pytest.mark.slow
def test_two_processes_give_the_start_of_one(trl: ModuleType, tmp_path: Path) -> None:
    """But for GRPO, whose processes write with random numbers of their own."""
    two = tmp_path / "two"
    two.mkdir()
    script = tmp_path / "run.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), folder=str(two), cases=TOGETHER))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29633"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for case in TOGETHER:
        ranks = [torch.load(two / f"{case}{rank}.pt", weights_only=True) for rank in range(2)]
        assert_bitwise(*ranks)
        report = json.loads((two / f"{case}0.json").read_text())
        if case == "grpo":
            assert report["samples"] == 12
            continue
        one = make(trl, case, "mixin", tmp_path / case, START, train_sampling_strategy="sequential")
        one.train()
        expected = one.lora_ga_report
        assert (report["samples"], report["items"]) == (12, expected.items), case
        for ours, theirs in zip(expected.layers, report["layers"], strict=True):
            assert ours.singular_values == pytest.approx(theirs["singular_values"], rel=1e-4), case


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["use_vllm", "rollout_func", "environment_factories", "tools"])
def test_samples_with_a_state_elsewhere_are_refused_unless_a_file_has_the_gradients(
    trl: ModuleType, name: str, tmp_path: Path
) -> None:
    trainer = make(trl, "grpo", "plain", tmp_path)
    setattr(trainer, name, [len])
    config = LoRAGAConfig(num_samples=8, probe_file=str(tmp_path / "probe.safetensors"))
    with pytest.raises(ValueError, match=rf"{name} is set: GRPOTrainer .*probe_file=.*init='none'"):
        LoRAGACallback(trainer, config)
    assert trainer.model.peft_config["default"].r == 4, "refused before anything was changed"
    LoRAGACallback(trainer, LoRAGAConfig(init="none"))

    first = make(trl, "grpo", "mixin", tmp_path / "first", {"probe_file": config.probe_file}, max_steps=1)
    first.train()
    trainer.add_callback(LoRAGACallback(trainer, config))
    setattr(trainer, name, None if name != "tools" else [])  # the real thing would need a server
    calls, compute = [], trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs)
    trainer.train()
    assert len(calls) == 4, "two steps of two micro-batches, and no probe"


def test_an_adapter_given_twice_is_trls_own_error(trl: ModuleType, tmp_path: Path) -> None:
    mine = type("Mine", (LoRAGAMixin, trl.SFTTrainer), {})
    with pytest.raises(ValueError, match="PeftModel"):
        mine(
            tiny.with_lora(tiny.llama()),
            args=trl.SFTConfig(**tiny_trl.settings(tmp_path)),
            train_dataset=tiny_trl.dataset(8, "text"),
            processing_class=tiny_trl.tokenizer(),
            peft_config=tiny_trl.lora(),
        )


def test_a_trainer_without_an_adapter_says_how_to_give_one(trl: ModuleType, tmp_path: Path) -> None:
    mine = type("Mine", (LoRAGAMixin, trl.SFTTrainer), {})
    with pytest.raises(ValueError, match="Pass `peft_config=LoraConfig"):
        mine(
            tiny.llama(),
            args=trl.SFTConfig(**tiny_trl.settings(tmp_path)),
            train_dataset=tiny_trl.dataset(8, "text"),
            processing_class=tiny_trl.tokenizer(),
        )


def test_a_reward_that_never_differs_starts_plain_and_is_warned_of(
    trl: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "reward", lambda completions, **_: [1.0] * len(completions))
    trainer = make(trl, "grpo", "mixin", tmp_path, beta=0.0)
    with caplog.at_level("WARNING", logger="lora_ga_trainer"):
        trainer.train()
    assert "0 layers initialised, 14 left plain" in caplog.text


# --- experts under losses with a reference --------------------------------------------------------------------------


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]}


def experts_trainer(trl: ModuleType, kind: str, wrapped: bool, folder: Path, **changes: Any) -> Any:
    """The reference is the model with the adapter off, or, given a PeftModel, a second adapter that TRL adds."""
    torch.manual_seed(7)
    model = tiny.qwen3_moe()
    lora = tiny_trl.lora(r=2, lora_dropout=0.0, **EXPERTS)
    given = {"model": get_peft_model(model, lora)} if wrapped else {"model": model, "passed": {"peft_config": lora}}
    if kind == "kto":
        rows = tiny_trl.dataset(8, "prompt", "completion").to_list()
        given["rows"] = Dataset.from_list([row | {"label": i % 3 > 0} for i, row in enumerate(rows)])
    settings = {"train_sampling_strategy": "sequential", "gradient_checkpointing": False} | changes
    return make(trl, kind, "mixin", folder, **given, **settings)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_experts_get_the_gradient_of_the_policy(trl: ModuleType, kind: str, wrapped: bool, tmp_path: Path) -> None:
    trainer = experts_trainer(trl, kind, wrapped, tmp_path)
    found, _ = probe(trainer, num_samples=8)
    assert any("experts" in name for name in found)
    assert_equal_gradients(found, true_gradients(trainer, 2), rtol=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_experts_train_under_losses_with_a_reference(trl: ModuleType, kind: str, tmp_path: Path) -> None:
    trainer = experts_trainer(trl, kind, False, tmp_path, gradient_checkpointing=kind != "grpo")
    trainer.train()
    started = [layer.name for layer in trainer.lora_ga_report.layers if not layer.action.is_plain]
    assert any("experts" in name for name in started)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
