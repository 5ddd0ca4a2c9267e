"""Convolutions start, anchor, save and merge by the laws of linear layers."""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from peft import PeftModel
from test_probe import assert_equal_gradients, exact, in_order, probe
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, estimate_gradients, export_adapter, load_adapter
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.gradients import rows as rows_module
from lora_ga_trainer.maths.inits import INITS, Init
from lora_ga_trainer.starts.head_warmup import warm_up_heads
from lora_ga_trainer.starts.prepare import prepare_adapter
from lora_ga_trainer.starts.report import Action


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1d": {"kind": nn.Conv1d, "kernel_size": 3, "stride": 2, "padding": 1},
    "1d same": {"kind": nn.Conv1d, "kernel_size": 4, "padding": "same"},
    "2d": {"kind": nn.Conv2d, "kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 2)},
    "2d same": {"kind": nn.Conv2d, "kernel_size": (2, 3), "padding": "same"},
    "2d valid": {"kind": nn.Conv2d, "kernel_size": 2, "stride": (1, 2), "padding": "valid"},
    "2d pointwise": {"kind": nn.Conv2d, "kernel_size": 1},
    "3d": {"kind": nn.Conv3d, "kernel_size": (2, 3, 1), "stride": (1, 2, 1), "padding": (1, 0, 1)},
}


