"""Convolutions start, anchor, save and merge by the laws of linear layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from test_probe import assert_equal_gradients, exact, in_order, probe
from torch import Tensor, nn

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, export_adapter, load_adapter
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.gradients import rows as rows_module


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1d": {"kind": nn.Conv1d, "kernel_size": 3, "stride": 2, "padding": 1},
    "1d same": {"kind": nn.Conv1d, "kernel_size": 4, "padding": "same"},
    "2d": {"kind": nn.Conv2d, "kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 2)},
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


def trained(kind: str, folder: Any, **changes: Any) -> LoRAGATrainer:
    arguments = tiny.arguments(folder, **({"learning_rate": 1e-2} | changes))
    config = LoRAGAConfig(num_samples=8, estimator="exact")
    trainer = LoRAGATrainer(with_lora(base(kind)), arguments, train_dataset=rows(kind, 16), lora_ga_config=config)
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


def test_resuming_gives_the_same_run(tmp_path: Any) -> None:
    whole = trained("2d", tmp_path, save_strategy="steps", save_steps=2).model
    arguments = tiny.arguments(tmp_path, learning_rate=1e-2)
    config = LoRAGAConfig(num_samples=8, estimator="exact")
    again = LoRAGATrainer(with_lora(base("2d")), arguments, train_dataset=rows("2d", 16), lora_ga_config=config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("options", "said"),
    [({"groups": 2}, "groups=2"), ({"dilation": 2}, "dilation"), ({"padding_mode": "circular"}, "padding_mode")],
)
def test_convolutions_whose_adapter_is_no_product_are_refused(options: dict[str, Any], said: str) -> None:
    model = tiny.with_lora(nn.Sequential(nn.Conv2d(4, 4, 3, **options)), target_modules=["0"])
    with pytest.raises(ValueError, match=rf"Layer 0: Conv2d has {said}.*target_modules"):
        find_adapted_layers(model)
