"""sentence-transformers: its own `add_adapter`, and a `PeftModel` inside or around a `SentenceTransformer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import native
import optional
import pytest
import tiny_trl
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lora_ga_trainer import LoRAGAConfig, LoRAGAMixin, find_adapted_layers, load_adapter
from lora_ga_trainer.saving.record import read_record


ROWS = [{"anchor": row["a"], "positive": row["b"]} for row in tiny_trl.rows(32, "a", "b")]


@pytest.fixture(autouse=True)
def takes_this_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    native.let_transformers_take_this_peft(monkeypatch)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, vocab_size=97, max_position_embeddings=64)).save_pretrained(tmp_path / "base")
    tiny_trl.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(way: str, base: Path) -> nn.Module:
    library = optional.require("sentence_transformers")
    model, config = library.SentenceTransformer(str(base), device="cpu"), LoraConfig(r=4, target_modules=["query"])
    torch.manual_seed(0)
    if way == "native":
        model.add_adapter(config)
    elif way == "inside":
        model[0].model = get_peft_model(model[0].model, config)
    elif way == "around":
        model = get_peft_model(model, config)
    else:
        inject_adapter_in_model(config, model)
    return model


def trainer_of(model: nn.Module, folder: Path, mine: bool = True, **fields: Any) -> Any:
    library = optional.require("sentence_transformers")
    losses = optional.require("sentence_transformers.sentence_transformer.losses")
    kind, extra = library.SentenceTransformerTrainer, {}
    if mine:
        kind = type("Mine", (LoRAGAMixin, kind), {})
        extra["lora_ga_config"] = LoRAGAConfig(num_samples=8, **fields)
    settings = tiny_trl.settings(folder, max_steps=4, save_strategy="steps", save_steps=2)
    return kind(
        model,
        library.SentenceTransformerTrainingArguments(**settings),
        train_dataset=Dataset.from_list(ROWS),
        loss=losses.MultipleNegativesRankingLoss(model),
        **extra,
    )


def encoded(model: nn.Module) -> Tensor:
    return model.eval().encode(["a b", "c d e"], convert_to_tensor=True)


@pytest.mark.parametrize("way", ["native", "inside", "around", "injected"])
def test_a_resumed_run_ends_where_the_whole_run_does(way: str, base: Path, tmp_path: Path) -> None:
    whole, resumed = adapted(way, base), adapted(way, base)
    trainer_of(whole, tmp_path / "out").train()
    assert len(find_adapted_layers(whole)) == 2
    assert read_record(tmp_path / "out" / "checkpoint-2") is not None
    again = trainer_of(resumed, tmp_path / "out")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("way", ["native", "inside", "around"])
def test_the_base_gives_the_output_until_the_first_step(way: str, base: Path, tmp_path: Path) -> None:
    model = adapted(way, base)
    trainer = trainer_of(model, tmp_path / "out")
    trainer.args.learning_rate = 0.0
    clean = encoded(optional.require("sentence_transformers").SentenceTransformer(str(base), device="cpu"))
    trainer.train()
    assert all(layer.stored_B.any() for layer in find_adapted_layers(model))
    assert torch.equal(encoded(model), clean)


@pytest.mark.parametrize("way", ["native", "inside"])
def test_the_folder_is_a_sentence_transformer_that_can_be_trained_further(
    way: str, base: Path, tmp_path: Path
) -> None:
    model = adapted(way, base)
    trainer_of(model, tmp_path / "out").train()
    folder = tmp_path / "out" / "checkpoint-4"
    loaded = optional.require("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
    assert torch.equal(encoded(loaded), encoded(model))
    assert load_adapter(loaded, folder) is loaded
    assert all(layer.is_anchored for layer in find_adapted_layers(loaded))
    assert torch.equal(encoded(loaded), encoded(model))


def test_an_adapter_around_the_whole_is_read_by_peft(base: Path, tmp_path: Path) -> None:
    model = adapted("around", base)
    trainer_of(model, tmp_path / "out").train()
    clean = optional.require("sentence_transformers").SentenceTransformer(str(base), device="cpu")
    loaded = PeftModel.from_pretrained(clean, tmp_path / "out" / "checkpoint-4")
    assert torch.equal(encoded(loaded), encoded(model))
