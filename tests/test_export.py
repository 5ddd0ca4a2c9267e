"""`export_adapter` writes the best approximation of each layer's change, as an adapter that plain PEFT loads."""

import json
import warnings

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, export_adapter
from lora_ga_trainer.adapters.find import find_lora_layers
from lora_ga_trainer.saving.record import FILE_NAME


def trained(base, **changes):
    """Return an adapter with random factors (and lora biases) in place of a training run's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: a bias on a layer without one can't be merged
        model = tiny.with_lora(base, init_lora_weights=False, **changes)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B.default.weight" not in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def outputs(model):
    batch = torch.stack([row["input_ids"] for row in tiny.causal_rows(3)])
    return model.eval()(input_ids=batch).logits


def load(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder)


def changes(model):
    """Return s B A of every layer, in fp64."""
    return {
        layer.name: layer.s * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        for layer in find_lora_layers(model)
    }


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_error_is_the_smallest_possible_one(rank, tmp_path):
    """Eckart-Young: no matrix of that rank is closer than the truncated SVD, computed here of the whole `s B A`."""
    model = trained(tiny.llama(), rank_pattern={"q_proj": 2, "down_proj": 6}, alpha_pattern={"v_proj": 3})
    errors = export_adapter(model, tmp_path, rank)
    written = changes(load(tiny.llama(), tmp_path))
    lost = whole = 0.0
    for name, delta in changes(model).items():
        values = torch.linalg.svdvals(delta).square()
        best = (values[rank:].sum() / values.sum()).sqrt()
        found = (delta - written[name]).norm() / delta.norm()
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)
        assert errors[name] == pytest.approx(best.item(), rel=1e-9, abs=1e-8)
        lost, whole = lost + values[rank:].sum(), whole + values.sum()
    assert set(errors) == {*written, "total"}
    assert errors["total"] == pytest.approx((lost / whole).sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("rank", [4, 5, 40])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_rank_that_is_no_smaller_loses_nothing(rank, rslora, tmp_path):
    model = trained(tiny.llama(), lora_alpha=6, use_rslora=rslora)
    assert export_adapter(model, tmp_path, rank)["total"] == pytest.approx(0.0, abs=1e-7)
    torch.testing.assert_close(outputs(load(tiny.llama(), tmp_path)), outputs(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs(tiny.llama()), outputs(model), atol=1e-2)


def test_a_trained_anchored_adapter_is_exported_from_its_stored_factors(tmp_path):
    model = tiny.with_lora(tiny.llama(), lora_alpha=32)
    LoRAGATrainer(
        model,
        tiny.arguments(tmp_path / "run", learning_rate=0.05),
        train_dataset=tiny.causal_rows(16),
        lora_ga_config=LoRAGAConfig(num_samples=8),
    ).train()
    export_adapter(model, tmp_path / "whole", 8)
    torch.testing.assert_close(outputs(load(tiny.llama(), tmp_path / "whole")), outputs(model), rtol=1e-4, atol=1e-4)
    errors = export_adapter(model, tmp_path / "half", 4)
    assert 0 < errors["total"] < 1
    assert not (tmp_path / "half" / FILE_NAME).exists()  # the copy is a plain adapter


def test_the_config_says_r_equals_alpha_and_nothing_else_of_the_scale(tmp_path):
    model = trained(tiny.llama(), use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})
    export_adapter(model, tmp_path, 3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["inference_mode"] is True
    layers = find_lora_layers(load(tiny.llama(), tmp_path))
    assert {(layer.stored_rank, layer.s) for layer in layers} == {(3, 1.0)}


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_biases_are_carried_with_their_scale(rslora, tmp_path):
    model = trained(tiny.llama(), lora_bias=True, lora_alpha=6, use_rslora=rslora)
    export_adapter(model, tmp_path, 4)
    loaded = load(tiny.llama(), tmp_path)
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-5)
    assert all(layer.lora_B.bias.any() for layer in find_lora_layers(loaded))


def test_trained_base_biases_are_carried(tmp_path):
    model = trained(tiny.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")
    export_adapter(model, tmp_path, 4)
    torch.testing.assert_close(outputs(load(tiny.gpt2(), tmp_path)), outputs(model), rtol=1e-5, atol=1e-5)


def test_modules_to_save_are_carried_to_the_bit(tmp_path):
    model = trained(tiny.bert(), target_modules=["query"], modules_to_save=["classifier"])
    export_adapter(model, tmp_path, 4)
    loaded = load(tiny.bert(), tmp_path)
    head, other = (m.get_base_model().classifier.modules_to_save["default"] for m in (model, loaded))
    assert torch.equal(head.weight, other.weight)
    assert torch.equal(head.bias, other.bias)
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-5, atol=1e-5)


def test_dora_magnitudes_are_carried(tmp_path):
    model = trained(tiny.llama(), target_modules=["q_proj", "down_proj"], use_dora=True)
    export_adapter(model, tmp_path, 4)
    torch.testing.assert_close(outputs(load(tiny.llama(), tmp_path)), outputs(model), rtol=1e-5, atol=1e-5)


def test_conv1d_layers_are_exported_the_right_way_round(tmp_path):
    model = trained(tiny.gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    export_adapter(model, tmp_path, 4)
    torch.testing.assert_close(outputs(load(tiny.gpt2(), tmp_path)), outputs(model), rtol=1e-5, atol=1e-5)


def test_only_the_active_adapter_is_written(tmp_path):
    model = trained(tiny.llama())
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    expected = outputs(model)
    export_adapter(model, tmp_path, 4)
    torch.testing.assert_close(outputs(load(tiny.llama(), tmp_path)), expected, rtol=1e-5, atol=1e-5)


def test_an_untrained_adapter_has_no_error(tmp_path):
    errors = export_adapter(tiny.with_lora(tiny.llama()), tmp_path, 2)
    assert set(errors.values()) == {0.0}
    assert torch.equal(outputs(load(tiny.llama(), tmp_path)), outputs(tiny.llama()))


def test_the_dtype_of_the_factors_is_kept(tmp_path):
    model = trained(tiny.llama(), target_modules=["q_proj"])
    for layer in find_lora_layers(model):
        layer.module.to(torch.bfloat16)
    export_adapter(model, tmp_path, 2)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_the_model_itself_is_unchanged(tmp_path):
    model = trained(tiny.llama(), use_rslora=True, rank_pattern={"q_proj": 2}, lora_bias=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.peft_config["default"].to_dict()
    training = model.training
    export_adapter(model, tmp_path, 2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.peft_config["default"].to_dict() == config
    assert model.training == training


@pytest.mark.parametrize("rank", [0, -2, 2.5])
def test_an_impossible_rank_is_refused_before_anything_is_written(rank, tmp_path):
    with pytest.raises(ValueError, match=f"rank={rank} must be a whole number of at least 1"):
        export_adapter(trained(tiny.llama()), tmp_path / "out", rank)
    assert not (tmp_path / "out").exists()


def test_a_plain_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without a PEFT adapter"):
        export_adapter(tiny.llama(), tmp_path, 2)
