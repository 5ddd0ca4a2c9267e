"""LoRA dropout: masks of columns of `A` and rows of `B`, and the mean over them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from test_trainer import adapter_of, assert_bitwise
from torch import Tensor
from transformers import Trainer

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGATrainer, find_adapted_layers
from lora_ga_trainer.adapters.dropout import dropped_factors, mean_of


P = 0.25


def swap(folder: Any, lora_ga: dict[str, Any], lora: dict[str, Any] | None = None, **changes: Any) -> LoRAGATrainer:
    torch.manual_seed(11)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | (lora or {})
    return LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(folder, **changes),
        train_dataset=tiny.causal_rows(24),
        eval_dataset=tiny.causal_rows(6, seed=5),
        peft_config=LoraConfig(**settings),
        lora_ga_config=LoRAGAConfig(**({"num_samples": 8} | lora_ga)),
    )


def change_of(layer: Any) -> Tensor:  # (out, in), fp32
    """What the adapter adds to `W`, column by column."""
    x = torch.eye(layer.shape[1])
    return (layer.module(x) - layer.base(x)).T


@pytest.mark.parametrize("init", ["none", "lora_ga"])
def test_a_masked_change_is_that_of_masked_factors_and_its_mean_is_the_change(init: str, tmp_path: Any) -> None:
    trainer = swap(tmp_path, {"init": init}, learning_rate=1e-2)
    trainer.train()
    layer = find_adapted_layers(trainer.model)[0]
    with torch.no_grad():
        s_BA, total = layer.s * layer.stored_B @ layer.stored_A, torch.zeros(layer.shape)
        layer.module.train()
        with dropped_factors([layer], P):
            for _ in range(2000):
                masked = change_of(layer)
                total += masked
        rows, columns = masked.any(dim=1), masked.any(dim=0)
        expected = s_BA * rows[:, None] * columns / (1 - P) ** 2
        torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)
        assert 0 < (~rows).sum() < len(rows)
        assert 0 < (~columns).sum() < len(columns)
        # The variance of a product of two masks is 1 / (1 - p)^2 - 1; five standard errors.
        error = s_BA.abs() * ((1 / (1 - P) ** 2 - 1) / 2000) ** 0.5
        assert ((total / 2000 - s_BA).abs() <= 5 * error + 1e-5).all()
        torch.testing.assert_close(change_of(layer), s_BA, rtol=1e-4, atol=1e-5)


def test_masks_are_drawn_in_training_alone_and_end_with_it(tmp_path: Any) -> None:
    trainer = swap(tmp_path, {"factor_dropout": P}, eval_strategy="steps", eval_steps=2)
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())
    before = hooks()
    trainer.train()
    assert hooks() == before
    plain = swap(tmp_path, {})
    plain.train()
    # The start is the same, and what is trained is not.
    values = lambda t: [layer.singular_values for layer in t.lora_ga_report.layers]
    assert values(plain) == values(trainer)
    assert trainer.lora_ga_report.loss_after == trainer.lora_ga_report.loss_before
    assert all(not torch.equal(value, adapter_of(plain)[name]) for name, value in adapter_of(trainer).items())
    again = swap(tmp_path, {"factor_dropout": P}, eval_strategy="steps", eval_steps=2)
    again.train()
    assert_bitwise(adapter_of(trainer), adapter_of(again))
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_a_step_with_masks_is_that_of_a_twin_whose_factors_are_masked(tmp_path: Any) -> None:
    """The gradients of both factors, in fp64, where the masks are known."""
    trainer = swap(tmp_path, {"init": "none"}, learning_rate=1e-2)
    trainer.train()
    layer = find_adapted_layers(trainer.model.double().train())[0]
    x, dy = torch.randn(7, layer.shape[1]).double(), torch.randn(7, layer.shape[0]).double()
    with dropped_factors([layer], P):
        torch.manual_seed(3)
        (layer.module(x) * dy).sum().backward()
    torch.manual_seed(3)
    of_columns = (torch.rand(layer.shape[1]) >= P).double() / (1 - P)
    of_rows = (torch.rand(layer.shape[0]) >= P).double() / (1 - P)
    A, B = (factor.detach().clone().requires_grad_() for factor in (layer.stored_A, layer.stored_B))
    masked = layer.s * (of_rows[:, None] * B) @ (A * of_columns)
    ((x @ masked.T) * dy).sum().backward()
    torch.testing.assert_close(layer.stored_A.grad, A.grad)
    torch.testing.assert_close(layer.stored_B.grad, B.grad)


def test_an_ensemble_is_the_mean_over_masks_and_costs_training_no_random_number(tmp_path: Any) -> None:
    wanted = {"factor_dropout": P, "factor_dropout_ensemble": 3}
    trainer = swap(tmp_path, wanted, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=6)
    trainer.train()
    plain = swap(tmp_path, {"factor_dropout": P}, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=6)
    plain.train()
    assert_bitwise(adapter_of(trainer), adapter_of(plain))
    found = trainer.predict(trainer.eval_dataset)
    layers, batch = (
        find_adapted_layers(trainer.model),
        {
            key: torch.stack([row[key] for row in tiny.causal_rows(6, seed=5)])
            for key in ("input_ids", "attention_mask")
        },
    )
    generator, members = torch.Generator().manual_seed(trainer.args.seed), []
    trainer.model.eval()
    with torch.no_grad(), dropped_factors(layers, P, in_eval=True, generator=generator):
        members = [trainer.model(**batch).logits for _ in range(3)]
    assert not torch.equal(members[0], members[1])
    torch.testing.assert_close(torch.from_numpy(found.predictions), torch.stack(members).mean(dim=0))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found.metrics["test_loss"])
    assert plain.evaluate()["eval_loss"] != pytest.approx(found.metrics["test_loss"], rel=1e-6)


def test_the_mean_is_taken_in_tuples_and_dictionaries_too() -> None:
    values = iter([1.0, 2.0, 6.0])

    def predict() -> Any:
        value = torch.tensor(next(values))
        return value, (value, {"more": 2 * value, "whole": torch.tensor(7)}), torch.tensor([5])

    loss, logits, labels = mean_of(3, predict)
    assert (loss, logits[0], logits[1]["more"], logits[1]["whole"]) == (3, 3, 6, 7)
    assert labels == torch.tensor([5])
    assert mean_of(2, lambda: (None, None, None)) == (None, None, None)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"factor_dropout": 1.0}, "from 0 to below 1"),
        ({"factor_dropout": "0.1"}, "from 0 to below 1"),
        ({"factor_dropout": 0.1, "correction": "lora_pro"}, "does not go with correction='lora_pro'"),
        ({"factor_dropout_ensemble": 4}, "with factor_dropout=0 there are none"),
    ],
)
def test_what_can_not_be_dropped_is_refused(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAGAConfig(**wanted)


def test_layers_without_plain_factors_are_refused_by_name(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"q_proj \(Linear with DoRA\): factor_dropout is for LoRA on linear layers"):
        swap(tmp_path, {"factor_dropout": P}, {"use_dora": True})
    with pytest.raises(ValueError, match=r"embed_tokens \(Embedding\): factor_dropout"):
        swap(tmp_path, {"factor_dropout": P}, {"target_modules": ["embed_tokens"]})


def test_the_callback_alone_drops_and_has_no_ensemble(tmp_path: Any) -> None:
    def with_callback(config: LoRAGAConfig) -> Trainer:
        model = tiny.with_lora(tiny.llama())
        trainer = Trainer(model, tiny.arguments(tmp_path), train_dataset=tiny.causal_rows(24))
        trainer.add_callback(LoRAGACallback(trainer, config))
        return trainer

    ends = []
    for p in (0.0, P):
        trainer = with_callback(LoRAGAConfig(num_samples=8, factor_dropout=p))
        trainer.train()
        ends.append(adapter_of(trainer))
    assert any(not torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    with pytest.raises(ValueError, match=r"factor_dropout_ensemble=2 .* callback has no say"):
        with_callback(LoRAGAConfig(factor_dropout=P, factor_dropout_ensemble=2))
