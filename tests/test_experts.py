"""Fused experts: the gradient of every expert, a start for each, and anchoring in PEFT's interleaved layout."""

from __future__ import annotations

import copy
import json
import math
import weakref
from typing import Any

import pytest
import reference
import tiny
import torch
from peft import LoraConfig, PeftModel
from test_probe import assert_equal_gradients, causal_loss, in_order, stack
from torch import Tensor, nn

from lora_ga_trainer import (
    LoRAGAConfig,
    LoRAGATrainer,
    LoRAProOptimizer,
    estimate_gradients,
    export_adapter,
    load_adapter,
)
from lora_ga_trainer.adapters.find import find_adapted_layers, is_trained
from lora_ga_trainer.adapters.parameter import AdaptedExperts
from lora_ga_trainer.adapters.storage import (
    AnchoredExpertsA,
    AnchoredExpertsB,
    counted_gradients,
    join_A,
    join_B,
    split_A,
    split_B,
)
from lora_ga_trainer.gradients.estimate import NonFiniteGradient
from lora_ga_trainer.gradients.sketch import SketchedGradient, turn
from lora_ga_trainer.gradients.tap import tapped_parameters
from lora_ga_trainer.saving.record import record_of_model
from lora_ga_trainer.starts.prepare import prepare_adapter
from lora_ga_trainer.starts.report import Action
from lora_ga_trainer.starts.start import start_adapter


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
# Mixtral and Qwen3-MoE store (E, out, in), gpt-oss (E, in, out).
MODELS = {"qwen3_moe": tiny.qwen3_moe, "mixtral": tiny.mixtral, "gpt_oss": tiny.gpt_oss}


def adapted(make: Any = tiny.qwen3_moe, base: dict[str, Any] | None = None, **changes: Any) -> PeftModel:
    return tiny.with_lora(make(**(base or {})), **(LORA | changes))


def expert_layers(model: PeftModel) -> list[AdaptedExperts]:
    return [layer for layer in find_adapted_layers(model) if isinstance(layer, AdaptedExperts)]


def exact(**changes: Any) -> LoRAGAConfig:
    return LoRAGAConfig(**({"estimator": "exact", "num_samples": 9} | changes))


def true_gradients(
    make: Any, layers: list[Any], rows: list[dict[str, Any]], base: dict[str, Any] | None = None
) -> dict[str, Tensor]:  # name of a matrix -> (out, in)
    """Every gradient by one backward pass of a plain model in fp64, whose experts run in a Python loop."""
    plain = make(**(base or {})).double().eval()
    plain.set_experts_implementation("eager")
    fused = [layer.name for layer in layers if isinstance(layer, AdaptedExperts)]
    linear = [layer.name for layer in layers if not isinstance(layer, AdaptedExperts)]
    stacks = reference.whole_sample_parameter_gradient(plain, fused, lambda: causal_loss(plain, rows))
    found = {f"{name}[{e}]": G for name, stack in stacks.items() for e, G in enumerate(stack)}
    if linear:
        found |= reference.whole_sample_gradient(plain, linear, lambda: causal_loss(plain, rows))
    return found


def probed(trainer: Any, config: LoRAGAConfig) -> dict[str, Tensor]:
    estimators = estimate_gradients(trainer, config).estimators
    return {name: estimator.state()["G"].double() for name, estimator in estimators.items()}


class Stack(nn.Module):
    """Experts without a router: expert e maps its own rows of `x (E, n, in)`."""

    def __init__(self, W: Tensor) -> None:  # (E, out, in)
        super().__init__()
        self.weight = nn.Parameter(W)

    def forward(self, x: Tensor) -> Tensor:  # (E, n, in) -> (E, n, out)
        return x @ self.weight.mT


