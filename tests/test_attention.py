"""`nn.MultiheadAttention` adapted by PEFT: the output is PEFT's to the bit, the laws are those of linear layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import reference
import tiny
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora.layer import MultiheadAttention
from spy import Spy
from test_probe import assert_equal_gradients, exact, in_order, probe
from torch import Tensor, nn
from transformers import Trainer

from lora_ga_trainer import (
    LoRAGACallback,
    LoRAGAConfig,
    LoRAGATrainer,
    LoRAProOptimizer,
    estimate_gradients,
    export_adapter,
    load_adapter,
)
from lora_ga_trainer.adapters.attention import Attention, times_out_proj_counts
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.adapters.layer import AdaptedLayer
from lora_ga_trainer.gradients.tap import tapped_parameters
from lora_ga_trainer.maths.inits import INITS, Init
from lora_ga_trainer.saving.record import record_of_model
from lora_ga_trainer.starts.prepare import prepare_adapter
from lora_ga_trainer.starts.report import Action


NAMES = ["attention.in_proj_weight", "attention.out_proj"]


class Block(nn.Module):
    """A pre-norm block as CLIP's vision tower has it, between a projection of patches and a classifier."""

    def __init__(self, batch_first: bool = True, size: int = 8, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first, self.checkpoints = batch_first, False
        self.embed, self.norm, self.head = nn.Linear(6, size), nn.LayerNorm(size), nn.Linear(size, 4)
        self.attention = nn.MultiheadAttention(size, 2, batch_first=batch_first, **options)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        attend = lambda h: self.attention(h, h, h, need_weights=False)[0]
        if self.checkpoints:
            h = h + torch.utils.checkpoint.checkpoint(attend, self.norm(h), use_reentrant=self.checkpoints == "re")
        else:
            h = h + attend(self.norm(h))
        logits = self.head(torch.tanh(h if self.batch_first else h.transpose(0, 1)).mean(1))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


class Encoder(nn.Module):
    """`nn.TransformerEncoder`, which evaluates its layers by one fused function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.encoder(self.embed(x)).mean(1))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def rows(count: int = 9) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(5, 6, generator=generator), "labels": i % 4} for i in range(count)]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack([row["x"] for row in rows()]).to(dtype)


def with_lora(model: nn.Module, **changes: Any) -> PeftModel:
    settings = {"r": 2, "lora_alpha": 3, "target_modules": ["attention", "embed"]} | changes
    return tiny.with_lora(model, **settings)


def attention_of(model: Any) -> Any:
    return model.get_base_model().attention


def projections(model: nn.Module) -> list[AdaptedLayer]:
    return [layer for layer in find_adapted_layers(model) if layer.name in NAMES]


def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(inputs(dtype))["logits"]


@torch.no_grad()
def evaluated(model: nn.Module) -> Tensor:
    return output(model.eval())


def trained(folder: Any, make: Callable[[], nn.Module] = Block, **changes: Any) -> LoRAGATrainer:
    config = LoRAGAConfig(**({"num_samples": 8, "estimator": "exact"} | changes.pop("lora_ga", {})))
    lora = changes.pop("lora", {})
    arguments = tiny.arguments(folder, **({"learning_rate": 1e-2} | changes))
    trainer = LoRAGATrainer(with_lora(make(), **lora), arguments, train_dataset=rows(16), lora_ga_config=config)
    trainer.train()
    return trainer


def started(dtype: torch.dtype = torch.float64, **changes: Any) -> PeftModel:
    """An anchored model whose factors hold a random start and have moved, the two halves of `A` alike."""
    model = with_lora(Block().to(dtype), **changes).to(dtype)
    prepare_adapter(model, LoRAGAConfig())
    generator = torch.Generator().manual_seed(3)
    for layer in find_adapted_layers(model):
        draw = lambda *shape: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        (out, inner), r = layer.shape, layer.rank
        tiny.write_start(layer, draw(out, r), draw(r, inner))
        with torch.no_grad():
            layer.stored_A.add_(draw(r, inner).repeat(2, 1))
            layer.stored_B[:, :r].add_(draw(out, r))
    record_of_model(model).initialised = True
    return model


def as_peft_computes(model: nn.Module) -> Any:
    """A copy whose attention is the class of PEFT itself, with plain factors of the same numbers."""
    twin: Any = copy.deepcopy(model)
    attention = attention_of(twin)
    attention.__class__ = MultiheadAttention
    for module in (attention, attention.base_layer.out_proj):
        for side in (module.lora_A, module.lora_B):
            side["default"].__class__ = nn.Linear
    return twin


def adapted_weights(model: nn.Module) -> dict[str, Tensor]:
    """`W + s B A` of both projections, as leaves."""
    net = lambda layer: layer.weight + layer.s * layer.stored_B @ layer.stored_A
    return {layer.name: net(layer).detach().requires_grad_() for layer in projections(model)}


def written_out(model: Any, weights: dict[str, Tensor]) -> Tensor:
    """The output of the model with the given weights of its attention, by a plain model."""
    plain = copy.deepcopy(model).get_base_model()
    if hasattr(plain.embed, "merge"):
        plain.embed.merge()
    state = {name.replace("base_layer.", ""): value for name, value in plain.state_dict().items()}
    base = Block().double()
    base.load_state_dict({name: value for name, value in state.items() if "lora_" not in name})
    values = {"attention.in_proj_weight": weights[NAMES[0]], "attention.out_proj.weight": weights[NAMES[1]]}
    return torch.func.functional_call(base, values, (inputs(torch.float64),))["logits"]


# --- What PEFT computes ------------------------------------------------------------------------------------------


def test_plain_peft_trains_both_projections_and_moves_the_base() -> None:
    """Why there is a class of our own: PEFT adds `s B A` to the weight and subtracts it again, with two roundings."""
    model = with_lora(Block(), init_lora_weights=False).train()
    before = attention_of(model).in_proj_weight.clone()
    output(model).square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "attention" in name and p.requires_grad}
    assert len(gradients) == 4
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    assert not torch.equal(attention_of(model).in_proj_weight, before)
    torch.testing.assert_close(attention_of(model).in_proj_weight, before)


def test_peft_adds_the_change_of_out_proj_as_often_as_counted() -> None:
    """PEFT 0.21 adds it twice (huggingface/peft#3774)."""
    model = with_lora(Block().double(), init_lora_weights=False).double()
    weights = {}
    for layer in projections(model):
        times = times_out_proj_counts() if layer.name == NAMES[1] else 1
        weights[layer.name] = layer.weight + times * layer.scaling * layer.stored_B @ layer.stored_A
        assert layer.s == times * layer.scaling
    torch.testing.assert_close(output(model, torch.float64), written_out(model, weights))


def test_counting_moves_no_random_number() -> None:
    times_out_proj_counts.cache_clear()
    before = torch.get_rng_state()
    assert times_out_proj_counts() in (1, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients", "merged", "off"])
def test_the_output_is_that_of_peft_to_the_bit(mode: str, dtype: torch.dtype) -> None:
    ours = started(dtype)
    theirs = as_peft_computes(ours)
    assert type(attention_of(ours)) is Attention
    assert type(attention_of(theirs)) is MultiheadAttention
    found = []
    for model in (ours, theirs):
        model.train(mode == "train")
        if mode == "merged":
            model.merge_adapter()
        with torch.set_grad_enabled(mode == "train"):
            if mode == "off":
                with model.disable_adapter():
                    found.append(output(model, dtype))
            else:
                found.append(output(model, dtype))
    assert torch.equal(*found)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "call",
    {
        "weights": lambda module, x: module(x, x, x),
        "weights of each head": lambda module, x: module(x, x, x, average_attn_weights=False),
        "masked": lambda module, x: module(x, x, x, key_padding_mask=torch.arange(5).expand(len(x), 5) > 3),
        "causal": lambda module, x: module(
            x, x, x, need_weights=False, is_causal=True, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1)
        ),
        "other keys": lambda module, x: module(x, x.flip(0), value=x.flip(1)),
        "no batch": lambda module, x: module(x[0], x[0], x[0]),
    }.values(),
    ids=["weights", "weights of each head", "masked", "causal", "other keys", "no batch"],
)
def test_every_way_to_call_it_gives_what_peft_gives(call: Any, training: bool, grad: bool) -> None:
    ours = started(torch.float32).train(training)
    theirs = as_peft_computes(ours)
    x = torch.randn(9, 5, 8, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad):
        found, expected = call(attention_of(ours), x), call(attention_of(theirs), x)
    assert torch.equal(found[0], expected[0])
    assert found[1] is expected[1] or torch.equal(found[1], expected[1])


def test_the_base_stays_to_the_bit_and_keeps_its_parameters() -> None:
    model = started(torch.bfloat16).train()
    before = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    for _ in range(3):
        output(model, torch.bfloat16).sum().backward()
        output(model.eval(), torch.bfloat16)
    model.state_dict()
    for name, parameter in model.named_parameters():
        assert parameter is before[name], name
        assert torch.equal(parameter, values[name]), name


# --- The gradient ------------------------------------------------------------------------------------------------


def true_gradients(model: nn.Module) -> dict[str, Tensor]:
    """One backward pass of the plain model over all rows."""
    labels = torch.tensor([row["labels"] for row in rows()])
    weights = {"embed": model.embed.weight, NAMES[0]: model.attention.in_proj_weight,
               NAMES[1]: model.attention.out_proj.weight}  # fmt: skip
    loss = model(inputs(model.embed.weight.dtype), labels)["loss"]
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def double_rows() -> list[dict[str, Any]]:
    return [row | {"x": row["x"].double()} for row in rows()]


@pytest.mark.parametrize("batch", [9, 4])
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_the_gradient_is_that_of_autograd(options: dict[str, Any], batch: int, tmp_path: Any) -> None:
    model = Block(**options).double()
    trainer = in_order(double_rows(), tmp_path, with_lora(copy.deepcopy(model)), per_device_train_batch_size=batch)
    found = probe(trainer, exact(), layers=find_adapted_layers(trainer.model))
    assert_equal_gradients(found, true_gradients(model), rtol=1e-6)


@pytest.mark.parametrize("kind", ["re", "non-reentrant"])
def test_checkpointed_attention_counts_once(kind: str, tmp_path: Any) -> None:
    model = with_lora(Block().double())
    attention = model.get_base_model()
    attention.checkpoints = kind
    found = probe(in_order(double_rows(), tmp_path, model), exact(), layers=find_adapted_layers(model))
    assert_equal_gradients(found, true_gradients(Block().double()), rtol=1e-6)


def test_a_trained_adapter_shows_the_gradient_of_the_sum() -> None:
    """`dL/dW` at `W + s B A`, with `s` as often as PEFT adds it; two uses of one attention add up."""
    model = started().train()
    layers = projections(model)
    weights = adapted_weights(model)
    loss = written_out(model, weights).square().sum() + (3 * written_out(model, weights)).sum()
    true = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    found = [torch.zeros(layer.shape, dtype=torch.float64) for layer in layers]
    places = [(layer.user, layer.base, layer.parameter_name) for layer in layers]
    with tapped_parameters(places, lambda index, dW: found[index].add_(dW)):
        (output(model, torch.float64).square().sum() + (3 * output(model, torch.float64)).sum()).backward()
        with torch.no_grad():
            output(model, torch.float64)
        with model.disable_adapter():
            output(model, torch.float64).sum()
    for layer, G in zip(layers, found, strict=True):
        torch.testing.assert_close(G, true[layer.name], rtol=1e-10, atol=1e-12)


def test_a_sketch_is_that_of_the_dense_gradient(tmp_path: Any) -> None:
    """The last 16 columns of the test matrices gather all samples."""
    model = Block(size=64).double()
    trainer = in_order(double_rows(), tmp_path, with_lora(copy.deepcopy(model), r=1), per_device_train_batch_size=9)
    config = LoRAGAConfig(num_samples=9, probe_order="train", estimator="sketch", sketch_size=2, min_energy_kept=None)
    estimators = estimate_gradients(trainer, config).estimators
    true = true_gradients(model)
    for name in NAMES:
        assert estimators[name].sketched
        state = {key: value.double() for key, value in estimators[name].state().items()}
        w, z = state["Omega"][:, -16:], state["Psi"][:, -16:]
        for found, expected in ((state["Y"][:, -16:], true[name] @ w), (state["Z"][:, -16:], true[name].T @ z)):
            assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_the_probe_leaves_no_trace(tmp_path: Any) -> None:
    """Neither in a prepared model nor in one as PEFT made it, whose forward pass rounds the base."""
    for model in (with_lora(Block(), init_lora_weights=False), started(torch.float32)):
        kind = type(attention_of(model))
        trainer = in_order(rows(), tmp_path, model)
        trainer.model.config = SimpleNamespace()
        before = Spy(trainer)
        estimate_gradients(trainer, exact(), layers=find_adapted_layers(model))
        Spy(trainer).assert_same(before)
        assert type(attention_of(model)) is kind


# --- Training ----------------------------------------------------------------------------------------------------


def test_the_gradients_of_the_factors_are_those_of_the_output() -> None:
    """`gA = s B^T G`, `gB = s G A^T` with `B = (B - B0) + B0`, after the factors have moved."""
    model = started()
    layers = projections(model)
    weights = adapted_weights(model)
    loss = written_out(model, weights).square().sum()
    true = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    output(model.train(), torch.float64).square().sum().backward()
    for layer in layers:
        G, r, A, B = true[layer.name], layer.rank, layer.stored_A.detach(), layer.stored_B.detach()
        whole_B = B[:, :r] + B[:, r:]
        torch.testing.assert_close(layer.stored_A.grad[:r], layer.s * whole_B.T @ G)
        torch.testing.assert_close(layer.stored_A.grad[r:], layer.s * whole_B.T @ G)
        torch.testing.assert_close(layer.stored_B.grad[:, :r], layer.s * G @ A[:r].T)
        assert not layer.stored_B.grad[:, r:].any()


@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0})],
)
def test_steps_are_those_of_lora_ga_on_a_changed_base(kind: Any, settings: dict[str, Any], steps: int) -> None:
    """Both weights become `W - s B0 A0` and plain factors start at `(B0, A0)`, in fp64."""
    model = with_lora(Block().double(), target_modules=["attention"]).double()
    prepare_adapter(model, LoRAGAConfig())
    layers = projections(model)
    changed, twins, starts = {}, {}, {}
    for layer in layers:
        (out, inner), r = layer.shape, layer.rank
        B0, A0 = 0.5 * torch.randn(out, r, dtype=torch.float64), 0.5 * torch.randn(r, inner, dtype=torch.float64)
        tiny.write_start(layer, B0, A0)
        changed[layer.name] = layer.weight.detach() - layer.s * B0 @ A0
        twins[layer.name], starts[layer.name] = (nn.Parameter(B0.clone()), nn.Parameter(A0.clone())), (B0, A0)
    theirs = kind([p for pair in twins.values() for p in pair], **settings)
    ours = kind([p for layer in layers for p in (layer.stored_A, layer.stored_B)], **settings)
    target = torch.randn(9, 4, dtype=torch.float64)
    for _ in range(steps):
        (output(model.train(), torch.float64) - target).square().mean().backward()
        net = {layer.name: changed[layer.name] + layer.s * torch.mm(*twins[layer.name]) for layer in layers}
        (written_out(model, net) - target).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    for layer in layers:
        (B, A), (B0, A0) = twins[layer.name], starts[layer.name]
        net = layer.s * (layer.stored_B @ layer.stored_A).detach()
        twin = layer.s * (B @ A - B0 @ A0).detach()
        assert twin.norm() > 1e-4
        assert (net - twin).norm() < 1e-12 * max(1.0, twin.norm().item())
        assert torch.equal(layer.stored_B.detach()[:, layer.rank :], B0)


