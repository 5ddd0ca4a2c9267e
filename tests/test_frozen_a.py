"""Training `B` alone: `A` stays, the step of `B` is that of a twin, and the problem is convex."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import reference
import tiny
import torch
from peft import LoraConfig, PeftModel
from test_trainer import assert_bitwise
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGATrainer, find_adapted_layers, load_adapter
from lora_ga_trainer.adapters.frozen import FrozenLinear, train_both_or_B
from lora_ga_trainer.starts.prepare import prepare_adapter


FROZEN = {"num_samples": 8, "estimator": "exact", "train_A": False}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
INITS = ["none", "lora_ga", "lora_one"]


class Keep(TrainerCallback):
    """Remembers the factors that training begins with, behind the start."""

    def __init__(self) -> None:
        self.A: dict[str, Tensor] = {}
        self.B: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if not self.A:
            self.A, self.B = factors_of(model)


def factors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    layers = find_adapted_layers(model)
    return tuple(
        {layer.name: getattr(layer, of).detach().clone() for layer in layers} for of in ("stored_A", "stored_B")
    )


def swap(folder: Any, lora_ga: dict[str, Any], lora: dict[str, Any] | None = None, **changes: Any) -> LoRAGATrainer:
    torch.manual_seed(11)
    model, rows = changes.pop("model", None) or tiny.llama(), changes.pop("rows", None) or tiny.causal_rows(24)
    return LoRAGATrainer(
        model,
        tiny.arguments(folder, **({"weight_decay": 0.1} | changes)),
        train_dataset=rows,
        peft_config=LoraConfig(**(LORA | (lora or {}))),
        lora_ga_config=LoRAGAConfig(**(FROZEN | lora_ga)),
        callbacks=[Keep()],
    )


def kept(trainer: Trainer) -> Keep:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Keep))


def one_layer() -> tuple[nn.Module, Any]:
    """Return an adapted model of one linear layer `(7, 9)` in fp64, and the layer."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 7, bias=False, dtype=torch.float64))
    model = tiny.with_lora(base, target_modules=["0"], r=3, lora_alpha=6).double()
    train_both_or_B(model, False, "none")
    return model, find_adapted_layers(model)[0]


# --- the step and the problem ----------------------------------------------------------------------------------------


def test_a_hundred_steps_are_those_of_the_twin_in_fp64() -> None:
    model, layer = one_layer()
    x, y = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    W, A = layer.weight.detach().clone(), layer.stored_A.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = W + layer.s * layer.stored_B.detach() @ A
    theirs = reference.frozen_A_training(W, A, layer.s, lambda w: (x @ w.T - y).square().mean(), 100, lr=1e-2)
    assert (ours - W).norm() > 0.1 * W.norm(), "the test must move the weight"
    assert (ours - theirs).norm() < 1e-12 * (ours - W).norm()
    assert torch.equal(layer.stored_A, A)