def stacked(W: Tensor, **changes: Any) -> tuple[PeftModel, AdaptedExperts]:
    settings = {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": ["0.weight"]} | changes
    model = tiny.with_lora(nn.Sequential(Stack(W.clone())), **settings).to(W.dtype)
    prepare_adapter(model, LoRAGAConfig())
    (layer,) = expert_layers(model)
    return model, layer


# --- PEFT's layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_shape_s_and_layout_describe_what_peft_adds_to_each_expert(family: str) -> None:
    model = adapted(MODELS[family], init_lora_weights=False)
    layers = expert_layers(model)
    assert [layer.name for layer in layers if ".0." in layer.name] == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
    ]
    plain = MODELS[family]()
    for layer in layers:
        assert (layer.experts, layer.stored_rank, layer.s) == (4, 3, 2.0)
        assert layer.shape == {"gate_up_proj": (48, 32), "down_proj": (32, 24)}[layer.parameter_name]
        assert torch.equal(layer.weight, plain.get_parameter(layer.name))
        A, B = split_A(layer.stored_A, 4), split_B(layer.stored_B, 4)
        delta = layer.by_expert(layer.module.get_delta_weight("default"))
        for e in range(4):
            assert layer.dense_weights()[e].shape == layer.shape
            torch.testing.assert_close(delta[e], layer.s * B[e] @ A[e])
        assert torch.equal(join_A(A), layer.stored_A)
        assert torch.equal(join_B(B), layer.stored_B)


def test_is_trained_looks_at_every_expert() -> None:
    layer = expert_layers(adapted())[0]
    assert not is_trained(layer)
    with torch.no_grad():
        layer.stored_B[0, 7] = 1e-12
    assert is_trained(layer)


# --- The probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("way", ["grouped_mm", "eager", "batched_mm"])
def test_equals_one_gradient_of_the_whole_sample(family: str, way: str, tmp_path: Any) -> None:
    """Micro-batches of 3, 5 and 1 samples with label counts that differ, attention and experts together."""
    rows = tiny.causal_rows(9)
    model = adapted(MODELS[family])
    model.get_base_model().set_experts_implementation(way)
    trainer = in_order(rows, tmp_path, model)

    class Ragged:
        def __iter__(self) -> Any:
            return iter([stack(rows[:3]), stack(rows[3:8]), stack(rows[8:])])

    trainer.get_train_dataloader = Ragged
    found = probed(trainer, exact())
    true = true_gradients(MODELS[family], find_adapted_layers(model), rows)
    assert len(found) == 4 + 2 * 2 * 4
    assert_equal_gradients(found, true, rtol=5e-6)  # fp32 against fp64


@pytest.mark.parametrize("batch_size", [9, 4, 1])
def test_does_not_depend_on_the_micro_batch(batch_size: int, tmp_path: Any) -> None:
    rows = tiny.causal_rows(9)
    model = adapted(tiny.mixtral)
    found = probed(in_order(rows, tmp_path, model, per_device_train_batch_size=batch_size), exact())
    assert_equal_gradients(found, true_gradients(tiny.mixtral, find_adapted_layers(model), rows), rtol=5e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, tmp_path: Any) -> None:
    rows = tiny.causal_rows(8)
    model = adapted()
    tiny.checkpoint_activations(model, use_reentrant=reentrant)
    if reentrant:
        model.enable_input_require_grads()
    found = probed(in_order(rows, tmp_path, model), exact(num_samples=8))
    assert_equal_gradients(found, true_gradients(tiny.qwen3_moe, find_adapted_layers(model), rows), rtol=5e-6)


