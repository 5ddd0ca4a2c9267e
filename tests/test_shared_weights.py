"""A weight with several uses: `G` is the gradient through the adapted layer, and the layer is named."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_probe import assert_equal_gradients, causal_loss, exact, in_order, probe
from torch import Tensor, nn

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, estimate_gradients, find_adapted_layers
from lora_ga_trainer.gradients.sharing import WeightUses


class Twice(nn.Module):
    """Calls a layer, and hands its weight to functions in the way that `use` says."""

    def __init__(self, use: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.head, self.lookup = nn.Linear(6, 6, bias=False), nn.Linear(6, 3), nn.Linear(6, 6)
        self.use = use

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.shared(torch.tanh(self.lookup(x))))
        return {"loss": F.cross_entropy(self.head(h + self.other(h)), labels)}

    def other(self, h: Tensor, weight: Tensor | None = None) -> Tensor:
        W = self.shared.weight if weight is None else weight
        return {
            "linear": lambda: F.linear(h, W),
            "keyword": lambda: F.linear(input=h, weight=W),
            "matmul": lambda: h @ W.T,
            "cast": lambda: h @ W.to(h.dtype).t(),
            "stacked": lambda: h @ torch.stack([W, W]).sum(dim=0),
            "looked up": lambda: torch.tanh(F.embedding(torch.arange(h.shape[0]) % 6, W)) * h,
            "detached": lambda: h @ W.detach() + h @ W.data,
            "only its kind": lambda: h.to(W).type_as(W).to(W.dtype) * W.shape[0] + torch.zeros_like(W).sum(),
            "reference": lambda: h.detach() @ self._reference(W),
            "none": lambda: h,
        }[self.use]()

    @torch.no_grad()
    def _reference(self, W: Tensor) -> Tensor:
        return W @ W


DEPENDENT = ["linear", "keyword", "matmul", "cast", "stacked", "looked up"]
INDEPENDENT = ["detached", "only its kind", "reference", "none"]


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "labels": i % 3} for i in range(8)]


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}])
@pytest.mark.parametrize("use", DEPENDENT + INDEPENDENT)
def test_a_weight_used_by_its_layer_and_by_a_function(use: str, lora: Any, tmp_path: Any, caplog: Any) -> None:
    plain = Twice(use)
    adapted = tiny.with_lora(Twice(use), target_modules=["shared", "lookup"], **lora)
    settings = {"remove_unused_columns": False, "per_device_train_batch_size": 8}
    trainer = in_order(rows(), tmp_path, adapted, **settings)
    with caplog.at_level(logging.WARNING):
        estimate = estimate_gradients(trainer, exact(num_samples=8))
    # Through the layer alone: the function takes a copy of the weight that autograd does not connect with it.
    held = plain.shared.weight.detach().clone()
    other = plain.other
    plain.other = lambda h: other(h, held)
    loss = plain(**trainer.data_collator(rows()))["loss"]
    true = torch.autograd.grad(loss, [plain.shared.weight, plain.lookup.weight])
    found = {name: estimator.state()["G"].double() for name, estimator in estimate.estimators.items()}
    assert_equal_gradients(found, {name: G.double() for name, G in zip(("shared", "lookup"), true, strict=True)})
    shared = ["shared"] if use in DEPENDENT else []
    assert estimate.shared == shared
    warned = [record.getMessage() for record in caplog.records if "other uses" in record.getMessage()]
    assert len(warned) == len(shared)
    assert all("1 adapted layers" in text and ": shared." in text for text in warned)


@pytest.mark.parametrize("tie", [True, False])
def test_the_gradient_of_a_tied_head_is_the_one_through_the_head(tie: bool, tmp_path: Any, recwarn: Any) -> None:
    rows = tiny.causal_rows(8)
    plain = tiny.llama(tie_word_embeddings=tie)
    adapted = tiny.with_lora(tiny.llama(tie_word_embeddings=tie), target_modules=["lm_head", "q_proj"])
    trainer = in_order(rows, tmp_path, adapted, per_device_train_batch_size=8)
    estimate = estimate_gradients(trainer, exact(num_samples=8))
    found = {name: estimator.state()["G"].double() for name, estimator in estimate.estimators.items()}
    plain.model.embed_tokens.weight = nn.Parameter(plain.model.embed_tokens.weight.detach().clone())
    weights = [plain.get_submodule(name).weight for name in found]
    true = torch.autograd.grad(causal_loss(plain, rows), weights)
    assert_equal_gradients(found, {name: G.double() for name, G in zip(found, true, strict=True)})
    assert estimate.shared == (["lm_head"] if tie else [])


def test_two_layers_of_one_weight_get_a_gradient_each(tmp_path: Any) -> None:
    """Each has an adapter of its own."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.second(torch.tanh(self.first(x))))
            return {"loss": F.cross_entropy(self.head(h), labels)}

    plain = Tied()
    plain.second.weight = nn.Parameter(plain.first.weight.detach().clone())
    trainer = in_order(rows(), tmp_path, tiny.with_lora(Tied(), target_modules=["first", "second", "head"]))
    trainer.args.remove_unused_columns = False
    found = probe(trainer, exact(num_samples=8))
    loss = plain(**trainer.data_collator(rows()))["loss"]
    true = torch.autograd.grad(loss, [plain.get_submodule(name).weight for name in found])
    assert_equal_gradients(found, {name: G.double() for name, G in zip(found, true, strict=True)})


def test_a_copy_that_is_trained_unties_and_says_nothing(tmp_path: Any, recwarn: Any) -> None:
    """`modules_to_save` trains a copy of the embedding: the tied original does not run any more."""
    lora = {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}
    adapted = tiny.with_lora(tiny.llama(tie_word_embeddings=True), **lora)
    trainer = in_order(tiny.causal_rows(4), tmp_path, adapted)
    assert estimate_gradients(trainer, exact(num_samples=4)).shared == []


def test_the_report_and_a_file_of_gradients_name_the_layer(tmp_path: Any, caplog: Any) -> None:
    def run() -> LoRAGATrainer:
        adapted = tiny.with_lora(Twice("linear"), target_modules=["shared", "lookup"])
        trainer = LoRAGATrainer(
            adapted,
            tiny.arguments(tmp_path, max_steps=1, remove_unused_columns=False),
            train_dataset=rows(),
            lora_ga_config=LoRAGAConfig(num_samples=8, probe_file=str(tmp_path / "probe.safetensors")),
        )
        caplog.clear()
        trainer.train()
        assert sum("other uses" in record.getMessage() for record in caplog.records) == 1
        return trainer

    for trainer in (run(), run()):  # the second reads the file
        sharing = {layer.name: layer.shares_weight for layer in trainer.lora_ga_report.layers}
        assert sharing == {"shared": True, "lookup": False}


def test_watching_leaves_no_hook_and_keeps_no_tensor_alive(tmp_path: Any) -> None:
    adapted = tiny.with_lora(tiny.llama(tie_word_embeddings=False))
    trainer = in_order(tiny.causal_rows(4), tmp_path, adapted)
    uses = WeightUses(adapted, find_adapted_layers(adapted))

    def run_and_fail() -> None:
        adapted(**trainer.data_collator(tiny.causal_rows(2)))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), uses.watched():
        run_and_fail()
    assert uses.found == []
    assert len(uses._made_of) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in adapted.modules())