LOSSES = {
    "squares": lambda out, y: (out - y).square().mean(),
    "cross entropy": lambda out, y: cross_entropy(out, y.argmax(dim=1)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_loss_is_convex_in_b_and_is_not_in_both_factors(loss: Any) -> None:
    model, layer = one_layer()
    x, y = torch.randn(40, 9, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)

    @torch.no_grad()
    def at(B: Tensor, A: Tensor) -> float:
        layer.stored_B.copy_(B)
        layer.stored_A.copy_(A)
        return loss(model(x), y).item()

    A = layer.stored_A.detach().clone()
    for share in (0.1, 0.5, 0.8):
        for _ in range(30):
            one, other = 3 * torch.randn(2, 7, 3, dtype=torch.float64)
            between, ends = at(share * one + (1 - share) * other, A), (at(one, A), at(other, A))
            assert between < share * ends[0] + (1 - share) * ends[1]
    # The same change twice, from factors of the other sign. Half-way lies no change at all, which fits worse.
    change = torch.linalg.lstsq(x, y).solution.T - layer.weight.detach()
    U, S, Vt = torch.linalg.svd(change / layer.s)
    B, A = U[:, :3] * S[:3], Vt[:3]
    assert at(0 * B, 0 * A) > (at(B, A) + at(-B, -A)) / 2 + 1e-2


@pytest.mark.parametrize("init", ["none", "lora_ga"])
def test_the_first_step_is_that_of_the_gradient_of_the_weight(init: str, tmp_path: Any) -> None:
    """One step of SGD from `B = 0`: `B = -lr s G A^T`."""
    rows = tiny.causal_rows(4)
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "learning_rate": 0.5, "weight_decay": 0.0}
    trainer = swap(tmp_path, {"init": init}, rows=rows, lr_scheduler_type="constant", **settings)
    plain = tiny.llama().double()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    layers = find_adapted_layers(trainer.model)
    G = reference.whole_sample_gradient(plain, [layer.name for layer in layers], lambda: plain(**batch).loss)
    trainer.train()
    for layer in layers:
        expected = -0.5 * layer.s * G[layer.name] @ layer.stored_A.detach().double().T
        torch.testing.assert_close(layer.stored_B.detach().double(), expected, rtol=1e-3, atol=1e-6)


# --- what stays, what is kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_a_stays_to_the_bit_through_training_saving_loading_and_a_resume(init: str, tmp_path: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = swap(tmp_path / "whole", {"init": init}, **settings)
    whole.train()
    start, (A, B) = kept(whole), factors_of(whole.model)
    assert_bitwise(A, start.A)
    assert all(not torch.equal(value, start.B[name]) for name, value in B.items())
    resumed = swap(tmp_path / "resumed", {"init": init}, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for ours, theirs in zip(factors_of(resumed.model), (A, B), strict=True):
        assert_bitwise(ours, theirs)
    assert_bitwise(kept(resumed).A, start.A)
    folder = tmp_path / "whole" / "checkpoint-4"
    stock = PeftModel.from_pretrained(tiny.llama(), folder).eval()
    row = tiny.causal_rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(stock(row).logits, whole.model.eval()(row).logits)
    if init == "none":
        loaded = PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)
    else:
        loaded = load_adapter(tiny.llama(), folder)
    trainer = LoRAGATrainer(
        loaded,
        tiny.arguments(tmp_path / "more", weight_decay=0.1),
        train_dataset=tiny.causal_rows(24),
        lora_ga_config=LoRAGAConfig(**FROZEN, init=init),
    )
    trainer.train()
    assert trainer.lora_ga_report is None
    more_A, more_B = factors_of(loaded)
    assert_bitwise(more_A, A)
    assert all(not torch.equal(value, B[name]) for name, value in more_B.items())


@pytest.mark.parametrize("init", INITS)
def test_the_optimizer_holds_no_state_of_a(init: str, tmp_path: Any) -> None:
    trainer = swap(tmp_path, {"init": init})
    trainer.train()
    layers = find_adapted_layers(trainer.model)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(layer.stored_B) for layer in layers}
    moments = [v for state in trainer.optimizer.state.values() for name, v in state.items() if name != "step"]
    # Two moments in fp32 of B alone; with A trained they would be those of A as well.
    assert sum(v.nbytes for v in moments) == 2 * 4 * sum(layer.shape[0] * layer.rank for layer in layers)


def test_the_callback_alone_gives_the_same_training(tmp_path: Any) -> None:
    ours = swap(tmp_path, {}, weight_decay=0.0)
    ours.train()
    torch.manual_seed(11)
    model = tiny.with_lora_seedless(tiny.llama(), **LORA)
    theirs = Trainer(model, tiny.arguments(tmp_path), train_dataset=tiny.causal_rows(24), callbacks=[Keep()])
    theirs.add_callback(LoRAGACallback(theirs, LoRAGAConfig(**FROZEN)))
    theirs.train()
    assert_bitwise(kept(theirs).A, factors_of(model)[0])
    for left, right in zip(factors_of(ours.model), factors_of(model), strict=True):
        assert_bitwise(left, right)


# --- starts ----------------------------------------------------------------------------------------------------------


