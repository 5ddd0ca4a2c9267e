"""In the probe a loss finds the parameters that are trained as it does in training, and nothing is left in them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from spy import Spy
from test_probe import assert_equal_gradients, exact, in_order, probe
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.adapters.find import find_adapted_layers


# The losses and the names of what required grad. Kept beside the trainer, which gets its attributes back.
Found = list[tuple[float, list[str]]]


def regularised(found: Found, base: type[Trainer] = Trainer) -> Any:
    """O-LoRA and kin: the loss adds norms of the parameters that it finds to require grad."""

    class Regularised(base):
        def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            norms = torch.stack([parameter.norm() for name, parameter in trained.items() if "lora_A" in name])
            (again,) = torch.autograd.grad(loss, next(iter(trained.values())), retain_graph=True)
            loss = loss + 0.1 * norms.sum() + 0 * again.sum()
            found.append((loss.item(), list(trained)))
            return loss

    return Regularised


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_regulariser_of_the_adapter_finds_in_the_probe_what_it_finds_in_training(
    checkpointing: bool, tmp_path: Any
) -> None:
    rows = tiny.causal_rows(8, ragged=False)
    settings = {"train_sampling_strategy": "sequential", "max_steps": 1, "learning_rate": 0.0}

    def made(kind: Any) -> Any:
        adapted = tiny.with_lora(tiny.llama(), target_modules=["q_proj", "v_proj"])
        if checkpointing:
            tiny.checkpoint_activations(adapted, use_reentrant=False)
        return kind(adapted, tiny.arguments(tmp_path, **settings), train_dataset=rows)

    in_training: Found = []
    in_probe: Found = []
    made(regularised(in_training)).train()
    trainer = made(regularised(in_probe))
    before = Spy(trainer)
    found = probe(trainer, exact(num_samples=4))
    before.assert_same(Spy(trainer))
    assert len(in_training) == 1
    assert in_probe == in_training
    # A regulariser of the adapter moves the loss, and not its gradient with respect to the frozen weights.
    assert_equal_gradients(found, probe(made(Trainer), exact(num_samples=4)), rtol=1e-6)


def test_the_warm_up_of_a_head_shows_a_loss_the_same(tmp_path: Any) -> None:
    adapted = tiny.with_lora(tiny.bert(), target_modules=["query"], task_type="SEQ_CLS")
    config = LoRAGAConfig(num_samples=4, head_warmup_steps=2)
    found: Found = []
    trainer = regularised(found, LoRAGATrainer)(
        adapted, tiny.arguments(tmp_path, max_steps=1), train_dataset=tiny.class_rows(8), lora_ga_config=config
    )
    trainer.train()
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    # Two steps of the warm-up, the probe twice (a long first round), the loss after it, and one step of training.
    assert len(found) >= 5
    assert all(names == trained for _, names in found)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_probe_computes_no_gradient_that_it_leaves_behind(reentrant: bool | None, tmp_path: Any) -> None:
    """Hooks on parameters reduce, step and count in training: the probe calls none and leaves all of them in place."""
    adapted = tiny.with_lora(tiny.bert(), task_type="SEQ_CLS")
    if reentrant is not None:
        tiny.checkpoint_activations(adapted, use_reentrant=reentrant)
        adapted.enable_input_require_grads()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    calls: list[str] = []
    for name, parameter in trained.items():
        parameter.register_hook(lambda gradient, name=name: calls.append(f"{name} tensor"))
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: calls.append(f"{name} accumulated"))
    held = next(iter(trained.values()))
    held.grad = torch.full_like(held, 7.0)
    trainer = in_order(tiny.class_rows(8), tmp_path, adapted)
    before = Spy(trainer)
    probe(trainer, exact(num_samples=8))
    before.assert_same(Spy(trainer))
    assert calls == []
    adapted(**trainer.data_collator(tiny.class_rows(2))).loss.backward()
    assert set(calls) == {f"{name} {kind}" for name in trained for kind in ("tensor", "accumulated")}


def test_hooks_and_gradients_are_given_back_after_a_failing_backward_pass(tmp_path: Any) -> None:
    class Failing(Trainer):
        def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            loss.register_hook(fail)
            return loss

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("in the backward pass")

    adapted = tiny.with_lora(tiny.llama())
    parameter = find_adapted_layers(adapted)[0].stored_B
    calls: list[int] = []
    parameter.register_hook(lambda gradient: calls.append(1))
    trainer = Failing(adapted, tiny.arguments(tmp_path), train_dataset=tiny.causal_rows(8))
    before = Spy(trainer)
    with pytest.raises(RuntimeError, match="in the backward pass"):
        probe(trainer, exact(num_samples=8))
    before.assert_same(Spy(trainer))
    adapted(**trainer.data_collator(tiny.causal_rows(2))).loss.backward()
    assert calls == [1]


class Checkpointed(nn.Module):
    """A model whose own code runs its layers under checkpoints of the older, reentrant kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor, use_reentrant: bool = True) -> dict[str, Tensor]:
        x = self.embed(x)
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, use_reentrant=use_reentrant)
        return {"loss": nn.functional.cross_entropy(self.head(x), labels)}


