"""A micro-batch is never cut: whatever the Trainer can train on is probed, with the loss that is trained."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import tiny
import torch
from torch import Tensor, nn
from transformers import Trainer

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, estimate_gradients


F = nn.functional


class Towers(nn.Module):
    """Two towers whose rows are each other's negatives, behind a batch norm: no row's loss is its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.BatchNorm1d(12), nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, q: Tensor, d: Tensor) -> dict[str, Tensor]:
        x, y = F.normalize(self.a(self.norm(q)), dim=-1), F.normalize(self.b(d), dim=-1)
        return {"loss": F.cross_entropy(5 * x @ y.T, torch.arange(len(x))), "logits": x}


def tower_rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{key: torch.randn(12, generator=generator) for key in "qd"} for _ in range(count)]


def stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def make(
    folder: Any, model: nn.Module, rows: list[Any], size: int, kind: type = Trainer, collator: Any = None, **more: Any
):
    args = tiny.arguments(
        folder,
        per_device_train_batch_size=size,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        max_steps=2,
    )
    return kind(model, args, train_dataset=rows, data_collator=collator, **more)


def probe(trainer: Trainer, samples: int, **config: Any) -> tuple[dict[str, Tensor], Any]:
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    estimate = estimate_gradients(
        trainer, LoRAGAConfig(num_samples=samples, estimator="exact", probe_order="train", **config)
    )
    return {name: found.state()["G"].double() for name, found in estimate.estimators.items()}, estimate


