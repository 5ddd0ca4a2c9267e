"""Adapters that PEFT makes from an anchored one, and variants of LoRA: a right start, or a refusal by name."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import Trainer

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, load_adapter
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.saving.record import read_record, record_of_model


SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def trained(model, folder, kind=LoRAGATrainer, seed=1, **config):
    if kind is LoRAGATrainer:
        config = {"lora_ga_config": LoRAGAConfig(**({"num_samples": 8} | config))}
    trainer = kind(model, tiny.arguments(folder), train_dataset=tiny.causal_rows(16, seed=seed), **config)
    trainer.train()
    return trainer


def first_anchored(folder, **changes):
    model = get_peft_model(tiny.llama(), LoraConfig(**(SETTINGS | changes)), adapter_name="one")
    trained(model, folder)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.stack([row["input_ids"] for row in tiny.causal_rows(4)])).logits


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_a_second_adapter_from_the_config_of_an_anchored_one_gets_its_own_start(changes, tmp_path):
    model = first_anchored(tmp_path, **changes)
    first = {name: value.clone() for name, value in model.state_dict().items() if ".one." in name}
    model.add_adapter("two", model.peft_config["one"])
    model.set_adapter("two")
    trainer = trained(model, tmp_path, seed=2)
    assert trainer.lora_ga_report.metrics()["lora_ga/layers_initialised"] == len(find_adapted_layers(model))
    fresh = get_peft_model(tiny.llama(), LoraConfig(**(SETTINGS | changes)))
    for ours, plain in zip(find_adapted_layers(model), find_adapted_layers(fresh), strict=True):
        assert ours.is_anchored
        assert (ours.rank, ours.stored_rank) == (plain.rank, 2 * plain.rank)
        assert ours.s == pytest.approx(plain.s, rel=1e-12)
    model.save_pretrained(tmp_path / "saved")
    assert read_record(tmp_path / "saved" / "two").rank == 4
    again = load_adapter(tiny.llama(), tmp_path / "saved" / "two")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    for name, value in first.items():
        assert torch.equal(model.state_dict()[name], value), f"{name} of the first adapter has moved"


def test_a_plain_second_adapter_with_a_shared_config_claims_no_start(tmp_path):
    model = first_anchored(tmp_path)
    model.add_adapter("two", model.peft_config["one"])
    model.set_adapter("two")
    assert record_of_model(model) is None
    trained(model, tmp_path, kind=Trainer)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "one" / "lora_ga.json").exists()
    assert not (tmp_path / "saved" / "two" / "lora_ga.json").exists()
    loaded = load_adapter(tiny.llama(), tmp_path / "saved" / "two")
    assert not any(layer.is_anchored for layer in find_adapted_layers(loaded))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_a_weighted_adapter_of_anchored_ones_saves_loads_and_trains(kind, tmp_path):
    model = first_anchored(tmp_path)
    model.add_adapter("other", LoraConfig(**SETTINGS))
    model.set_adapter("other")
    trained(model, tmp_path, seed=2)
    deltas = {
        (layer.name, layer.adapter): layer.s * layer.stored_B.detach() @ layer.stored_A.detach()
        for name in ("one", "other")
        for layer in (model.set_adapter(name), find_adapted_layers(model))[1]
    }
    density = {"density": 0.5} if kind == "ties" else {}
    model.add_weighted_adapter(["one", "other"], [0.25, 0.75], "mix", combination_type=kind, **density)
    model.set_adapter("mix")
    layers = find_adapted_layers(model)
    if kind == "cat":  # the one that is exact at this rank
        for layer in layers:
            expected = 0.25 * deltas[layer.name, "one"] + 0.75 * deltas[layer.name, "other"]
            found = layer.s * layer.stored_B.detach() @ layer.stored_A.detach()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert not any(layer.is_anchored for layer in layers)
    assert record_of_model(model) is None
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "mix" / "lora_ga.json").exists()
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved" / "mix", is_trainable=True)
    for kept, written in zip(find_adapted_layers(loaded), layers, strict=True):
        assert torch.equal(kept.stored_A, written.stored_A)
        assert torch.equal(kept.stored_B, written.stored_B)
    # PEFT's factors by SVD are transposed views. Files hold plain ones, whose products round in another order.
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    before = [layer.stored_B.detach().clone() for layer in layers]
    trained(model, tmp_path, init="none")
    assert all(not torch.equal(layer.stored_B, value) for layer, value in zip(layers, before, strict=True))


def test_a_recorded_config_can_be_copied_and_pickled(tmp_path):
    model = first_anchored(tmp_path)
    config = model.peft_config["one"]
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (twin.record, twin.adapter, twin.r) == (config.record, "one", 8)
    assert "record" not in json.dumps(config.to_dict(), default=str)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ALora", {"alora_invocation_tokens": [11, 12], "task_type": "CAUSAL_LM"}),
        ("Kasa", {"kasa_config": KasaConfig()}),
        ("Monteclora", {"monteclora_config": MontecloraConfig()}),
        ("Velora", {"velora_config": VeloraConfig(num_groups=4)}),
        (
            "BdLora",
            {
                "use_bdlora": BdLoraConfig(
                    target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2, match_strict=False
                )
            },
        ),
    ],
)
@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
def test_a_variant_of_lora_is_refused_by_its_name_before_training(name, changes, init, tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(**(SETTINGS | {"target_modules": ["q_proj", "v_proj"]} | changes)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"variant of LoRA.*{name}.*init='none'"):
        LoRAGATrainer(
            model,
            tiny.arguments(tmp_path),
            train_dataset=tiny.causal_rows(8),
            lora_ga_config=LoRAGAConfig(init=init, num_samples=4),
        )
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_parameters_of_anchored_experts_are_found_by_their_names_and_are_leaves(tmp_path):
    model = get_peft_model(
        tiny.qwen3_moe(), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    )
    trained(model, tmp_path)
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter
        assert parameter.is_leaf
