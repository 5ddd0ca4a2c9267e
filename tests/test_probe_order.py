"""The probe draws its samples at random from the data set, or reads those that training reads first."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference
import tiny
import torch
from test_probe import assert_equal_gradients, causal_loss, exact, probe
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, estimate_gradients


def make(folder: Any, rows: Any, kind: type = Trainer, **changes: Any) -> Any:
    more = {"lora_ga_config": changes.pop("config")} if "config" in changes else {}
    more["data_collator"] = changes.pop("data_collator", None)
    trainer = kind(
        tiny.with_lora(tiny.llama(), target_modules=["q_proj", "up_proj"]),
        tiny.arguments(folder, **changes),
        train_dataset=rows,
        **more,
    )
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def drawn(rows: list[Any], seed: int, count: int) -> list[Any]:
    """What a permutation by `probe_seed` begins with."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[index] for index in order[:count]]


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("seed", [0, 5])
def test_samples_are_those_that_the_probes_seed_draws(strategy: str, seed: int, tmp_path: Any) -> None:
    """Neither the order nor the seed of training has a say."""
    rows = tiny.causal_rows(40)
    trainer = make(tmp_path, rows, train_sampling_strategy=strategy, seed=7, data_seed=9)
    found = probe(trainer, exact(num_samples=8, probe_order="random", probe_seed=seed))
    plain = tiny.llama().eval()
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, drawn(rows, seed, 8)))
    assert_equal_gradients(found, true)


def test_random_is_the_default_and_batches_do_not_matter(tmp_path: Any) -> None:
    rows = tiny.causal_rows(40)
    assert LoRAGAConfig().probe_order == "random"
    estimates = []
    for size in (8, 4, 2, 1):
        trainer = make(tmp_path, rows, per_device_train_batch_size=size)
        estimate = estimate_gradients(trainer, LoRAGAConfig(num_samples=8, estimator="exact"))
        estimates.append({name: found.state()["G"].double() for name, found in estimate.estimators.items()})
    for one, other in itertools.pairwise(estimates):
        assert_equal_gradients(one, other)


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    pad = lambda name, value: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}


@pytest.mark.parametrize("order", ["random", "train"])
def test_length_grouped_data_is_seen_at_its_mean_length_unless_the_train_order_is_asked_for(
    order: str, tmp_path: Any
) -> None:
    """The sampler that groups by length begins with its longest rows."""
    rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in range(4, 60) for _ in range(8)]
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    settings = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 8}
    trainer = make(tmp_path, rows, data_collator=padded, **settings)
    estimate = estimate_gradients(trainer, exact(num_samples=64, probe_order=order))
    seen = estimate.items / estimate.samples + 1
    assert abs(seen - mean) < 4 if order == "random" else seen > mean + 8


def test_the_train_order_reads_what_training_reads_first(tmp_path: Any) -> None:
    rows, first = tiny.causal_rows(40), []

    class Seen(LoRAGATrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            first.append(inputs["input_ids"].clone())
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = make(tmp_path, rows, Seen, config=LoRAGAConfig(num_samples=8, probe_order="train"))
    found = probe(trainer, exact(num_samples=8, probe_order="train"))
    trainer.train()
    by_ids = {tuple(row["input_ids"].tolist()): row for row in rows}
    read = [by_ids[tuple(ids)] for batch in first[:2] for ids in batch.tolist()]
    plain = tiny.llama().eval()
    assert_equal_gradients(
        found, reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, read))
    )


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, 4, collate_fn=self.data_collator)


class OwnSampler(Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("kind", [OwnLoader, OwnSampler])
def test_a_sampler_or_loader_of_its_own_keeps_its_order(kind: type, tmp_path: Any, caplog: Any) -> None:
    rows = tiny.causal_rows(40)
    trainer = make(tmp_path, rows, kind)
    with caplog.at_level("INFO", logger="lora_ga_trainer"):
        found = probe(trainer, exact(num_samples=8, probe_order="random"))
    assert f"{kind.__name__} has a sampler or a data loader of its own" in caplog.text
    plain = tiny.llama().eval()
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows[:8]))
    assert_equal_gradients(found, true)


def test_a_probe_file_is_of_one_order(tmp_path: Any) -> None:
    rows, path = tiny.causal_rows(40), str(tmp_path / "probe.safetensors")
    config = lambda **more: LoRAGAConfig(num_samples=8, probe_file=path, **more)
    make(tmp_path, rows, LoRAGATrainer, config=config()).train()
    make(tmp_path, rows, LoRAGATrainer, config=config(), seed=8).train()
    for other in ({"probe_order": "train"}, {"probe_seed": 1}):
        with pytest.raises(ValueError, match="its settings is"):
            make(tmp_path, rows, LoRAGATrainer, config=config(**other)).train()


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"probe_order='sorted' is unknown\. Choose one of random, train"):
        LoRAGAConfig(probe_order="sorted")