def test_bf16_experts_are_summed_in_fp32(tmp_path: Any) -> None:
    rows = tiny.causal_rows(8)
    model = tiny.with_lora(tiny.mixtral().to(torch.bfloat16), **LORA)
    found = probed(in_order(rows, tmp_path, model, per_device_train_batch_size=2), exact(num_samples=8))
    true = true_gradients(tiny.mixtral, find_adapted_layers(model), rows)
    errors = [((found[name] - G).norm() / G.norm()).item() for name, G in true.items()]
    # One token on the edge between two experts may be routed differently in bf16.
    assert sorted(errors)[len(errors) // 2] < 0.02


def test_a_trained_adapter_is_probed_where_it_is(tmp_path: Any) -> None:
    """The gradient at `W + s B A`, not at `W`."""
    rows = tiny.causal_rows(4)
    model = adapted(init_lora_weights=False, target_modules=[])
    found = probed(in_order(rows, tmp_path, model), exact(num_samples=4))
    merged = copy.deepcopy(model).merge_and_unload()
    names = [layer.name for layer in expert_layers(model)]
    true = reference.whole_sample_parameter_gradient(merged, names, lambda: causal_loss(merged, rows))
    true = {f"{name}[{e}]": G for name, stack in true.items() for e, G in enumerate(stack)}
    assert_equal_gradients(found, true, rtol=2e-5)


def test_a_bare_matrix_has_the_gradient_of_its_linear_layer(tmp_path: Any) -> None:
    rows = tiny.causal_rows(4)
    bare = tiny.with_lora(tiny.llama(), target_modules=[], target_parameters=["q_proj.weight"])
    linear = tiny.with_lora(tiny.llama(), target_modules=["q_proj"])
    found = probed(in_order(rows, tmp_path, bare), exact(num_samples=4))
    same = probed(in_order(rows, tmp_path, linear), exact(num_samples=4))
    assert_equal_gradients({name.removesuffix(".weight[0]"): G for name, G in found.items()}, same)


@pytest.mark.parametrize("way", ["grouped_mm", "eager"])
def test_the_dense_gradient_of_a_layer_is_freed_before_that_of_the_next(way: str) -> None:
    model = adapted(base={"num_hidden_layers": 4})
    model.get_base_model().set_experts_implementation(way)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    places = [
        (layer.mlp.experts.get_base_layer(), layer.mlp.experts.get_base_layer(), name)
        for layer in model.get_base_model().model.layers
        for name in ("gate_up_proj", "down_proj")
    ]
    seen: list[tuple[int, weakref.ref[Any]]] = []  # (layer, storage of its gradient)

    def sink(index: int, dW: Tensor) -> None:
        assert dW.shape == ((4, 48, 32) if index % 2 == 0 else (4, 32, 24))
        assert not [layer for layer, storage in seen if layer != index // 2 and storage() is not None]
        seen.append((index // 2, weakref.ref(dW.untyped_storage())))

    with tapped_parameters(places, sink):
        model(**stack(tiny.causal_rows(3))).loss.backward()
    assert [layer for layer, _ in seen] == [3, 3, 2, 2, 1, 1, 0, 0]
    assert all(storage() is None for _, storage in seen)
    assert not any(module._forward_pre_hooks for module, _, _ in places)


def test_sketches_are_products_with_the_gradient_of_each_expert(tmp_path: Any) -> None:
    rows = tiny.causal_rows(9)
    model = adapted(r=1)
    config = LoRAGAConfig(num_samples=9, sketch_size=2, min_energy_kept=None)
    estimators = estimate_gradients(in_order(rows, tmp_path, model), config).estimators
    true = true_gradients(tiny.qwen3_moe, find_adapted_layers(model), rows)
    sketched = [name for name, estimator in estimators.items() if estimator.sketched and "experts" in name]
    assert len(sketched) == 2 * 2 * 4, "every expert must be sketched at this size"
    for name in sketched:
        state = {key: value.double() for key, value in estimators[name].state().items()}
        # The last 16 columns gather all samples; those before them the samples since the last turning point.
        w, z = state["Omega"][:, -16:], state["Psi"][:, -16:]
        for found, expected in ((state["Y"][:, -16:], true[name] @ w), (state["Z"][:, -16:], true[name].T @ z)):
            assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_a_sketch_of_whole_gradients_finds_a_low_rank_one() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(60, 3, generator=generator) @ torch.randn(3, 50, generator=generator) for _ in range(2)]
    sketch = SketchedGradient((60, 50), k=12)
    for part in parts:
        sketch.add_gradient(part, 0.5)
        turn([sketch])
    top = sketch.svd(6)
    G = 0.5 * (parts[0] + parts[1]).double()
    torch.testing.assert_close(top.U.double() @ top.S.double().diag() @ top.Vt.double(), G, rtol=0, atol=1e-5)


def test_a_non_finite_gradient_names_batch_and_layer(tmp_path: Any) -> None:
    model = adapted()
    calls = []

    def poison(_: nn.Module, __: Any, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            output.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("nan")))

    model.get_base_model().model.layers[1].mlp.experts.get_base_layer().register_forward_hook(poison)
    trainer = in_order(tiny.causal_rows(12), tmp_path, model)
    with pytest.raises(NonFiniteGradient, match=r"Probe batch 1: the gradient of model\.layers\.1\.mlp\.experts\."):
        probed(trainer, exact(num_samples=12))
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


def test_the_probe_leaves_no_trace_in_the_model(tmp_path: Any) -> None:
    model = adapted()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    probed(in_order(tiny.causal_rows(4), tmp_path, model), exact(num_samples=4))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: parameter.requires_grad for name, parameter in after.items()} == grads
    assert all(parameter.grad is None for parameter in after.values())
    assert not any(hasattr(module, "parametrizations") for module in model.modules())


# --- The start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_the_first_step_of_each_expert_is_the_best_of_rank_2r(family: str, tmp_path: Any) -> None:
    """`B0 B0^T G + G A0^T A0 = c^2 [G]_2r`, c = out^(1/4) / sqrt(gamma), with G from a separate model in fp64."""
    rows = tiny.causal_rows(9)
    model = adapted(MODELS[family])
    prepare_adapter(model, LoRAGAConfig())
    layers = find_adapted_layers(model)
    start_adapter(in_order(rows, tmp_path, model), exact(), layers)
    true = true_gradients(MODELS[family], layers, rows)
    for layer in expert_layers(model):
        A, B = split_A(layer.stored_A.detach(), 4).double(), split_B(layer.stored_B.detach(), 4).double()
        assert not A[:, 3:].any(), "the lower half of A is A - A0 = 0"
        assert not B[:, :, :3].any(), "the first half of B is B - B0 = 0"
        c = layer.shape[0] ** 0.25 / math.sqrt(16)
        for e, name in enumerate(layer.matrices):
            G, A0, B0 = true[name], A[e, :3], B[e, :, 3:]
            step, best = B0 @ B0.T @ G + G @ A0.T @ A0, c**2 * reference.best_rank(G, 6)
            assert (step - best).norm() < 1e-4 * best.norm(), name


def test_a_sketched_start_keeps_the_law_for_every_expert(tmp_path: Any) -> None:
    """Two tokens with a label: gradients of rank 2 = 2r, which a sketch of 3 columns holds whole."""
    rows = tiny.causal_rows(1, length=3, ragged=False)
    model = adapted(r=1, target_modules=[])
    prepare_adapter(model, LoRAGAConfig())
    layers = find_adapted_layers(model)
    config = LoRAGAConfig(num_samples=1, sketch_size=3)
    report = start_adapter(in_order(rows, tmp_path, model), config, layers)
    assert all(entry.sketched for entry in report.layers)
    true = true_gradients(tiny.qwen3_moe, layers, rows)
    started = 0
    for layer in layers:
        A, B = split_A(layer.stored_A.detach(), 4).double(), split_B(layer.stored_B.detach(), 4).double()
        for e, name in enumerate(layer.matrices):
            G, A0, B0 = true[name], A[e, :1], B[e, :, 1:]
            if G.any():
                best = math.sqrt(layer.shape[0]) / 16 * reference.best_rank(G, 2)
                assert (B0 @ B0.T @ G + G @ A0.T @ A0 - best).norm() < 1e-4 * best.norm(), name
                started += 1
    assert started > 8


def test_lora_one_starts_each_expert_one_normalised_step_away(tmp_path: Any) -> None:
    """`B0 A0 = -[G]_r / (gamma S[0])` and `B0^T B0 = A0 A0^T`, expert by expert."""
    rows = tiny.causal_rows(9)
    model = adapted(tiny.mixtral)
    config = exact(init="lora_one")
    prepare_adapter(model, config)
    layers = find_adapted_layers(model)
    start_adapter(in_order(rows, tmp_path, model), config, layers)
    true = true_gradients(tiny.mixtral, layers, rows)
    for layer in expert_layers(model):
        A, B = split_A(layer.stored_A.detach(), 4).double(), split_B(layer.stored_B.detach(), 4).double()
        for e, name in enumerate(layer.matrices):
            G = true[name]
            target = -reference.best_rank(G, 3) / (128 * torch.linalg.matrix_norm(G, 2))
            assert (B[e] @ A[e] - target).norm() < 1e-4 * target.norm(), name
            torch.testing.assert_close(B[e].T @ B[e], A[e] @ A[e].T, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_an_expert_that_no_token_reached_stays_plain_and_is_counted(init: str, tmp_path: Any) -> None:
    rows = tiny.causal_rows(1, length=5, ragged=False)  # 5 tokens of 2 experts each cannot reach 16
    many = {"num_experts": 16}
    model = adapted(base=many, r=2)
    config = exact(init=init, num_samples=1)
    prepare_adapter(model, config)
    layers = find_adapted_layers(model)
    report = start_adapter(in_order(rows, tmp_path, model), config, layers)
    true = true_gradients(tiny.qwen3_moe, layers, rows, many)
    unreached = 0
    for layer, entry in zip(layers, report.layers, strict=True):
        if not isinstance(layer, AdaptedExperts):
            assert (entry.experts, entry.experts_plain) == (1, 0)
            continue
        A, B = split_A(layer.stored_A.detach(), 16)[:, :2], split_B(layer.stored_B.detach(), 16)
        zero = [not true[name].any() for name in layer.matrices]
        for e in range(16):
            assert bool(B[e].any()) is not zero[e]
            if zero[e]:  # as nn.Linear and PEFT draw A: uniform in [-1/sqrt(in), 1/sqrt(in)]
                bound = layer.shape[1] ** -0.5
                assert 0.8 * bound < A[e].abs().max() <= bound
            elif init == "lora_ga":
                torch.testing.assert_close(A[e].norm(dim=1), torch.full((2,), layer.shape[0] ** 0.25 / 4))
        plain = A[[e for e in range(16) if zero[e]]]
        assert len(plain.unique(dim=0)) == len(plain), "each expert is drawn for itself"
        assert (entry.experts, entry.experts_plain) == (16, sum(zero))
        unreached += sum(zero)
    assert unreached >= 4 * 6
    assert report.metrics()["lora_ga/experts_plain"] == unreached
    assert report.metrics()["lora_ga/experts_initialised"] == 4 * 16 - unreached
    assert f"{unreached} of 64 expert weights left plain" in report.summary()
    json.dumps(report.to_dict())


def test_without_any_gradient_the_layer_is_a_plain_start(tmp_path: Any) -> None:
    model = adapted(target_modules=["q_proj"])
    prepare_adapter(model, LoRAGAConfig())
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.experts.get_base_layer().down_proj.zero_()
    report = start_adapter(in_order(tiny.causal_rows(4), tmp_path, model), exact(num_samples=4), expert_layers(model))
    entries = {entry.name: entry for entry in report.layers}
    dead = entries["model.layers.1.mlp.experts.gate_up_proj"]
    assert dead.action == Action.ZERO_GRADIENT
    assert (dead.experts_plain, report.metrics()["lora_ga/layers_plain"]) == (4, 1)


def test_the_report_sums_up_the_experts(tmp_path: Any) -> None:
    rows = tiny.causal_rows(9)
    model = adapted()
    prepare_adapter(model, LoRAGAConfig())
    layers = find_adapted_layers(model)
    report = start_adapter(in_order(rows, tmp_path, model), exact(), layers)
    true = true_gradients(tiny.qwen3_moe, layers, rows)
    for layer, entry in zip(layers, report.layers, strict=True):
        values = [torch.linalg.svdvals(true[name]) for name in layer.matrices]
        whole = sum(S.square().sum() for S in values)
        assert entry.energy_share_r == pytest.approx(
            float(sum(S[:3].square().sum() for S in values) / whole), rel=1e-4
        )
        assert entry.energy_share_2r == pytest.approx(
            float(sum(S[:6].square().sum() for S in values) / whole), rel=1e-4
        )
        rms = torch.stack(values).square().mean(0).sqrt()[:6]
        torch.testing.assert_close(torch.tensor(entry.singular_values).double(), rms, rtol=1e-4, atol=0)
        assert entry.name == layer.name


def test_a_probe_file_keeps_every_expert(tmp_path: Any) -> None:
    def run(r: int) -> tuple[PeftModel, Any]:
        torch.manual_seed(11)
        config = exact(probe_file=str(tmp_path / "probe.safetensors"))
        trainer = LoRAGATrainer(
            tiny.qwen3_moe(),
            tiny.arguments(tmp_path, max_steps=1, learning_rate=0.0),
            train_dataset=tiny.causal_rows(12),
            peft_config=LoraConfig(**(LORA | {"r": r})),
            lora_ga_config=config,
        )
        trainer.train()
        return trainer.model, trainer.lora_ga_report

    first, report = run(3)
    assert report.loss_before is not None
    second, again = run(3)
    assert again.loss_before is None, "the second run must not probe"
    for one, two in zip(find_adapted_layers(first), find_adapted_layers(second), strict=True):
        assert torch.equal(one.stored_A, two.stored_A)
        assert torch.equal(one.stored_B, two.stored_B)
    run(2)


# --- Anchored ----------------------------------------------------------------------------------------------------


def inputs(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, tiny.VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(seed))}


def anchored(make: Any = tiny.qwen3_moe, seed: int = 7, **changes: Any) -> PeftModel:
    """A model whose anchored factors hold a random start of a realistic size."""
    model = adapted(make, **changes)
    prepare_adapter(model, LoRAGAConfig())
    generator = torch.Generator().manual_seed(seed)
    for layer in find_adapted_layers(model):
        (out_features, in_features), r, E = layer.shape, layer.stored_rank // 2, layer.experts
        B0 = 0.3 * torch.randn(E, out_features, r, generator=generator)
        tiny.write_start(layer, B0, 0.3 * torch.randn(E, r, in_features, generator=generator))
    record_of_model(model).initialised = True
    return model.eval()


def train(model: nn.Module, steps: int, make: Any = torch.optim.AdamW, **settings: Any) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(parameters, **({"lr": 1e-2, "weight_decay": 0.0} | settings))
    model.train()
    for step in range(steps):
        batch = inputs(step)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("family", MODELS)
def test_step_zero_is_exactly_the_base(family: str) -> None:
    model = anchored(MODELS[family])
    assert all(layer.stored_A.any() and layer.stored_B.any() for layer in expert_layers(model))
    assert torch.equal(model(**inputs()).logits, MODELS[family]().eval()(**inputs()).logits)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("family", MODELS)
def test_training_leaves_the_base_and_b0_alone_and_the_halves_in_lockstep(family: str, optimizer: Any) -> None:
    model = anchored(MODELS[family])
    layers = expert_layers(model)
    start = [(layer.stored_A.detach().clone(), layer.stored_B.detach().clone()) for layer in layers]
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, 6, optimizer)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    for layer, (A_start, B_start) in zip(layers, start, strict=True):
        moved_A = split_A(layer.stored_A.detach() - A_start, 4)
        moved_B = split_B(layer.stored_B.detach() - B_start, 4)
        assert all(moved_A[e].any() and moved_B[e].any() for e in range(4))
        assert not moved_B[:, :, 3:].any(), f"{layer.name}: B0 moved"
        # Each half rounds on its own magnitude: 6 steps of half an ulp of max |A|.
        tolerance = 6 * torch.finfo(torch.float32).eps * A_start.abs().max().item()
        torch.testing.assert_close(moved_A[:, :3], moved_A[:, 3:], rtol=0, atol=tolerance)


