"""The gradient is that of the loss that is trained, also where the loss itself holds a gradient."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import tiny
import torch
from test_experts import LORA as EXPERT_LORA
from test_probe import assert_equal_gradients, exact, probe
from torch import Tensor, nn
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from lora_ga_trainer import INITS, Init, LoRAGAConfig, LoRAGATrainer, estimate_gradients
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.adapters.parameter import AdaptedExperts
from lora_ga_trainer.gradients.tap import _Use, tapped


class Penalised(Trainer):
    """The loss, plus the square of its gradient with respect to the embedded tokens."""

    weight = 0.0

    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=inputs["labels"]).loss
        (inner,) = torch.autograd.grad(loss, embedded, create_graph=True)
        return loss + self.weight * inner.square().sum()


def true_gradients(trainer: Trainer, batches: int) -> dict[str, Tensor]:
    """Autograd's own gradient of the trainer's loss with respect to the frozen weights, the mean over its batches."""
    model = trainer.model
    layers = find_adapted_layers(model)
    weights = [layer.weight for layer in layers]
    totals = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    model.train()
    for batch, _ in zip(trainer.get_train_dataloader(), range(batches), strict=False):
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=None)
        model.zero_grad()  # of what inner passes have left
        # Not `autograd.grad`: PEFT registers experts anew for a reference, after which it doesn't know them.
        loss.backward()
        for total, weight in zip(totals, weights, strict=True):
            total += weight.grad.double() / batches
    model.zero_grad()
    for weight in weights:
        weight.requires_grad_(False)
    true = {}
    for layer, total in zip(layers, totals, strict=True):
        if isinstance(layer, AdaptedExperts):
            true |= dict(zip(layer.matrices, layer.by_expert(total), strict=True))
        else:
            true[layer.name] = total.T if isinstance(layer.base, Conv1D) else total
    return true


FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny.llama, {"lora_dropout": 0.3}),
    "gpt2": (tiny.gpt2, {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "experts": (tiny.qwen3_moe, EXPERT_LORA),
}


@pytest.mark.parametrize("weight", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_penalty_counts_to_the_second_order(family: str, weight: float, tmp_path: Any) -> None:
    make, lora = FAMILIES[family]
    base = make()
    base.set_attn_implementation("eager")  # the fused kernels have no second derivative
    adapted = tiny.with_lora(base, **lora)
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    trainer = Penalised(adapted, tiny.arguments(tmp_path, **settings), train_dataset=tiny.causal_rows(8, ragged=False))
    trainer.weight = weight
    found = probe(trainer, exact(num_samples=8))
    for module in adapted.modules():  # the probe measures without dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_equal_gradients(found, true_gradients(trainer, 2), rtol=5e-6 if family == "experts" else 2e-6)


class Smooth(nn.Module):
    """Layers in a row, one of them used twice, each called as `call` says."""

    def __init__(self, keyword: bool = False, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.head = nn.Linear(6, 1)
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = torch.tanh(layer(x=x) if self.keyword else layer(x))
        return self.head(x)


def penalty_of_the_input(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    x = x.clone().requires_grad_()
    y = model(x)
    (inner,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.square().mean() + 3 * (inner.norm(dim=1) - 1).square().mean()


def penalty_of_the_third_order(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """The inner gradient is differentiated once more inside the loss, as in physics-informed losses."""
    x = x.clone().requires_grad_()
    y = model(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return y.square().mean() + (first.sum(dim=1) + second.sum(dim=1) - y[:, 0]).square().mean()


def penalty_of_the_adapter(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """The norm of the gradient of what is trained (sharpness), as the loss finds it."""
    y = model(x).square().mean()
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert trained
    assert all(parameter.requires_grad for parameter in trained)
    return y + sum(gradient.square().sum() for gradient in torch.autograd.grad(y, trained, create_graph=True))


def inner_backward(model: Any, x: Tensor, **kwargs: Any) -> Tensor:
    """Two inner passes of which nothing is kept: the loss does not depend on them."""
    x = x.clone().requires_grad_()
    y = model(x).square().mean()
    y.backward(retain_graph=True)
    torch.autograd.grad(y, x, create_graph=True)
    assert any(parameter.grad is not None for parameter in model.parameters())
    return y


LOSSES = [penalty_of_the_input, penalty_of_the_third_order, penalty_of_the_adapter, inner_backward]


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_inner_gradients_of_any_kind_give_what_autograd_gives(loss: Any, keyword: bool, tmp_path: Any) -> None:
    class Inner(Trainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Tensor:
            return loss(model, **inputs)

    torch.manual_seed(0)
    adapted = tiny.with_lora(Smooth(keyword).double(), target_modules=["0", "1", "2", "head"])
    with torch.no_grad():  # G is exact wherever the factors stand
        for layer in find_adapted_layers(adapted):
            layer.stored_B.normal_(std=0.3)
    rows = [{"x": torch.randn(6, dtype=torch.float64)} for _ in range(8)]
    settings = {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    trainer = Inner(adapted, tiny.arguments(tmp_path, **settings), train_dataset=rows)
    found = probe(trainer, exact(num_samples=8))
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert_equal_gradients(found, true_gradients(trainer, 2), rtol=1e-6)


@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_only_the_pairs_of_a_call_itself_are_its_inputs_and_output_gradients(needs_input_gradient: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4, bias=False), torch.randn(3, 5, requires_grad=needs_input_gradient)
    scale = torch.ones(3, 4, requires_grad=True)
    seen: list[tuple[Tensor, Tensor, bool]] = []
    layer.weight.requires_grad_(False)
    with tapped({"layer": layer}, lambda index, x, dy, own: seen.append((x, dy, own))):
        y = layer(x)
        leaf = x if needs_input_gradient else scale
        (inner,) = torch.autograd.grad((scale * y.square()).sum(), leaf, create_graph=True)
        seen.clear()
        inner.pow(3).sum().backward()
    own = [(x, dy) for x, dy, is_own in seen if is_own]
    assert len(own) == 1
    assert torch.equal(own[0][0], x.detach())
    assert len(seen) == (2 if needs_input_gradient else 1)
    layer.weight.requires_grad_(True)
    (inner,) = torch.autograd.grad((scale * layer(x).square()).sum(), leaf, create_graph=True)
    (true,) = torch.autograd.grad(inner.pow(3).sum(), layer.weight)
    torch.testing.assert_close(sum(dy.T @ x for x, dy, _ in seen), true)


def test_a_linear_output_whose_inner_gradient_is_a_constant_still_owes_its_second_part() -> None:
    """`y = x W^T`, `h = dy W` with a constant `dy`: nothing upstream of `h` requires grad, and `h` depends on `W`."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4, bias=False), torch.randn(3, 5, requires_grad=True)
    layer.weight.requires_grad_(False)
    parts: list[Tensor] = []
    with tapped({"layer": layer}, lambda index, x, dy, own: parts.append(dy.T @ x)):
        (inner,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        parts.clear()
        inner.square().sum().backward()
    layer.weight.requires_grad_(True)
    (inner,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    (true,) = torch.autograd.grad(inner.square().sum(), layer.weight)
    torch.testing.assert_close(sum(parts), true)


@pytest.mark.parametrize("call", [lambda layer, x: layer(x), lambda layer, x: layer(input=x)])
def test_a_layer_that_is_called_by_keyword_is_seen(call: Any) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4), torch.randn(3, 5, requires_grad=True)
    parts: list[Tensor] = []
    with tapped({"layer": layer}, lambda index, x, dy, own: parts.append(dy.T @ x)):
        call(layer, x).square().sum().backward()
    torch.testing.assert_close(parts[0], layer.weight.grad)
    assert x.grad is not None


TRANSFORMS = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).sum())(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda model, x: torch.func.vmap(model)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_of_torch_func_is_refused_by_the_name_of_the_layer(transform: str) -> None:
    model, x = Smooth(), torch.randn(4, 6)
    with (
        tapped(dict(model.layers.named_children()), lambda *pair: None),
        pytest.raises(ValueError, match=r"Layer 0: .*torch\.func.*autograd\.grad\(\.\.\., create_graph=True\)"),
    ):
        TRANSFORMS[transform](model, x)


def test_moments_see_the_inputs_of_the_layer_alone(tmp_path: Any, monkeypatch: Any) -> None:
    """A penalty adds to `G`; it adds no token to the second moments of what the layer takes in."""
    needy = Init(
        needs=frozenset({"second_moments"}),
        pairs=1,
        anchored=False,
        reads=frozenset(),
        default_gamma=1.0,
        about="for a test",
        factors=INITS["lora_one"].factors,
    )
    monkeypatch.setitem(INITS, "needy", needy)
    config = LoRAGAConfig(init="needy", num_samples=8, estimator="exact")
    rows = tiny.causal_rows(8, ragged=False)

    class Heavy(Penalised):
        weight = 5.0

    moments = {}
    for kind in (Penalised, Heavy):
        base = tiny.llama(attn_implementation="eager")
        settings = {"train_sampling_strategy": "sequential"}
        trainer = kind(tiny.with_lora(base), tiny.arguments(tmp_path, **settings), train_dataset=rows)
        moments[kind] = estimate_gradients(trainer, config).moments
    for name, of_layer in moments[Penalised].items():
        assert of_layer.tokens == moments[Heavy][name].tokens == 8 * 12
        torch.testing.assert_close(of_layer.input_second_moments, moments[Heavy][name].input_second_moments)


def penalty_of_a_bias(model: Any, x: Tensor) -> Tensor:
    """The inner pass ends in the first layer, whose input requires no grad."""
    y = model(x)
    (inner,) = torch.autograd.grad(y.square().sum(), model.layers[0].bias, create_graph=True)
    return y.mean() + inner.square().sum()


@pytest.mark.parametrize("loss", [penalty_of_the_third_order, penalty_of_a_bias])
def test_an_inner_gradient_leaves_no_graph_behind(loss: Any) -> None:
    model, x = Smooth(), torch.randn(4, 6)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.layers[0].bias)
    gc.collect()
    alive = lambda: sum(type(found) is _Use for found in gc.get_objects())
    gc.disable()  # it would free what only holds itself, but for what hangs on a graph in C++
    try:
        with tapped(dict(model.layers.named_children()), lambda *pair: None):
            value = loss(model, x)
            assert alive() > 0
            value.backward()
            del value
        assert alive() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_penalised_loss_starts_and_trains(checkpointing: bool, tmp_path: Any) -> None:
    """With checkpoints too, whose layers run once more inside each backward pass."""

    class Mine(Penalised, LoRAGATrainer):
        weight = 0.5

    adapted = tiny.with_lora(tiny.llama(attn_implementation="eager"))
    twin = copy.deepcopy(adapted)
    if checkpointing:
        tiny.checkpoint_activations(adapted, use_reentrant=False)
    rows = tiny.causal_rows(16, ragged=False)
    trainer = Mine(adapted, tiny.arguments(tmp_path), train_dataset=rows, lora_ga_config=LoRAGAConfig(num_samples=8))
    trainer.train()
    assert trainer.lora_ga_report.metrics()["lora_ga/layers_plain"] == 0
    settings = {"train_sampling_strategy": "sequential"}
    for model in (adapted := tiny.with_lora(tiny.llama(attn_implementation="eager")), twin):
        if model is adapted and checkpointing:
            tiny.checkpoint_activations(model, use_reentrant=False)
    trainers = [Penalised(m, tiny.arguments(tmp_path, **settings), train_dataset=rows) for m in (adapted, twin)]
    for each in trainers:
        each.weight = 0.5
    found, plain = (probe(each, exact(num_samples=8)) for each in trainers)
    assert_equal_gradients(found, plain)
