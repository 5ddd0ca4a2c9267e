"""Contracts of `layers.py`: what PEFT put around which layer, read and never recomputed."""

import math

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from lora_ga_trainer.adapters.find import find_adapted_layers, find_lora_layers, is_trained, saved_modules
from lora_ga_trainer.adapters.host import active_adapter, require_adapter


def by_name(model):
    return {layer.name: layer for layer in find_adapted_layers(model)}


@pytest.fixture
def model():
    return tiny.with_lora(tiny.llama())


def test_every_linear_layer_is_listed_once_in_the_models_order(model):
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    kinds += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert list(by_name(model)) == [f"model.layers.{i}.{kind}" for i in range(2) for kind in kinds]


def test_names_are_those_of_the_base_model(model):
    for layer in find_adapted_layers(model):
        assert model.get_base_model().get_submodule(layer.name) is layer.module


@pytest.mark.parametrize("make", [tiny.llama, tiny.bert, tiny.gpt2, tiny.t5])
def test_shape_and_s_describe_what_the_adapter_does_to_the_output(make):
    """The adapted layer computes `x (W + s B A)^T + b` for the `W`, `s`, `A`, `B` that are read."""
    changes = {"fan_in_fan_out": True} if make is tiny.gpt2 else {}
    model = tiny.with_lora(make(), init_lora_weights=False, **changes)
    generator = torch.Generator().manual_seed(0)
    for layer in find_adapted_layers(model):
        out, in_ = layer.shape
        W, A, B = layer.dense_weight(), layer.lora_A.weight, layer.lora_B.weight
        assert W.shape == (out, in_)
        assert A.shape == (layer.stored_rank, in_)
        assert B.shape == (out, layer.stored_rank)
        x = torch.randn(3, in_, generator=generator)
        expected = x @ (W + layer.s * B @ A).T + (0 if layer.base.bias is None else layer.base.bias)
        torch.testing.assert_close(layer.module(x), expected, rtol=1e-4, atol=1e-5)