class Net(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = kind(3, 6, **options)
        self.second = kind(6, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.second(torch.tanh(self.first(x))).flatten(2)
        logits = self.head(h.square().mean(2))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def base(kind: str) -> Net:
    return Net(**CONVOLUTIONS[kind])


def rows(kind: str, count: int = 9) -> list[dict[str, Any]]:
    size = (7, 6, 5)[: int(kind[0])]
    generator = torch.Generator().manual_seed(2)
    return [{"x": torch.randn(3, *size, generator=generator), "labels": i % 4} for i in range(count)]


def inputs(kind: str) -> Tensor:
    return torch.stack([row["x"] for row in rows(kind)])


def with_lora(model: nn.Module, **changes: Any) -> PeftModel:
    return tiny.with_lora(model, **({"r": 2, "target_modules": ["first", "second", "head"]} | changes))


def made(kind: str, folder: Any, **changes: Any) -> LoRAGATrainer:
    """`changes` go to the training arguments, but for `lora_ga`."""
    config = LoRAGAConfig(**({"num_samples": 8, "estimator": "exact"} | changes.pop("lora_ga", {})))
    arguments = tiny.arguments(folder, **({"learning_rate": 1e-2} | changes))
    return LoRAGATrainer(with_lora(base(kind)), arguments, train_dataset=rows(kind, 16), lora_ga_config=config)


def trained(kind: str, folder: Any, **changes: Any) -> LoRAGATrainer:
    trainer = made(kind, folder, **changes)
    trainer.train()
    return trainer


@torch.no_grad()
def output(model: nn.Module, kind: str) -> Tensor:
    return model.eval()(inputs(kind))["logits"]


# torch's own warning about the layer. Calls of torch pass through the package's look for shared weights.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_gradient_is_that_of_autograd(kind: str, parts: bool, tmp_path: Any, monkeypatch: Any) -> None:
    if parts:
        monkeypatch.setattr(rows_module, "_MOST", 1)  # unfolds one row of the batch at a time
    model = base(kind).double()
    data = [row | {"x": row["x"].double()} for row in rows(kind)]
    trainer = in_order(data, tmp_path, with_lora(copy.deepcopy(model)))
    found = probe(trainer, exact(), layers=find_adapted_layers(trainer.model))
    weights = {name: getattr(model, name).weight for name in ("first", "second", "head")}
    labels = torch.tensor([row["labels"] for row in rows(kind)])
    gradients = torch.autograd.grad(model(inputs(kind).double(), labels)["loss"], list(weights.values()))
    true = {name: G.flatten(1).double() for name, G in zip(weights, gradients, strict=True)}
    assert_equal_gradients(found, true, rtol=1e-6)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_output_starts_at_the_base(kind: str, tmp_path: Any) -> None:
    model = trained(kind, tmp_path, max_steps=1, learning_rate=0.0).model
    torch.testing.assert_close(output(model, kind), output(base(kind), kind), rtol=0, atol=1e-6)
    assert all(layer.is_anchored and layer.stored_B.any() for layer in find_adapted_layers(model))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_halves_stay_tied_and_b0_fixed(kind: str, tmp_path: Any) -> None:
    start = {x.name: x for x in find_adapted_layers(trained(kind, tmp_path, max_steps=1, learning_rate=0.0).model)}
    for layer in find_adapted_layers(trained(kind, tmp_path).model):
        before, r = start[layer.name], layer.rank
        moved = layer.stored_A.detach() - before.stored_A.detach()
        assert moved.any()
        torch.testing.assert_close(moved[:r], moved[r:], rtol=0, atol=1e-6)
        assert torch.equal(layer.stored_B[:, r:], before.stored_B[:, r:])
        assert not torch.equal(layer.stored_B[:, :r], before.stored_B[:, :r])


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_saved_adapters_load_here_and_in_plain_peft_and_merge(kind: str, tmp_path: Any) -> None:
    model = trained(kind, tmp_path / "run").model
    expected = output(model, kind)
    assert not torch.allclose(expected, output(base(kind), kind), atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model, kind), output(base(kind), kind))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(PeftModel.from_pretrained(base(kind), tmp_path / "saved"), kind), expected)
    again = load_adapter(base(kind), tmp_path / "saved")
    assert torch.equal(output(again, kind), expected)
    assert all(layer.is_anchored for layer in find_adapted_layers(again))
    export_adapter(model, tmp_path / "exported", 4)
    exported = PeftModel.from_pretrained(base(kind), tmp_path / "exported")
    torch.testing.assert_close(output(exported, kind), expected, rtol=1e-5, atol=1e-5)
    if kind != "3d":  # PEFT 0.21 fails to merge a Conv3d whose kernel is (1, 1, n)
        torch.testing.assert_close(output(model.merge_and_unload(), kind), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_resuming_gives_the_same_run(init: str, tmp_path: Any) -> None:
    whole = trained("2d", tmp_path, save_strategy="steps", save_steps=2, lora_ga={"init": init}).model
    again = made("2d", tmp_path, lora_ga={"init": init})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name


class Wide(nn.Module):
    """Layers that are large enough to be sketched."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(8, 64, 3, stride=2, padding=1), nn.Conv2d(64, 48, 2)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        h = self.second(torch.tanh(self.first(x))).flatten(2)
        logits = self.head(torch.tanh(h).mean(2))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("parts", [False, True])
def test_sketches_are_products_with_the_gradient(parts: bool, tmp_path: Any, monkeypatch: Any) -> None:
    """The last 16 columns of the test matrices gather all samples."""
    if parts:
        monkeypatch.setattr(rows_module, "_MOST", 1)
    generator = torch.Generator().manual_seed(2)
    data = [{"x": torch.randn(8, 6, 6, generator=generator), "labels": i % 4} for i in range(9)]
    trainer = in_order(data, tmp_path, tiny.with_lora(Wide(), r=1, target_modules=["first", "second"]))
    config = LoRAGAConfig(num_samples=9, sketch_size=2, min_energy_kept=None, probe_order="train")
    estimators = estimate_gradients(trainer, config).estimators
    model = Wide().double()
    x, labels = torch.stack([row["x"] for row in data]).double(), torch.tensor([row["labels"] for row in data])
    weights = [model.first.weight, model.second.weight]
    true = torch.autograd.grad(model(x, labels)["loss"], weights)
    for name, G in zip(("first", "second"), (G.flatten(1) for G in true), strict=True):
        assert estimators[name].sketched
        state = {key: value.double() for key, value in estimators[name].state().items()}
        w, z = state["Omega"][:, -16:], state["Psi"][:, -16:]
        for found, expected in ((state["Y"][:, -16:], G @ w), (state["Z"][:, -16:], G.T @ z)):
            assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_second_moments_are_those_of_patches(tmp_path: Any) -> None:
    """Of what the kernel sees: torch's own `unfold` makes a patch of each place."""
    model, needs = base("2d").double(), frozenset({"second_moments"})
    data = [row | {"x": row["x"].double()} for row in rows("2d")]
    trainer = in_order(data, tmp_path, with_lora(copy.deepcopy(model), target_modules=["first"]))
    with mock.patch.dict(INITS, weighted=Init("", 1.0, anchored=False, pairs=1, factors=print, needs=needs)):  # type: ignore[arg-type]  # never called
        config = LoRAGAConfig(num_samples=9, init="weighted", estimator="exact", probe_order="train")
        moments = estimate_gradients(trainer, config).moments["first"]
    options = {key: value for key, value in CONVOLUTIONS["2d"].items() if key != "kind"}
    patches = nn.functional.unfold(inputs("2d").double(), **options)  # (9, 3 * 3 * 2, places)
    torch.testing.assert_close(moments.input_second_moments.double(), patches.square().mean((0, 2)), rtol=1e-5, atol=0)
    assert moments.tokens == patches.shape[0] * patches.shape[2]


def started(kind: str, dtype: torch.dtype, size: float) -> tuple[Any, list[Any], dict[str, Any]]:
    """An anchored model with a random start, its convolutions, and the start `(B0, A0)` of each as stored."""
    model = with_lora(base(kind).to(dtype), target_modules=["first", "second"]).to(dtype)
    prepare_adapter(model, LoRAGAConfig())
    layers, starts = find_adapted_layers(model), {}
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        (out, inner), r = layer.shape, layer.rank
        B0 = size * torch.randn(out, r, generator=generator, dtype=torch.float64)
        A0 = size * torch.randn(r, inner, generator=generator, dtype=torch.float64)
        tiny.write_start(layer, B0, A0)
        starts[layer.name] = (B0, A0)
    return model, layers, starts


@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0})],
)
@pytest.mark.parametrize("kind", ["1d", "2d", "3d"])
def test_steps_are_those_of_lora_ga_on_a_changed_base(
    kind: str, optimizer: Any, settings: dict[str, Any], steps: int
) -> None:
    """Both weights become `W - s B0 A0` and plain factors start at `(B0, A0)`, in fp64."""
    model, layers, starts = started(kind, torch.float64, 0.5)
    plain, x = base(kind).double(), inputs(kind).double()
    twins = {name: [nn.Parameter(factor.clone()) for factor in pair] for name, pair in starts.items()}
    net = lambda layer: layer.s * torch.mm(*twins[layer.name]) - layer.s * torch.mm(*starts[layer.name])
    ours = optimizer([p for layer in layers for p in (layer.stored_A, layer.stored_B)], **settings)
    theirs = optimizer([p for pair in twins.values() for p in pair], **settings)
    target = torch.randn(9, 4, dtype=torch.float64)
    for _ in range(steps):
        (model(x)["logits"] - target).square().mean().backward()
        weights = {f"{it.name}.weight": it.weight.detach() + net(it).reshape(it.weight.shape) for it in layers}
        (torch.func.functional_call(plain, weights, (x,))["logits"] - target).square().mean().backward()
        for each in (ours, theirs):
            each.step()
            each.zero_grad()
    for layer in layers:
        found = (layer.s * layer.stored_B.flatten(1) @ layer.stored_A.flatten(1)).detach()
        twin = net(layer).detach()
        assert twin.norm() > 1e-4
        assert (found - twin).norm() < 1e-12 * max(1.0, twin.norm().item())