def test_the_gradients_are_those_of_lora_ga() -> None:
    """`gA = s B^T G`, `gB = s G A^T` of each expert, `B = (B - B0) + B0`, after the factors have moved."""
    torch.manual_seed(0)
    E, r = 3, 2
    model, layer = stacked(torch.randn(E, 5, 6, dtype=torch.float64))
    tiny.write_start(layer, torch.randn(E, 5, r), torch.randn(E, r, 6))
    with torch.no_grad():  # move as training would: both halves of A alike, the first half of B
        step = torch.randn(E, r, 6, dtype=torch.float64)
        layer.stored_A.add_(join_A(torch.cat([step, step], dim=1)))
        layer.stored_B[:, : r * E].add_(torch.randn(5, r * E, dtype=torch.float64))
    x, dy = torch.randn(E, 7, 6, dtype=torch.float64), torch.randn(E, 7, 5, dtype=torch.float64)
    (model(x) * dy).sum().backward()
    A, B = split_A(layer.stored_A.detach(), E), split_B(layer.stored_B.detach(), E)
    gA, gB = split_A(layer.stored_A.grad, E), split_B(layer.stored_B.grad, E)
    square = 0.0
    for e in range(E):
        G = dy[e].T @ x[e]
        true_gA, true_gB = layer.s * (B[e, :, :r] + B[e, :, r:]).T @ G, layer.s * G @ A[e, :r].T
        torch.testing.assert_close(gA[e, :r], true_gA)
        torch.testing.assert_close(gA[e, r:], true_gA)
        torch.testing.assert_close(gB[e, :, :r], true_gB)
        assert not gB[e, :, r:].any()
        square += (true_gA.square().sum() + true_gB.square().sum()).item()
    norm = torch.nn.utils.get_total_norm(list(counted_gradients(model)))
    assert norm.item() == pytest.approx(math.sqrt(square), rel=1e-12), "the clipping norm counts A's gradient once"