def test_lora_ga_gives_a_its_directions_and_needs_no_anchor(tmp_path: Any) -> None:
    frozen, anchored = swap(tmp_path, {}, max_steps=1), swap(tmp_path, {"train_A": True}, max_steps=1)
    frozen.train()
    anchored.train()
    for name, A in kept(frozen).A.items():
        r = LORA["r"]
        assert A.shape[0] == r
        assert torch.equal(A, kept(anchored).A[name][:r])
        assert not kept(frozen).B[name].any()
    report = frozen.lora_ga_report
    assert report.loss_after == report.loss_before
    assert not any(layer.is_anchored for layer in find_adapted_layers(frozen.model))


def test_rows_of_ones_own_stay_as_they_are(tmp_path: Any) -> None:
    """The paper's A: orthonormal rows at random."""
    trainer = swap(tmp_path, {"init": "none"})
    for layer in find_adapted_layers(trainer.model):
        nn.init.orthogonal_(layer.stored_A)
    trainer.train()
    for layer in find_adapted_layers(trainer.model):
        A = layer.stored_A.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(layer.rank), rtol=1e-5, atol=1e-5)
        assert torch.equal(A, kept(trainer).A[layer.name])
        assert layer.stored_B.any()


def test_lora_one_is_still_a_step_of_its_own(tmp_path: Any) -> None:
    frozen, free = (swap(tmp_path, {"init": "lora_one", "train_A": train}, max_steps=1) for train in (False, True))
    frozen.train()
    free.train()
    for mine, theirs in ((kept(frozen).A, kept(free).A), (kept(frozen).B, kept(free).B)):
        assert_bitwise(mine, theirs)
    assert all(value.any() for value in kept(frozen).B.values())


EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("model", "lora", "rows"),
    [
        (tiny.llama, {"use_dora": True}, tiny.causal_rows),
        (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, tiny.causal_rows),
        (tiny.llama, EMBEDDING, tiny.causal_rows),
        (tiny.qwen3_moe, EXPERTS, tiny.causal_rows),
        (tiny.bert, {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}, tiny.class_rows),
    ],
    ids=["dora", "conv1d", "embedding", "experts", "head"],
)
def test_every_kind_of_layer_keeps_its_a(init: str, model: Any, lora: Any, rows: Any, tmp_path: Any) -> None:
    if lora is EMBEDDING and init == "none":
        with pytest.raises(ValueError, match=r"Layer model.embed_tokens: .* starts A at 0, so with train_A=False"):
            swap(tmp_path, {"init": init}, lora)
        return
    trainer = swap(tmp_path, {"init": init}, lora, model=model(), rows=rows(24))
    trainer.train()
    (A, B), start = factors_of(trainer.model), kept(trainer)
    assert_bitwise(A, start.A)
    still = {name for name in B if torch.equal(B[name], start.B[name])}
    assert still <= {"bert.pooler.dense"}
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any("lora_A" in name or "lora_embedding_A" in name for name in names)
    assert any("classifier" in name for name in names) == ("modules_to_save" in lora)


def test_models_made_anew_keep_their_a(tmp_path: Any) -> None:
    """Those of `model_init`, and those with planned ranks."""
    planned = swap(tmp_path, {"ranks": "auto", "rank_rule": "uniform"})
    planned.train()
    assert_bitwise(factors_of(planned.model)[0], kept(planned).A)
    made = LoRAGATrainer(
        None,
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(24),
        model_init=lambda: tiny.llama(),
        peft_config=LoraConfig(**LORA),
        lora_ga_config=LoRAGAConfig(**FROZEN),
        callbacks=[Keep()],
    )
    made.train()
    assert_bitwise(factors_of(made.model)[0], kept(made).A)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"correction": "lora_pro"},
        {"correction": "lora_pro_adamw"},
        {"loraplus_lr_ratio": 16.0},
        {"riemannian_reg": 0.1},
    ],
)
def test_what_steps_both_factors_is_refused(other: dict[str, Any]) -> None:
    name = next(iter(other))
    with pytest.raises(ValueError, match=rf"train_A=False leaves B alone .* {name}=.* steps A and B together"):
        LoRAGAConfig(train_A=False, init="none", **other)