def test_bf16_output_stays_within_one_percent_of_its_fp64_value_after_100_steps() -> None:
    model, layers, _ = started("2d", torch.float32, 0.3)
    x, target = inputs("2d"), torch.randn(9, 4)
    # Small steps: the factors move by about 1% of their size, where a difference of products would cancel.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-5, weight_decay=0.0)
    for _ in range(100):
        (model(x)["logits"] - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers:
        image = torch.randn(64, layer.module.in_features, 8, 8)
        halves = [copy.deepcopy(module).to(torch.bfloat16) for module in (layer.lora_A, layer.lora_B)]
        half = halves[1](halves[0](image.bfloat16())).double()
        whole = layer.lora_B.double()(layer.lora_A.double()(image.double()))
        # Of the input and of what passes between the factors bf16 keeps 8 bits, at random signs.
        assert (half - whole).norm() < 0.01 * whole.norm(), layer.name


def test_a_bf16_base_is_probed_to_bf16_and_trained(tmp_path: Any) -> None:
    model = base("2d").bfloat16()
    data = [row | {"x": row["x"].bfloat16()} for row in rows("2d", 16)]
    found = probe(in_order(data[:9], tmp_path, with_lora(copy.deepcopy(model))), exact())
    twin = copy.deepcopy(model).double()
    labels = torch.tensor([row["labels"] for row in data[:9]])
    loss = twin(torch.stack([row["x"] for row in data[:9]]).double(), labels)["loss"]
    weights = {name: getattr(twin, name).weight for name in ("first", "second", "head")}
    true = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    assert_equal_gradients(found, {name: G.flatten(1) for name, G in true.items()}, rtol=2e-2)
    config = LoRAGAConfig(num_samples=8, estimator="exact")
    trainer = LoRAGATrainer(
        with_lora(model), tiny.arguments(tmp_path, learning_rate=1e-2), train_dataset=data, lora_ga_config=config
    )
    trainer.train()
    before = base("2d").bfloat16()
    for layer in find_adapted_layers(trainer.model):
        r, moved = layer.rank, layer.stored_B.detach()
        assert torch.equal(layer.weight, getattr(before, layer.name).weight)
        assert moved[:, :r].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_convolutions_count_once(reentrant: bool, tmp_path: Any) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            inside = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
            # A reentrant checkpoint passes gradients on only where its input requires them.
            h = inside(lambda x: self.second(torch.tanh(self.first(x))).flatten(2), x.requires_grad_())
            return {"loss": nn.functional.cross_entropy(self.head(h.square().mean(2)), labels)}

    model = Checkpointed(**CONVOLUTIONS["2d"])
    found = probe(in_order(rows("2d"), tmp_path, with_lora(model)), exact())
    plain = base("2d").double()
    labels = torch.tensor([row["labels"] for row in rows("2d")])
    weights = {name: getattr(plain, name).weight for name in ("first", "second", "head")}
    true = torch.autograd.grad(plain(inputs("2d").double(), labels)["loss"], list(weights.values()))
    assert_equal_gradients(found, {name: G.flatten(1) for name, G in zip(weights, true, strict=True)})


def test_images_in_another_memory_format_and_without_a_batch_give_the_same_rows(tmp_path: Any) -> None:
    conv, x = base("2d").first.double(), inputs("2d").double()
    dy = torch.randn_like(conv(x))
    G = torch.autograd.grad((conv(x) * dy).sum(), conv.weight)[0].flatten(1)
    last = lambda tensor: tensor.contiguous(memory_format=torch.channels_last)
    product = lambda pairs: sum((of_dy.T @ of_x for of_x, of_dy in pairs), torch.zeros(()))
    torch.testing.assert_close(product(rows_module.rows_of(conv, last(x), last(dy))), G)
    single = [pair for image in zip(x, dy, strict=True) for pair in rows_module.rows_of(conv, *image)]
    torch.testing.assert_close(product(single), G)


def resnet(seed: int = 0) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def test_the_head_of_a_resnet_is_warmed_up_before_its_convolutions_start(tmp_path: Any) -> None:
    """Only the head moves, and the batch norms' running means stay."""
    generator = torch.Generator().manual_seed(2)
    images = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3} for i in range(12)]
    model = tiny.with_lora(resnet(), target_modules=["convolution"], modules_to_save=["classifier"])
    config = LoRAGAConfig(num_samples=8, head_warmup_steps=3, head_warmup_learning_rate=1e-2)
    trainer = LoRAGATrainer(model, tiny.arguments(tmp_path), train_dataset=images, lora_ga_config=config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.create_optimizer()
    warm_up_heads(trainer, config)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "modules_to_save" in name}
    trainer.train()
    report = trainer.lora_ga_report
    assert sum(".convolution" in layer.name for layer in report.layers) == len(report.layers) > 5
    assert all(layer.action in (Action.INITIALISED, Action.OVERLAPPING) for layer in report.layers)
    model.save_pretrained(tmp_path / "saved")
    plain = PeftModel.from_pretrained(resnet(), tmp_path / "saved")
    # PEFT saves no running means, which training has moved.
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "running" in k}, strict=False)
    pixels = torch.stack([row["pixel_values"] for row in images])
    with torch.no_grad():
        assert torch.equal(plain.eval()(pixel_values=pixels).logits, model.eval()(pixel_values=pixels).logits)


