"""Anchored adapters are LoRA-GA on a base that is never touched."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import reference
import tiny
import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_ga_trainer import LoRAGAConfig, load_adapter
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.adapters.layer import AdaptedLayer
from lora_ga_trainer.adapters.storage import AnchoredA, anchored_parameter_names, counted_gradients
from lora_ga_trainer.saving.record import record_of_model
from lora_ga_trainer.starts.prepare import prepare_adapter


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {"rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "dropout": {"lora_dropout": 0.1},
    "lora_bias": {"lora_bias": True, "target_modules": ["biased"]},
}


class Biased(nn.Module):
    """PEFT's `lora_bias` wants base layers with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.biased, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.biased(x)))


def base_of(variant: str) -> nn.Module:
    return Biased() if variant == "lora_bias" else tiny.llama()


def inputs_of(variant: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if variant == "lora_bias":
        return {"x": torch.randn(6, 12, generator=generator)}
    return {"input_ids": torch.randint(0, tiny.VOCABULARY, (3, 10), generator=generator)}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def anchored(variant: str = "plain", seed: int = 7) -> tuple[PeftModel, list[AdaptedLayer]]:
    """A model whose anchored factors hold a random start of a realistic size."""
    model = tiny.with_lora(base_of(variant), **VARIANTS[variant])
    prepare_adapter(model, LoRAGAConfig())
    layers = find_adapted_layers(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        (out_features, in_features), r = layer.shape, layer.stored_rank // 2
        tiny.write_start(
            layer,
            0.3 * torch.randn(out_features, r, generator=generator),
            0.3 * torch.randn(r, in_features, generator=generator),
        )
    record_of_model(model).initialised = True
    return model, layers


def train(model: nn.Module, variant: str, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    target = torch.randn(output(model, inputs_of(variant)).shape, generator=torch.Generator().manual_seed(1))
    model.train()
    for step in range(steps):
        loss = (output(model, inputs_of(variant, step)) - target.to(parameters[0].dtype)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_zero_is_exactly_the_base(variant: str) -> None:
    base = base_of(variant).eval()
    model, layers = anchored(variant)
    model.eval()
    logits, original = output(model, inputs_of(variant)), output(base, inputs_of(variant))
    if variant == "dora":  # PEFT itself scales by ||W|| / ||W||: rounding of the division, not of the anchor
        torch.testing.assert_close(logits, original, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits, original)
    assert all(layer.lora_B.weight.any() and layer.lora_A.weight.any() for layer in layers)


@pytest.mark.parametrize("variant", VARIANTS)
def test_expanding_keeps_the_scaling_of_every_layer(variant: str) -> None:
    plain = tiny.with_lora(base_of(variant), **VARIANTS[variant])
    before = {layer.name: (layer.s, layer.stored_rank) for layer in find_adapted_layers(plain)}
    user_config = copy.deepcopy(plain.peft_config["default"])
    kept = plain.peft_config["default"]
    prepare_adapter(plain, LoRAGAConfig())
    for layer in find_adapted_layers(plain):
        s, rank = before[layer.name]
        assert layer.s == pytest.approx(s, rel=1e-15)
        assert layer.stored_rank == 2 * rank
    assert kept.r == user_config.r, "the user's own LoraConfig must not change"
    assert kept.rank_pattern == user_config.rank_pattern


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_leaves_the_base_and_b0_alone_and_the_halves_in_lockstep(variant: str) -> None:
    model, layers = anchored(variant)
    start = {
        layer.name: (layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()) for layer in layers
    }
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, variant, 20)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    for layer in layers:
        (A_start, B_start), r = start[layer.name], layer.stored_rank // 2
        A, B = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
        assert torch.equal(B[:, r:], B_start[:, r:]), f"{layer.name}: B0 moved"
        assert not torch.equal(B[:, :r], B_start[:, :r])
        moved_upper, moved_lower = A[:r] - A_start[:r], A[r:] - A_start[r:]
        assert moved_lower.any()
        # Both halves received the same updates; each rounds on its own magnitude: 20 steps of half an ulp of max |A|.
        tolerance = 20 * torch.finfo(A.dtype).eps * A.abs().max().item()
        torch.testing.assert_close(moved_upper, moved_lower, rtol=0, atol=tolerance)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
def test_every_elementwise_optimizer_gives_both_halves_the_same_update(optimizer: Any) -> None:
    model, layers = anchored()
    before = [layer.lora_A.weight.detach().clone() for layer in layers]
    frozen = [layer.lora_B.weight.detach()[:, layer.stored_rank // 2 :].clone() for layer in layers]
    settings = {"weight_decay": 0.0, "lr": 1e-3}
    train(model, "plain", 1, optimizer([p for p in model.parameters() if p.requires_grad], **settings))
    for layer, A, B0 in zip(layers, before, frozen, strict=True):
        r = layer.stored_rank // 2
        update = layer.lora_A.weight.detach() - A
        torch.testing.assert_close(update[:r], update[r:], rtol=0, atol=1e-7)
        assert torch.equal(layer.lora_B.weight.detach()[:, r:], B0)


def test_the_gradients_are_those_of_lora_ga() -> None:
    """`gA = s B^T G`, `gB = s G A^T` with `B = (B - B0) + B0`, after the factors have moved."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    model = tiny.with_lora(base, target_modules=["0"], r=2, lora_alpha=6).double()
    prepare_adapter(model, LoRAGAConfig())
    (layer,) = find_adapted_layers(model)
    tiny.write_start(layer, torch.randn(5, 2), torch.randn(2, 6))
    with torch.no_grad():  # move as training would: both halves of A alike, the first half of B
        step = torch.randn(2, 6, dtype=torch.float64)
        layer.lora_A.weight.add_(torch.cat([step, step]))
        layer.lora_B.weight[:, :2].add_(torch.randn(5, 2, dtype=torch.float64))
    x, dy = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (model(x) * dy).sum().backward()
    G = dy.T @ x
    A = layer.lora_A.weight.detach()[:2]
    B = layer.lora_B.weight.detach()[:, :2] + layer.lora_B.weight.detach()[:, 2:]
    torch.testing.assert_close(layer.lora_A.weight.grad[:2], layer.s * B.T @ G)
    torch.testing.assert_close(layer.lora_A.weight.grad[2:], layer.s * B.T @ G)
    torch.testing.assert_close(layer.lora_B.weight.grad[:, :2], layer.s * G @ A.T)
    assert not layer.lora_B.weight.grad[:, 2:].any()


def started_layer() -> tuple[Tensor, Tensor, Tensor, nn.Module, Any]:
    """Return `W (7, 9)`, a start `B0 (7, 3)`, `A0 (3, 9)`, the model of one layer that has it, and the layer; fp64."""
    torch.manual_seed(0)
    W = torch.randn(7, 9, dtype=torch.float64)
    base = nn.Sequential(nn.Linear(9, 7, bias=False, dtype=torch.float64))
    with torch.no_grad():
        base[0].weight.copy_(W)
    model = tiny.with_lora(base, target_modules=["0"], r=3, lora_alpha=6).double()
    prepare_adapter(model, LoRAGAConfig())
    (layer,) = find_adapted_layers(model)
    B0, A0 = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    tiny.write_start(layer, B0, A0)
    return W, B0, A0, model, layer


def test_equals_lora_ga_on_a_changed_base_for_100_adamw_steps_in_fp64() -> None:
    W, B0, A0, model, layer = started_layer()
    x, y = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    loss = lambda weight: (x @ weight.T - y).square().mean()
    optimizer = torch.optim.AdamW([layer.lora_A.weight, layer.lora_B.weight], lr=1e-2, weight_decay=0.0)
    for _ in range(100):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = W + layer.s * layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
    theirs = reference.lora_ga_offset_training(W, B0, A0, layer.s, loss, 100, lr=1e-2)
    assert (ours - W).norm() > 0.1 * W.norm(), "the test must move the weight"
    assert (ours - theirs).norm() < 1e-12 * (ours - W).norm()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
        (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0, "amsgrad": True}),
        (torch.optim.Adagrad, {"lr": 5e-2}),
        (torch.optim.RMSprop, {"lr": 3e-3}),
        (torch.optim.NAdam, {"lr": 1e-2}),
    ],
)
def test_a_hundred_steps_of_any_elementwise_optimizer_are_those_on_a_changed_base(
    kind: Any, settings: dict[str, Any]
) -> None:
    """The base becomes `W - s B0 A0` and plain factors start at `(B0, A0)`, in fp64."""
    W, B0, A0, model, layer = started_layer()
    x, y = torch.randn(20, 9, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    changed, A, B = W - layer.s * B0 @ A0, nn.Parameter(A0.clone()), nn.Parameter(B0.clone())
    ours, theirs = kind([layer.lora_A.weight, layer.lora_B.weight], **settings), kind([A, B], **settings)
    for _ in range(100):
        (model(x) - y).square().mean().backward()
        (x @ (changed + layer.s * B @ A).T - y).square().mean().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    net = layer.s * layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
    twin = layer.s * (B @ A - B0 @ A0).detach()
    assert twin.norm() > 0.1 * W.norm(), "the test must move the weight"
    assert (net - twin).norm() < 1e-12 * twin.norm()
    assert torch.equal(layer.lora_B.weight.detach()[:, 3:], B0)
    assert (layer.lora_A.weight.detach()[:3] - A0 - layer.lora_A.weight.detach()[3:]).abs().max() < 1e-13


def test_bf16_output_stays_within_one_percent_of_its_fp64_value_after_100_steps() -> None:
    torch.manual_seed(0)
    model = tiny.with_lora(nn.Sequential(nn.Linear(64, 48, bias=False)), target_modules=["0"], r=8, lora_alpha=16)
    prepare_adapter(model, LoRAGAConfig())
    (layer,) = find_adapted_layers(model)
    # A start as large as LoRA-GA's: rows of length out^(1/4) / sqrt(16).
    c = 48**0.25 / 4
    tiny.write_start(layer, c * torch.linalg.qr(torch.randn(48, 8)).Q, c * torch.linalg.qr(torch.randn(64, 8)).Q.T)
    x, y = torch.randn(256, 64), torch.randn(256, 48)
    # Small steps: the factors move by about 1% of their size, where a difference of products would cancel.
    optimizer = torch.optim.AdamW([layer.lora_A.weight, layer.lora_B.weight], lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    half = lambda module: copy.deepcopy(module).to(torch.bfloat16)
    A, B = half(layer.lora_A), half(layer.lora_B)
    x = x.to(torch.bfloat16)
    in_bf16 = B(A(x)).double()
    in_fp64 = x.double() @ (B.weight.double() @ A.weight.double()).T
    assert (in_bf16 - in_fp64).norm() < 0.01 * in_fp64.norm()
    # The same delta written as [A; A0], [B, -B0] cancels, which is why it is not stored so.
    r = layer.stored_rank // 2
    u, v = A.weight[:r], A.weight[r:]
    b, B0 = B.weight[:, :r], B.weight[:, r:]
    cancelling = (x @ torch.cat([u, u - v]).T) @ torch.cat([b + B0, -B0], dim=1).T
    assert (cancelling.double() - in_fp64).norm() > 0.02 * in_fp64.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_peft_loads_merges_and_disables(variant: str, tmp_path: Any) -> None:
    model, _ = anchored(variant)
    train(model, variant, 5)
    inputs = inputs_of(variant, 99)
    trained, original = output(model, inputs), output(base_of(variant).eval(), inputs)
    assert not torch.allclose(trained, original, atol=1e-3)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base_of(variant), tmp_path).eval()
    assert not any(isinstance(module, AnchoredA) for module in stock.modules())
    assert torch.equal(output(stock, inputs), trained)
    if variant != "bias":  # `bias="all"` trains the base's own biases, which stay when an adapter is switched off
        with model.disable_adapter():
            assert torch.equal(output(model, inputs), original)
    merged = copy.deepcopy(stock).merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), trained, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("variant", ["plain", "rslora", "dora", "lora_bias"])
def test_a_loaded_adapter_continues_anchored(variant: str, tmp_path: Any) -> None:
    """Ten steps in one go, or five, save, load and five: SGD, so that nothing but the weights carries over."""
    sgd = lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model, _ = anchored(variant)
    train(model, variant, 5, sgd(model))
    model.save_pretrained(tmp_path)
    again = load_adapter(base_of(variant), tmp_path)
    assert all(isinstance(layer.lora_A, AnchoredA) for layer in find_adapted_layers(again))
    for one in (model, again):
        train(one, variant, 5, sgd(one))
    assert torch.equal(output(model, inputs_of(variant)), output(again, inputs_of(variant)))
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "lora_ga.json").read_text() == (tmp_path / "lora_ga.json").read_text()


def test_without_its_record_it_continues_as_plain_lora_and_says_so(tmp_path: Any, caplog: Any) -> None:
    model, _ = anchored()
    model.save_pretrained(tmp_path)
    (tmp_path / "lora_ga.json").unlink()
    with caplog.at_level("WARNING", logger="lora_ga_trainer"):
        again = load_adapter(tiny.llama(), tmp_path)
    assert not any(isinstance(module, AnchoredA) for module in again.modules())
    assert "no lora_ga.json" in caplog.text


def test_the_record_is_looked_for_where_the_adapter_is(tmp_path: Any, monkeypatch: Any) -> None:
    model, _ = anchored()
    model.save_pretrained(tmp_path / "sub")
    again = load_adapter(tiny.llama(), tmp_path, subfolder="sub")
    assert all(isinstance(layer.lora_A, AnchoredA) for layer in find_adapted_layers(again))

    asked = {}
    monkeypatch.setattr("lora_ga_trainer.saving.record.cached_file", lambda *_, **kwargs: asked.update(kwargs))
    load_adapter(tiny.llama(), tmp_path, subfolder="sub", revision="v2", token=None)
    assert {name: asked.get(name) for name in ("subfolder", "revision")} == {"subfolder": "sub", "revision": "v2"}
    assert "token" not in asked


def replica_of(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module as nn.DataParallel does for another device: its parameters are plain tensors there."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach().clone().requires_grad_())
    return replica


def test_a_copy_of_data_parallel_computes_and_ties_as_the_module_does() -> None:
    _, layers = anchored("lora_bias")
    layer = layers[0]
    for module in (layer.lora_A, layer.lora_B):
        x = torch.randn(3, module.in_features)
        replica = replica_of(module)
        assert torch.equal(replica(x), module(x))
        module.zero_grad()
        module(x).square().sum().backward()
        replica(x).square().sum().backward()
        assert torch.equal(replica.weight.grad, module.weight.grad)


def test_loading_on_another_base_is_refused(tmp_path: Any) -> None:
    model, _ = anchored()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="started on a base with fingerprint"):
        load_adapter(tiny.llama(seed=1), tmp_path)


def test_an_uninitialised_adapter_leaves_no_record(tmp_path: Any) -> None:
    model = tiny.with_lora(tiny.llama())
    prepare_adapter(model, LoRAGAConfig())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "lora_ga.json").exists()


def test_only_the_active_adapter_of_two_is_anchored() -> None:
    model = tiny.with_lora(tiny.llama())
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".other." in name}
    prepare_adapter(model, LoRAGAConfig())
    assert model.peft_config["other"].r == 4
    assert model.peft_config["default"].r == 8
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    names = anchored_parameter_names(model)
    assert names
    assert all(".default." in name for name in names)


def test_the_norm_counts_the_gradient_of_a_once() -> None:
    """The global norm over the counted gradients is that of LoRA-GA's own `gA`, `gB`."""
    model, layers = anchored()
    output(model, inputs_of("plain")).square().mean().backward()
    mine = torch.nn.utils.get_total_norm(list(counted_gradients(model)))
    true = 0.0
    for layer in layers:
        r = layer.stored_rank // 2
        true += layer.lora_A.weight.grad[:r].square().sum() + layer.lora_B.weight.grad[:, :r].square().sum()
    assert mine.item() == pytest.approx(math.sqrt(true.item()), rel=1e-6)


def test_compiles_to_one_graph() -> None:
    model, _ = anchored()
    layer = find_adapted_layers(model)[0]
    pair = nn.Sequential(layer.lora_A, layer.lora_B)
    explained = torch._dynamo.explain(pair)(torch.randn(3, 32))
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0