def assert_equal(found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert found.keys() == true.keys()
    for name, G in true.items():
        assert (found[name] - G).norm() < 2e-6 * G.norm(), name


@pytest.mark.parametrize(("asked", "used"), [(8, 8), (5, 8), (9, 12), (1, 4), (14, 14)])
def test_a_loss_over_the_batch_is_that_of_whole_batches(asked: int, used: int, tmp_path: Any) -> None:
    """`sum items_i loss_i / sum items_i` of batches of 4, the last one of 2, under one `autograd.grad`."""
    rows = tower_rows(14)
    adapted = tiny.with_lora(Towers(), target_modules=["a", "b"])
    found, estimate = probe(make(tmp_path, adapted, rows, 4), asked)
    assert estimate.samples == estimate.items == used
    plain = Towers().train()
    parts = [rows[first : min(first + 4, used)] for first in range(0, used, 4)]
    loss = lambda: sum(len(part) * plain(**stack(part))["loss"] for part in parts) / used
    assert estimate.loss == pytest.approx(loss().item(), rel=1e-6)
    assert_equal(found, reference.whole_sample_gradient(plain, ["a", "b"], loss))


def test_the_loss_before_is_that_of_the_first_training_step(tmp_path: Any) -> None:
    """In-batch negatives of 16: cut at turning points, fewer negatives would make it a smaller one."""
    rows = tower_rows(16)
    model = tiny.with_lora(Towers(), target_modules=["a", "b"])
    trainer = make(tmp_path, model, rows, 16, LoRAGATrainer, lora_ga_config=LoRAGAConfig(num_samples=16))
    trainer.train()
    first = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert trainer.lora_ga_report.loss_before == pytest.approx(float(first), rel=1e-3)
    assert trainer.lora_ga_report.samples == 16


def own_words(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What TRL's ORPO and CPO collate: a list of strings comes first."""
    return {"prompt": [f"row {i}" for i in range(len(samples))], **stack(samples)}


def nested(samples: list[dict[str, Any]]) -> dict[str, Any]:
    whole = stack(samples)
    return {"text": {key: whole[key] for key in ("input_ids", "attention_mask")}, "labels": whole["labels"]}


def pair(samples: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
    whole = stack(samples)
    return {key: whole[key] for key in ("input_ids", "attention_mask")}, whole["labels"]


class Unpacking(Trainer):
    """Computes the loss of a causal model on batches of any of these forms, taking entries out of nested ones."""

    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(inputs, tuple):
            text, labels = inputs
        elif "text" in inputs:
            text, labels = inputs["text"], inputs["labels"]
        else:
            inputs.pop("prompt")
            text, labels = inputs, inputs.pop("labels")
        mask = text.pop("attention_mask")
        logits = model(**text, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten())


@pytest.mark.parametrize("collate", [own_words, nested, pair])
def test_batches_of_any_form_are_probed(collate: Any, tmp_path: Any) -> None:
    """Rows of one length without ignored labels, so that samples and label tokens weigh alike."""
    rows = tiny.causal_rows(10, ragged=False)
    trainer = make(tmp_path, tiny.with_lora(tiny.llama()), rows, 4, Unpacking, collate)
    found, estimate = probe(trainer, 6)
    assert estimate.samples == 8
    plain, batch = tiny.llama().eval(), stack(rows[:8])

    def loss() -> Tensor:
        logits = plain(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"][:, 1:].flatten())

    assert_equal(found, reference.whole_sample_gradient(plain, list(found), loss))
    ours = type("Ours", (Unpacking, LoRAGATrainer), {})
    whole = make(
        tmp_path, tiny.with_lora(tiny.llama()), rows, 4, ours, collate, lora_ga_config=LoRAGAConfig(num_samples=6)
    )
    assert whole.train().global_step == 2


class Pictures(nn.Module):
    """Adds what its patches show to each row; rows have different numbers of patches, all in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.see, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, patches: Tensor, owner: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if int(owner.max()) + 1 != len(labels):
            raise ValueError("Image features and image tokens do not match")
        shown = torch.zeros(len(labels), 5).index_add(0, owner, torch.tanh(self.see(patches)))
        return {"loss": F.cross_entropy(self.head(shown), labels)}


def collate_pictures(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    counts = [len(sample["patches"]) for sample in samples]
    return {
        "patches": torch.cat([sample["patches"] for sample in samples]),
        "owner": torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts)),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_several_images_a_row_stay_with_their_row(size: int, tmp_path: Any) -> None:
    """As many patches as rows in some batches, more in others: neither is taken for the number of samples."""
    torch.manual_seed(2)
    rows = [{"patches": torch.randn((0, 2, 1, 3)[i % 4] + (i == 8), 6), "labels": i % 3} for i in range(9)]
    rows[0]["patches"] = torch.randn(1, 6)
    rows[4]["patches"] = torch.randn(2, 6)
    adapted = tiny.with_lora(Pictures(), target_modules=["see", "head"])
    found, estimate = probe(make(tmp_path, adapted, rows, size, collator=collate_pictures), 9)
    assert estimate.samples == estimate.items == 9
    plain = Pictures()
    loss = lambda: plain(**collate_pictures(rows))["loss"]
    assert_equal(found, reference.whole_sample_gradient(plain, ["see", "head"], loss))


def test_sketches_turn_at_the_end_of_the_batch_that_a_turning_point_falls_into(
    tmp_path: Any, monkeypatch: Any
) -> None:
    """
    16 samples turn after 1, 4 and 8; in batches of 3 that is after 3, 6 and 9.

    A first batch of more than a quarter is run once beforehand, for its directions: 8 of 16, and all of them.
    """
    from lora_ga_trainer.gradients import collector

    turned = []
    monkeypatch.setattr(collector.Collector, "turn", lambda self: turned.append(calls[0]))
    for size, expected in ((1, [1, 4, 8]), (3, [3, 6, 9]), (8, [8, 16]), (16, [16])):
        turned.clear()
        trainer = make(tmp_path, tiny.with_lora(tiny.llama(hidden_size=64), r=1), tiny.causal_rows(16), size)
        calls, compute = [0], trainer.compute_loss

        def counted(*args: Any, calls: Any = calls, compute: Any = compute, **kwargs: Any) -> Any:
            calls[0] += len(args[1]["input_ids"])
            return compute(*args, **kwargs)

        trainer.compute_loss = counted
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
        estimate = estimate_gradients(trainer, LoRAGAConfig(num_samples=16, sketch_size=2, min_energy_kept=None))
        assert any(found.sketched for found in estimate.estimators.values())
        assert turned == expected, size


def test_a_batch_that_is_looked_at_first_counts_once(tmp_path: Any) -> None:
    """The last 16 columns of a sketch gather every sample: they are `G` times Gaussians, and so is an exact layer."""
    rows = tiny.causal_rows(8)
    model = lambda: tiny.with_lora(tiny.llama(hidden_size=64), r=1)
    true, counts = probe(make(tmp_path, model(), rows, 8), 8)
    trainer = make(tmp_path, model(), rows, 8)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    estimate = estimate_gradients(trainer, LoRAGAConfig(num_samples=8, sketch_size=6, min_energy_kept=None))
    assert (estimate.samples, estimate.items, estimate.tokens) == (counts.samples, counts.items, counts.tokens)
    assert {found.sketched for found in estimate.estimators.values()} == {True, False}
    for name, found in estimate.estimators.items():
        G, state = true[name], {key: value.double() for key, value in found.state().items()}
        if not found.sketched:
            assert (state["G"] - G).norm() < 1e-6 * G.norm(), name
            continue
        expected = G @ state["Omega"]  # the first columns are directions: of one batch they saw all as well
        assert (state["Y"] - expected).norm() < 1e-5 * expected.norm(), name
        assert not state["S"].any()