def test_equals_lora_ga_on_a_changed_base_for_20_adamw_steps_in_fp64() -> None:
    """The losses of the experts are added, so each expert trains as a layer of its own."""
    torch.manual_seed(0)
    E, r = 3, 2
    W = torch.randn(E, 7, 9, dtype=torch.float64)
    model, layer = stacked(W)
    B0, A0 = torch.randn(E, 7, r, dtype=torch.float64), torch.randn(E, r, 9, dtype=torch.float64)
    tiny.write_start(layer, B0, A0)
    x, y = torch.randn(E, 20, 9, dtype=torch.float64), torch.randn(E, 20, 7, dtype=torch.float64)
    optimizer = torch.optim.AdamW([layer.stored_A, layer.stored_B], lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        (model(x) - y).square().mean(dim=(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = layer.module.get_delta_weight("default").detach()
    for e in range(E):
        loss = lambda weight, e=e: (x[e] @ weight.T - y[e]).square().mean()
        theirs = reference.lora_ga_offset_training(W[e], B0[e], A0[e], layer.s, loss, 20, lr=1e-2)
        assert delta[e].norm() > 0.05 * W[e].norm(), "the test must move the weight"
        assert (W[e] + delta[e] - theirs).norm() < 1e-12 * delta[e].norm()
    assert torch.equal(layer.weight, W)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"mlp.experts.down_proj": 2}}])