def test_train_a_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="train_A='no' must be True or False"):
        LoRAGAConfig(train_A="no")


@pytest.mark.parametrize("train_A", [True, False])
def test_an_adapter_prepared_or_saved_with_an_anchor_is_not_continued_without(train_A: bool, tmp_path: Any) -> None:
    config = LoRAGAConfig(**(FROZEN | {"train_A": train_A}))
    other = replace(config, train_A=not train_A)
    model = tiny.with_lora(tiny.llama())
    prepare_adapter(model, config)
    with pytest.raises(ValueError, match=rf"prepared, .* for train_A={train_A}, the config has train_A={not train_A}"):
        prepare_adapter(model, other)
    trainer = swap(tmp_path / "first", {"train_A": train_A}, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    second = swap(tmp_path / "second", {"train_A": not train_A})
    with pytest.raises(ValueError, match=f"trained with anchored={train_A}, this run has anchored={not train_A}"):
        second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (nn.Linear(4, 6), (3, 4)),
        (nn.Conv1d(4, 6, 3), (3, 4, 8)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 8, 8)),
        (nn.Conv3d(4, 6, 2), (3, 4, 4, 4, 4)),
    ],
    ids=["linear", "conv1d", "conv2d", "conv3d"],
)
def test_a_is_a_constant_of_the_forward_pass_whatever_peft_says(base: nn.Module, shape: Any) -> None:
    model = tiny.with_lora(nn.Sequential(base), target_modules=["0"])
    (layer,) = find_adapted_layers(model)
    nn.init.normal_(layer.stored_B)
    x = torch.randn(shape)
    before, kind = model(x), type(layer.lora_A)
    train_both_or_B(model, False, "none")
    model.set_adapter("default")
    after = copy.deepcopy(model)(x)
    assert torch.equal(after, before)
    model(x).square().sum().backward()
    assert layer.stored_A.grad is None
    assert layer.stored_B.grad.any()
    train_both_or_B(model, True, "none")
    assert type(layer.lora_A) is kind
    model(x).square().sum().backward()
    assert layer.stored_A.grad.any()


class SetAdapter(TrainerCallback):
    """Does in every step what a loss with a reference adapter does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        model.set_adapter("default")
        with model.disable_adapter():
            pass


def test_peft_lets_no_a_of_a_linear_layer_train_again(tmp_path: Any) -> None:
    trainer = swap(tmp_path, {"init": "none"})
    trainer.add_callback(SetAdapter())
    trainer.train()
    plain = swap(tmp_path, {"init": "none"})
    plain.train()
    for left, right in zip(factors_of(trainer.model), factors_of(plain.model), strict=True):
        assert_bitwise(left, right)
    losses = lambda t: [(log["loss"], log["grad_norm"]) for log in t.state.log_history if "loss" in log]
    assert losses(trainer) == losses(plain)


def test_an_a_that_something_lets_train_is_named(tmp_path: Any) -> None:
    trainer = swap(tmp_path, {"init": "lora_ga"}, EMBEDDING)
    trainer.add_callback(SetAdapter())
    with pytest.raises(ValueError, match=r"Layer model.embed_tokens: train_A=False, and its A has a gradient"):
        trainer.train()
    assert_bitwise(factors_of(trainer.model)[0], kept(trainer).A)


def test_a_later_trainer_may_train_both_again(tmp_path: Any) -> None:
    trainer = swap(tmp_path, {})
    trainer.train()
    A, _ = factors_of(trainer.model)
    assert all(type(layer.lora_A) is FrozenLinear for layer in find_adapted_layers(trainer.model))
    LoRAGATrainer(
        trainer.model,
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(24),
        lora_ga_config=LoRAGAConfig(**(FROZEN | {"train_A": True})),
    ).train()
    assert all(type(layer.lora_A) is nn.Linear for layer in find_adapted_layers(trainer.model))
    assert all(not torch.equal(value, A[name]) for name, value in factors_of(trainer.model)[0].items())