@pytest.mark.parametrize("correction", ["lora_pro", "lora_pro_adamw"])
def test_lora_pro_refuses_convolutions_by_name(correction: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"first\.lora_A.* is a LoRA parameter but not a factor of a linear"):
        trained("2d", tmp_path, lora_ga={"correction": correction})


@pytest.mark.parametrize("init", ["none", "lora_one"])
def test_riemannian_preconditioning_refuses_convolutions_by_name(init: str, tmp_path: Any) -> None:
    """PEFT's optimizer would leave them out without a word."""
    with pytest.raises(ValueError, match=r"riemannian_reg=0\.01: first is a convolution.*target_modules"):
        trained("2d", tmp_path, lora_ga={"init": init, "riemannian_reg": 1e-2})


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    ("options", "failure"),
    [
        ({"groups": 2}, "Merging is not supported"),
        ({"dilation": 2}, "must match the size"),
        ({"dilation": 2, "padding": "same"}, None),
        ({"padding_mode": "circular", "padding": 1}, None),
    ],
)
def test_what_is_refused_is_no_change_of_the_weight_in_plain_peft(options: Any, failure: str | None) -> None:
    """It can't be merged or computed, or what is merged is another layer."""
    model = tiny.with_lora(nn.Sequential(nn.Conv2d(4, 4, 3, **options)), target_modules=["0"], init_lora_weights=False)
    x = torch.randn(2, 4, 8, 8)

    def merged_differs() -> bool:
        before = model(x)
        return not torch.allclose(model.merge_and_unload()(x), before, atol=1e-2)

    if failure is None:
        assert merged_differs()
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match=failure):
            merged_differs()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"groups": 2}, "groups=2"), ({"dilation": 2}, "dilation"), ({"padding_mode": "circular"}, "padding_mode")],
)
def test_convolutions_whose_adapter_is_no_product_are_refused(options: dict[str, Any], said: str) -> None:
    model = tiny.with_lora(nn.Sequential(nn.Conv2d(4, 4, 3, **options)), target_modules=["0"])
    with pytest.raises(ValueError, match=rf"Layer 0: Conv2d has {said}.*target_modules"):
        find_adapted_layers(model)