def test_a_run_starts_at_the_base_and_leaves_base_and_b0_alone(tmp_path: Any) -> None:
    start = trained(tmp_path, max_steps=1, learning_rate=0.0).model
    torch.testing.assert_close(evaluated(start), evaluated(Block()), rtol=0, atol=1e-6)
    layers = {layer.name: layer for layer in projections(start)}
    assert all(layer.is_anchored and layer.stored_B.any() for layer in layers.values())
    model = trained(tmp_path).model
    base = Block()
    assert torch.equal(attention_of(model).in_proj_weight, base.attention.in_proj_weight)
    assert torch.equal(attention_of(model).out_proj.weight, base.attention.out_proj.weight)
    for layer in projections(model):
        before, r = layers[layer.name], layer.rank
        moved = layer.stored_A.detach() - before.stored_A.detach()
        assert moved.any()
        torch.testing.assert_close(moved[:r], moved[r:], rtol=0, atol=1e-6)
        assert torch.equal(layer.stored_B[:, r:], before.stored_B[:, r:])
        assert not torch.equal(layer.stored_B[:, :r], before.stored_B[:, :r])


def test_the_first_step_follows_the_gradient_as_lora_ga_promises(tmp_path: Any) -> None:
    """
    LoRA-GA, Theorem 3.1: `B0 B0^T G + G A0^T A0` is `c^2` times the best approximation of `G` of rank 2r.

    `scale="gd"` makes `c = 1 / s`, so that a step of SGD is a full gradient step there: `W - lr [G]_2r`.
    """
    model = with_lora(Block(), r=1, target_modules=["attention"])
    config = LoRAGAConfig(num_samples=8, estimator="exact", probe_order="train", scale="gd")
    settings = {"optim": "sgd", "learning_rate": 1e-3, "max_steps": 1, "max_grad_norm": 0.0}
    arguments = tiny.arguments(
        tmp_path, train_sampling_strategy="sequential", per_device_train_batch_size=8, **settings
    )
    trainer = LoRAGATrainer(model, arguments, train_dataset=rows(8), lora_ga_config=config)
    trainer.train()
    plain = Block()
    loss = plain(inputs()[:8], torch.tensor([i % 4 for i in range(8)]))["loss"]
    weights = [plain.attention.in_proj_weight, plain.attention.out_proj.weight]
    for layer, G in zip(projections(model), torch.autograd.grad(loss, weights), strict=True):
        net = (layer.s * layer.stored_B.double() @ layer.stored_A.double()).detach()
        assert (net + 1e-3 * reference.best_rank(G, 2)).norm() < 2e-3 * net.norm(), layer.name


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
@pytest.mark.parametrize("make", [Block, Encoder])
def test_whole_models_train_with_the_mixin_and_the_callback(make: Any, init: str, tmp_path: Any) -> None:
    targets = ["attention", "embed", "head"] if make is Block else ["self_attn", "linear1", "linear2", "embed"]
    # The mixin clips by a norm of its own.
    first = trained(tmp_path, make, lora={"target_modules": targets}, lora_ga={"init": init}, max_grad_norm=0.0)
    model = with_lora(make(), target_modules=targets)
    arguments = tiny.arguments(tmp_path, learning_rate=1e-2, max_grad_norm=0.0)
    second = Trainer(model, arguments, train_dataset=rows(16))
    config = LoRAGAConfig(num_samples=8, estimator="exact", init=init)
    second.add_callback(LoRAGACallback(second, config))
    second.train()
    actions = {layer.name: layer.action for layer in first.lora_ga_report.layers}
    assert not any(action is Action.UNREACHED for action in actions.values())
    for name, value in first.model.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