def test_conv1d_has_its_in_and_out_features_the_right_way_round():
    model = tiny.with_lora(tiny.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    layer = find_adapted_layers(model)[0]
    assert tuple(layer.base.weight.shape) == (32, 96)  # as stored
    assert layer.shape == (96, 32)
    assert torch.equal(layer.dense_weight(), layer.base.weight.T)


def test_a_plain_weight_is_stored_as_itself_and_its_bias_is_not_part_of_it():
    layer = find_adapted_layers(tiny.with_lora(tiny.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True))[0]
    assert layer.base.bias is not None
    (stored,) = layer.stored_weight()
    assert torch.equal(stored, layer.base.weight)


def test_s_is_alpha_over_r_and_over_its_root_with_rslora():
    plain = find_adapted_layers(tiny.with_lora(tiny.llama(), r=4, lora_alpha=6))
    rooted = find_adapted_layers(tiny.with_lora(tiny.llama(), r=4, lora_alpha=6, use_rslora=True))
    assert {layer.s for layer in plain} == {6 / 4}
    assert {layer.s for layer in rooted} == {6 / math.sqrt(4)}


def test_rank_and_alpha_patterns_are_read_layer_by_layer():
    layers = by_name(
        tiny.with_lora(
            tiny.llama(), r=4, lora_alpha=8, rank_pattern={"q_proj": 2, "down_proj": 3}, alpha_pattern={"q_proj": 5}
        )
    )
    found = {name.rsplit(".", 1)[-1]: (layer.stored_rank, layer.s) for name, layer in layers.items()}
    assert found["q_proj"] == (2, 5 / 2)
    assert found["down_proj"] == (3, 8 / 3)
    assert found["k_proj"] == (4, 8 / 4)


def test_an_embedding_is_a_layer_of_one_hot_inputs():
    model = tiny.with_lora(tiny.llama(), target_modules=["embed_tokens", "q_proj"])
    embedding, q_proj, _ = find_adapted_layers(model)
    assert (embedding.name, embedding.shape, embedding.rank) == ("model.embed_tokens", (32, tiny.VOCABULARY), 4)
    assert embedding.s == q_proj.s
    torch.testing.assert_close(embedding.dense_weight(), tiny.llama().model.embed_tokens.weight.T, rtol=0, atol=0)


def test_a_merged_adapter_is_refused_until_it_is_unmerged(model):
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj.*merged.*unmerge_adapter"):
        find_adapted_layers(model)
    model.unmerge_adapter()
    assert len(find_adapted_layers(model)) == 14


def test_a_frozen_adapter_is_refused_with_the_number_of_its_layers(model):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'default' has no trainable LoRA layer \(14 frozen\).*is_trainable=True"):
        find_adapted_layers(model)


def test_a_partly_frozen_adapter_lists_its_trained_layers_only(model):
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.requires_grad_(False)
    assert {name.split(".")[2] for name in by_name(model)} == {"1"}
    assert len(find_lora_layers(model)) == 14


def test_an_adapter_of_another_kind_is_refused_with_its_type():
    model = get_peft_model(tiny.llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"'default' is of type .*IA3, not LoRA.*init='none'"):
        require_adapter(model)


def test_a_plain_model_is_refused_with_the_way_to_wrap_it():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM without a PEFT adapter.*peft_config=LoraConfig"):
        require_adapter(tiny.llama())


def test_only_the_active_adapter_is_read(model):
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    assert len(find_adapted_layers(model)) == 14
    model.set_adapter("second")
    layers = find_adapted_layers(model)
    assert active_adapter(model) == "second"
    assert [layer.name.rsplit(".", 1)[-1] for layer in layers] == ["q_proj", "q_proj"]
    assert {(layer.stored_rank, layer.s) for layer in layers} == {(2, 1.5)}
    assert layers[0].lora_A is layers[0].module.lora_A["second"]


def test_two_adapters_active_at_once_are_refused_by_name(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active at once.*set_adapter"):
        active_adapter(model)


def test_a_module_with_two_names_is_listed_once():
    base = tiny.llama()
    base.model.layers[1].mlp.up_proj = base.model.layers[1].mlp.gate_proj
    model = tiny.with_lora(base, target_modules=["gate_proj"])
    wrapped = model.get_base_model().model.layers[1].mlp
    wrapped.up_proj = wrapped.gate_proj
    assert len(find_adapted_layers(model)) == 2


class TestIsTrained:
    def test_a_new_adapter_is_not(self, model):
        assert not any(map(is_trained, find_adapted_layers(model)))

    def test_nonzero_b_alone_is_not(self, model):
        layer = find_adapted_layers(model)[0]
        with torch.no_grad():
            layer.lora_A.weight.zero_()
            layer.lora_B.weight.fill_(1.0)
        assert not is_trained(layer)

    def test_disjoint_halves_are_not(self, model):
        """`[0, B0] [A0; 0]`: both factors are full of numbers, the product is zero."""
        layer = find_adapted_layers(model)[0]
        with torch.no_grad():
            layer.lora_A.weight[2:] = 0
            layer.lora_B.weight[:, 2:] = 1.0
        assert not is_trained(layer)

    @pytest.mark.parametrize("size", [1.0, 1e-12, 1e-25])
    def test_a_nonzero_product_is_however_small(self, model, size):
        layer = find_adapted_layers(model)[0]
        with torch.no_grad():
            layer.lora_B.weight[3, 1] = size
        assert is_trained(layer)

    def test_a_nonzero_lora_bias_is(self):
        layer = find_adapted_layers(tiny.with_lora(tiny.llama(), lora_bias=True))[0]
        assert not is_trained(layer)
        with torch.no_grad():
            layer.lora_B.bias[0] = 0.5
        assert is_trained(layer)

    def test_looking_moves_no_random_number(self, model):
        before = torch.get_rng_state()
        is_trained(find_adapted_layers(model)[0])
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_dora_magnitude_is_the_length_of_each_output_row(make):
    changes = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if make is tiny.gpt2 else {}
    layer = find_adapted_layers(tiny.with_lora(make(), use_dora=True, **changes))[0]
    assert layer.uses_dora
    delta = torch.randn(layer.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack(
        [(w + d).square().sum().sqrt() for w, d in zip(layer.dense_weight().double(), delta, strict=True)]
    )
    torch.testing.assert_close(layer.dora_magnitude(delta), expected)
    # PEFT starts it at the lengths of the rows of W.
    torch.testing.assert_close(layer.dora_magnitude(torch.zeros(layer.shape)), layer.dora_parameter.detach())


def test_lora_without_dora_has_no_magnitude(model):
    assert not find_adapted_layers(model)[0].uses_dora


def test_saved_modules_are_the_trained_copies_and_not_the_originals():
    model = tiny.with_lora(tiny.bert(), target_modules=["query"], modules_to_save=["classifier"])
    (head,) = saved_modules(model)
    wrapper = model.get_base_model().classifier
    assert head is wrapper.modules_to_save["default"]
    assert head is not wrapper.original_module
    assert all(parameter.requires_grad for parameter in head.parameters())


def test_a_model_without_modules_to_save_has_none(model):
    assert saved_modules(model) == []


def test_torchs_own_attention_is_two_layers() -> None:
    """PEFT adapts its fused `in_proj_weight` and its `out_proj`, neither of which is ever called."""
    base = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.MultiheadAttention(16, 2))
    weights = {"1.in_proj_weight": base[1].in_proj_weight.detach(), "1.out_proj": base[1].out_proj.weight.detach()}
    model = tiny.with_lora(base, target_modules=["0", "1"])
    layers = find_adapted_layers(model)
    assert [layer.name for layer in layers] == ["0", *weights]
    assert [layer.shape for layer in layers] == [(16, 16), (48, 16), (16, 16)]
    for layer in layers[1:]:
        assert torch.equal(layer.dense_weights()[0], weights[layer.name])
        assert torch.equal(layer.stored_weight()[0], weights[layer.name])
    names = dict(model.named_parameters())
    for layer in layers:
        assert names[f"base_model.model.{layer.key}.lora_A.default.weight"] is layer.stored_A
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        find_adapted_layers(model)