def test_expanding_keeps_the_scaling(changes: dict[str, Any]) -> None:
    before = {layer.name: (layer.s, layer.stored_rank) for layer in expert_layers(adapted(**changes))}
    after = anchored(**changes)
    for layer in expert_layers(after):
        s, rank = before[layer.name]
        assert layer.s == pytest.approx(s, rel=1e-15)
        assert layer.stored_rank == 2 * rank
        assert layer.stored_A.shape == (layer.experts * 2 * rank, layer.shape[1])
    if "rank_pattern" in changes:
        assert {rank for _, rank in before.values()} == {2, 3}, "the pattern must reach the experts"


@pytest.mark.parametrize("family", MODELS)
def test_stock_peft_loads_merges_and_disables(family: str, tmp_path: Any) -> None:
    model = anchored(MODELS[family])
    train(model, 3)
    trained, original = model(**inputs(99)).logits, MODELS[family]().eval()(**inputs(99)).logits
    assert not torch.allclose(trained, original, atol=1e-3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(MODELS[family](), tmp_path).eval()
    assert not any(isinstance(module, AnchoredExpertsA) for module in stock.modules())
    assert torch.equal(stock(**inputs(99)).logits, trained)
    with model.disable_adapter():
        assert torch.equal(model(**inputs(99)).logits, original)
    for one in (stock, copy.deepcopy(model)):
        merged = one.merge_and_unload()
        torch.testing.assert_close(merged(**inputs(99)).logits, trained, rtol=1e-3, atol=2e-5)


def test_a_loaded_adapter_continues_anchored(tmp_path: Any) -> None:
    """Six steps in one go, or three, save, load and three: SGD, so that nothing but the weights carries over."""
    model = anchored()
    train(model, 3, torch.optim.SGD, lr=0.05)
    model.save_pretrained(tmp_path)
    again = load_adapter(tiny.qwen3_moe(), tmp_path)
    assert all(isinstance(layer.lora_A, AnchoredExpertsA) for layer in expert_layers(again))
    assert all(isinstance(layer.lora_B, AnchoredExpertsB) for layer in expert_layers(again))
    for one in (model, again):
        train(one, 3, torch.optim.SGD, lr=0.05)
    assert torch.equal(model(**inputs()).logits, again(**inputs()).logits)


def test_loading_on_other_experts_is_refused(tmp_path: Any) -> None:
    anchored(target_modules=[]).save_pretrained(tmp_path)
    other = tiny.qwen3_moe()
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(2)
    with pytest.raises(ValueError, match="started on a base with fingerprint"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_trains_the_same(reentrant: bool) -> None:
    model, checkpointed = anchored(), anchored()
    tiny.checkpoint_activations(checkpointed, use_reentrant=reentrant)
    if reentrant:
        checkpointed.enable_input_require_grads()
    for one in (model, checkpointed):
        train(one, 2, torch.optim.SGD)
    for mine, its in zip(find_adapted_layers(model), find_adapted_layers(checkpointed), strict=True):
        torch.testing.assert_close(mine.stored_A, its.stored_A, rtol=0, atol=1e-7)
        torch.testing.assert_close(mine.stored_B, its.stored_B, rtol=0, atol=1e-7)


def test_a_copy_is_tied_too() -> None:
    model = anchored()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        train(one, 3)
    for mine, its in zip(find_adapted_layers(model), find_adapted_layers(twin), strict=True):
        assert torch.equal(mine.stored_A, its.stored_A)
        assert torch.equal(mine.stored_B, its.stored_B)
    assert twin.state_dict().keys() == model.state_dict().keys()


# --- The trainer -------------------------------------------------------------------------------------------------


def swap(folder: Any, make: Any = tiny.qwen3_moe, **changes: Any) -> LoRAGATrainer:
    lora_ga = changes.pop("lora_ga", {})
    torch.manual_seed(11)
    return LoRAGATrainer(
        make(),
        tiny.arguments(folder, **changes),
        train_dataset=tiny.causal_rows(24),
        peft_config=LoraConfig(**LORA),
        lora_ga_config=LoRAGAConfig(**({"num_samples": 8} | lora_ga)),
    )


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_train_two_and_resume_two_is_train_four(init: str, tmp_path: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "lora_ga": {"init": init}}
    whole = swap(tmp_path / "whole", **settings)
    whole.train()
    assert whole.lora_ga_report.metrics()["lora_ga/layers_initialised"] == 8
    resumed = swap(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.lora_ga_report is None, "a resume does not probe"
    after, other = dict(whole.model.named_parameters()), dict(resumed.model.named_parameters())
    assert all(torch.equal(value, other[name]) for name, value in after.items())
    base = tiny.qwen3_moe()
    for layer in expert_layers(whole.model):
        assert torch.equal(layer.weight, base.get_parameter(layer.name)), "the base is never written"
        assert is_trained(layer)
    stock = PeftModel.from_pretrained(base, tmp_path / "whole" / "checkpoint-4").eval()
    assert torch.equal(stock(**inputs()).logits, whole.model.eval()(**inputs()).logits)


def test_the_trainers_clipping_keeps_the_halves_tied_and_decay_away(tmp_path: Any) -> None:
    trainer = swap(tmp_path, tiny.mixtral, weight_decay=0.1, max_grad_norm=0.01, max_steps=3)
    trainer.train()
    for layer in expert_layers(trainer.model):
        A = split_A(layer.stored_A.detach(), 4)
        A0 = A[:, :3] - A[:, 3:]
        lengths = A0.norm(dim=2)  # c for every direction: the tie has not slipped
        torch.testing.assert_close(lengths, torch.full_like(lengths, layer.shape[0] ** 0.25 / 4), rtol=1e-5, atol=0)


# --- What is refused ---------------------------------------------------------------------------------------------


def test_export_is_refused_by_name(tmp_path: Any) -> None:
    with pytest.raises(
        ValueError, match=r"experts\.down_proj is a parameter of `target_parameters`.*merge_and_unload"
    ):
        export_adapter(anchored(), tmp_path / "small", rank=2)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("correction", ["lora_pro", "lora_pro_adamw"])
def test_lora_pro_is_refused_by_name(correction: str, tmp_path: Any) -> None:
    trainer = swap(tmp_path, lora_ga={"correction": correction})
    with pytest.raises(ValueError, match=r"mlp\.experts.*lora_A.*can't be corrected.*target_parameters"):
        trainer.train()


def test_lora_pro_is_refused_on_an_anchored_bare_matrix() -> None:
    model = tiny.with_lora(tiny.llama(), target_modules=[], target_parameters=["q_proj.weight"])
    prepare_adapter(model, LoRAGAConfig())
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"q_proj\.lora_A.*can't be corrected"):
        LoRAProOptimizer(torch.optim.SGD(parameters, lr=0.1), model)


def test_riemannian_preconditioning_is_refused_by_name(tmp_path: Any) -> None:
    trainer = swap(tmp_path, lora_ga={"init": "none", "riemannian_reg": 1e-6})
    with pytest.raises(ValueError, match=r"riemannian_reg.*experts\.down_proj.*mix the ranks of all experts"):
        trainer.train()