# --- Files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_saved_adapters_load_here_and_in_plain_peft_and_merge(init: str, tmp_path: Any) -> None:
    model = trained(tmp_path / "run", lora_ga={"init": init}).model
    expected = evaluated(model)
    # Where nothing is anchored PEFT computes, and has rounded the base meanwhile.
    is_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0.0 if init == "lora_ga" else 1e-6)
    assert not torch.allclose(expected, evaluated(Block()), atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    plain = PeftModel.from_pretrained(Block(), tmp_path / "saved")
    assert type(attention_of(plain)) is MultiheadAttention
    is_same(evaluated(plain), expected)
    again = load_adapter(Block(), tmp_path / "saved")
    is_same(evaluated(again), expected)
    assert type(attention_of(again)) is (Attention if init == "lora_ga" else MultiheadAttention)
    assert all(layer.is_anchored == (init == "lora_ga") for layer in projections(again))
    errors = export_adapter(model, tmp_path / "exported", 4)
    assert set(errors) == {*NAMES, "embed", "total"}
    exported = PeftModel.from_pretrained(Block(), tmp_path / "exported")
    torch.testing.assert_close(evaluated(exported), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        is_same(evaluated(model), evaluated(Block()))
    is_same(evaluated(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(evaluated(model), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(evaluated(model), expected, rtol=1e-5, atol=1e-6)
    for safe in (False, True):
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
        assert type(merged.attention) is nn.MultiheadAttention
        torch.testing.assert_close(evaluated(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_resuming_gives_the_same_run(init: str, tmp_path: Any) -> None:
    """To the bit where the start is anchored. Else PEFT computes, and the base of the whole run has been rounded."""
    lora_ga = {"num_samples": 8, "estimator": "exact", "init": init}
    whole = trained(tmp_path, save_strategy="steps", save_steps=2, lora_ga=lora_ga).model
    again = LoRAGATrainer(
        with_lora(Block()),
        tiny.arguments(tmp_path, learning_rate=1e-2),
        train_dataset=rows(16),
        lora_ga_config=LoRAGAConfig(**lora_ga),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in whole.named_parameters():
        ours = again.model.get_parameter(name)
        assert torch.equal(ours, parameter) if init == "lora_ga" else torch.allclose(ours, parameter, atol=1e-6), name


def test_an_adapter_without_a_wrapper_starts_saves_and_loads(tmp_path: Any) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["attention", "embed"])
    torch.manual_seed(5)
    model = inject_adapter_in_model(config, Block())
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path / "run", learning_rate=1e-2),
        train_dataset=rows(16),
        lora_ga_config=LoRAGAConfig(num_samples=8, estimator="exact"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(evaluated(load_adapter(Block(), tmp_path / "saved")), evaluated(model))


def test_a_second_adapter_has_a_start_of_its_own_and_leaves_the_first_alone(tmp_path: Any) -> None:
    model = trained(tmp_path).model
    expected = evaluated(model)
    model.add_adapter("second", LoraConfig(r=1, target_modules=["attention"]))
    model.set_adapter("second")
    config = LoRAGAConfig(num_samples=8)
    LoRAGATrainer(model, tiny.arguments(tmp_path), train_dataset=rows(16), lora_ga_config=config).train()
    assert all(layer.is_anchored and layer.rank == 1 for layer in find_adapted_layers(model))
    assert not torch.equal(evaluated(model), expected)
    model.set_adapter("default")
    assert torch.equal(evaluated(model), expected)


# --- Optimizers --------------------------------------------------------------------------------------------------


def test_lora_pro_is_right() -> None:
    """The net step is the one nearest to `G` of all that `s (B dA + dB A)` can be."""
    model = started()
    output(model.train(), torch.float64).square().sum().backward()
    layers = projections(model)
    expected, before = {}, {}
    weights = adapted_weights(model)
    loss = written_out(model, weights).square().sum()
    for layer, G in zip(layers, torch.autograd.grad(loss, list(weights.values())), strict=True):
        r, A, B = layer.rank, layer.stored_A.detach(), layer.stored_B.detach()
        factors = A[:r].clone(), (B[:, :r] + B[:, r:]).clone()
        expected[layer.name], before[layer.name] = reference.lora_pro_reference(*factors, G, layer.s), factors
    lr = 1e-6
    trained_ones = [p for p in model.parameters() if p.requires_grad]
    # Without a floor it is the theorem, however the lengths of the factors compare.
    optimizer = LoRAProOptimizer(torch.optim.SGD(trained_ones, lr=lr), model, floor=0.0)
    optimizer.step()
    for layer in layers:
        r, A, B = layer.rank, layer.stored_A.detach(), layer.stored_B.detach()
        (A_before, B_before) = before[layer.name]
        dA, dB = (A[:r] - A_before) / -lr, (B[:, :r] + B[:, r:] - B_before) / -lr
        net = layer.s * (B_before @ dA + dB @ A_before)
        assert (net - expected[layer.name]).norm() < 1e-6 * net.norm(), layer.name


@pytest.mark.parametrize("init", ["none", "lora_one"])
def test_lora_pro_refuses_an_attention_that_peft_computes_in_a_trainer_too(init: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"attention.*not a factor of a linear.*init='lora_ga'"):
        trained(tmp_path, lora_ga={"init": init, "correction": "lora_pro"})


def test_lora_pro_refuses_an_attention_that_peft_computes_by_name() -> None:
    """Of `out_proj` PEFT gives the gradient of another output than its own."""
    model = with_lora(Block(), init_lora_weights=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(ValueError, match=r"LoRAProOptimizer: .*attention.*not a factor of a linear.*init='lora_ga'"):
        LoRAProOptimizer(optimizer, model)


# --- Refused by name ---------------------------------------------------------------------------------------------


def test_peft_refuses_keys_of_another_size_itself() -> None:
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported"):
        with_lora(nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4)), target_modules=["0"])


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_a_bias_that_peft_never_trains_is_refused() -> None:
    model = with_lora(Block(), lora_bias=True, target_modules=["attention"])
    with pytest.raises(ValueError, match=r"attention\.in_proj_weight: PEFT never trains the bias.*lora_bias=False"):
        find_adapted_layers(model)


def test_an_init_that_needs_inputs_is_refused_before_the_probe(tmp_path: Any) -> None:
    factors: Any = functools.partial(lambda gradient: None)
    init = Init("", 1.0, anchored=False, pairs=1, factors=factors, needs=frozenset({"second_moments"}))
    with (
        mock.patch.dict(INITS, weighted=init),
        pytest.raises(ValueError, match=r"init='weighted' needs second_moments.*attention\.in_proj_weight.*another"),
    ):
        trained(tmp_path, lora_ga={"init": "weighted"})


def test_copies_of_data_parallel_are_refused() -> None:
    for layer in projections(started()):
        with pytest.raises(ValueError, match=rf"{layer.name}: nn.DataParallel.*2 GPUs.*accelerate launch"):
            layer.require_whole(2)


# --- nn.TransformerEncoderLayer ----------------------------------------------------------------------------------


def test_a_fused_evaluation_that_passes_the_adapter_by_is_named(caplog: Any, tmp_path: Any) -> None:
    """With plain PEFT as well, in eval mode torch reads the weights of the layers and nothing else."""
    model = trained(tmp_path, Encoder, lora={"target_modules": ["self_attn"]}).model
    assert "passes by the adapters in it" in caplog.text
    assert "encoder.layers.0" in caplog.text
    assert torch.equal(evaluated(model), evaluated(Encoder()))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert not torch.allclose(evaluated(model), evaluated(Encoder()), atol=1e-4)
        caplog.clear()
        prepare_adapter(with_lora(Encoder(), target_modules=["self_attn"]), LoRAGAConfig())
        assert "passes by" not in caplog.text
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