def checkpointed_rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(5, generator=generator), "labels": i % 3} for i in range(8)]


@pytest.mark.parametrize("first", ["adapted", "trained"])
def test_a_models_own_reentrant_checkpoints_are_seen_through(first: str, tmp_path: Any) -> None:
    """The input of the first layer of a checkpoint requires grad because a trained layer made it."""
    torch.manual_seed(0)
    plain = Checkpointed()
    targets = ["0", "1", "2", "head"]
    lora: dict[str, Any] = {"target_modules": [*targets, "embed"] if first == "adapted" else targets}
    if first == "trained":
        lora["modules_to_save"] = ["embed"]
    adapted = tiny.with_lora(plain, **lora)
    trainer = in_order(checkpointed_rows(), tmp_path, adapted, remove_unused_columns=False)
    found = probe(trainer, exact(num_samples=8))
    layers = find_adapted_layers(adapted)
    batch = trainer.data_collator(checkpointed_rows())
    for layer in layers:
        layer.weight.requires_grad_(True)
    loss = adapted(**batch, use_reentrant=False)["loss"]
    true = torch.autograd.grad(loss, [layer.weight for layer in layers])
    assert_equal_gradients(found, {layer.name: G.double() for layer, G in zip(layers, true, strict=True)})


def test_a_checkpoint_that_plain_training_can_not_see_through_starts_plain(tmp_path: Any, caplog: Any) -> None:
    """Nothing before the first layer is trained: torch cuts the graph there, in plain training as in the probe."""
    torch.manual_seed(0)
    adapted = tiny.with_lora(Checkpointed(), target_modules=["0", "1", "2", "head"])
    trainer = LoRAGATrainer(
        adapted,
        tiny.arguments(tmp_path, remove_unused_columns=False),
        train_dataset=checkpointed_rows(),
        lora_ga_config=LoRAGAConfig(num_samples=8),
    )
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        trainer.train()
    started = {layer.name: not layer.action.is_plain for layer in trainer.lora_ga_report.layers}
    assert started == {"layers.0": False, "layers.1": False, "layers.2": False, "head": True}
    moved = {layer.name: bool(layer.stored_B[:, : layer.rank].any()) for layer in find_adapted_layers(adapted)}
    assert moved == started


@pytest.mark.parametrize("another", [False, True])
def test_a_reference_that_runs_with_gradients_does_not_count(another: bool, tmp_path: Any) -> None:
    """With the adapter off, or another one on, the adapter that is trained takes no part in what a layer computes."""

    class Leaning(Trainer):
        def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
            outputs = model(**inputs)
            if another:
                model.set_adapter("ref")
                reference = model(**inputs).logits
                model.set_adapter("default")
            else:
                with model.disable_adapter():
                    reference = model(**inputs).logits
            return outputs.loss + (outputs.logits * reference).mean() + reference.square().sum()

    rows = tiny.causal_rows(8, ragged=False)
    adapted = tiny.with_lora(tiny.llama(), target_modules=["q_proj", "down_proj"])
    if another:
        adapted.add_adapter("ref", adapted.peft_config["default"])
    trainer = Leaning(adapted, tiny.arguments(tmp_path, train_sampling_strategy="sequential"), train_dataset=rows)
    before = Spy(trainer)
    found = probe(trainer, exact(num_samples=4))
    before.assert_same(Spy(trainer))
    plain, base = tiny.llama(), tiny.llama()
    batch = trainer.data_collator(rows[:4])
    outputs = plain(**batch)
    loss = outputs.loss + (outputs.logits * base(**batch).logits.detach()).mean()
    weights = [plain.get_submodule(name).weight for name in found]
    true = torch.autograd.grad(loss, weights)
    assert_equal_gradients(found, {name: G.double() for name, G in zip(found, true, strict=True)})
