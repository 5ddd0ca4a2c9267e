"""Contracts of `LoRAGAConfig`: bad values are refused where it is made, and it works where configs are parsed."""

import dataclasses
import json
from dataclasses import fields, replace

import pytest
from transformers import HfArgumentParser

from lora_ga_trainer import LoRAGAConfig


def test_the_defaults_are_the_papers():
    config = LoRAGAConfig()
    assert (config.init, config.direction, config.scale, config.gamma) == ("lora_ga", "ArB2r", "stable", 16.0)
    assert config.num_samples == 64
    assert config.correction == "none"
    assert config.head_warmup_steps == 0
    assert config.probe_file is None


@pytest.mark.parametrize(("init", "gamma"), [("lora_ga", 16.0), ("lora_one", 128.0)])
def test_gamma_follows_the_init_unless_it_is_given(init, gamma):
    assert LoRAGAConfig(init=init).gamma == gamma
    assert LoRAGAConfig(init=init, gamma=7.0).gamma == 7.0


@pytest.mark.parametrize(
    ("name", "value", "way_out"),
    [
        ("init", "pissa", "lora_ga, lora_one, gradient_directions, none"),
        ("init", "LoRA_GA", "lora_ga, lora_one, gradient_directions, none"),
        ("init", None, "lora_ga, lora_one, gradient_directions, none"),
        ("direction", "ArB3r", "ArB2r, A2rBr, ArBr, random"),
        ("scale", "huge", "stable, unit, gd, matched, weight_svd"),
        ("estimator", "svd", "sketch, exact"),
        ("correction", "lora_prod", "none, lora_pro, lora_pro_adamw"),
    ],
)
def test_an_unknown_name_is_refused_with_the_names_that_exist(name, value, way_out):
    with pytest.raises(ValueError, match=f"{name}={value!r} is unknown.*{way_out}"):
        LoRAGAConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("num_samples", 0, 1),
        ("num_samples", -8, 1),
        ("num_samples", 6.5, 1),
        ("num_samples", "64", 1),
        ("num_samples", None, 1),
        ("sketch_size", 1, 2),
        ("sketch_size", 64.0, 2),
        ("head_warmup_steps", -1, 0),
        ("head_warmup_steps", 0.5, 0),
    ],
)
def test_a_count_that_is_no_count_is_refused(name, value, least):
    with pytest.raises(ValueError, match=f"{name}={value!r}.*at least {least}"):
        LoRAGAConfig(**{name: value})


@pytest.mark.parametrize("name", ["gamma", "head_warmup_learning_rate"])
@pytest.mark.parametrize("value", [0, 0.0, -1.0, float("nan"), -float("inf")])
def test_a_length_that_is_not_positive_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}.*greater than 0"):
        LoRAGAConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", "16"),
        ("gamma", float("inf")),  # A0 = B0 = 0: the adapter would never learn
        ("head_warmup_learning_rate", "1e-3"),  # what YAML makes of 1e-3
        ("num_samples", True),
        ("probe_seed", 0.5),
        ("probe_seed", "seed"),
        ("allow_unreached", "no"),
        ("probe_file", 3),
    ],
)
def test_every_value_is_checked_when_the_config_is_made(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        LoRAGAConfig(**{name: value})


def test_every_field_has_a_help_text_that_argparse_can_print():
    fields = dataclasses.fields(LoRAGAConfig)
    assert [field.name for field in fields if len(field.metadata.get("help", "")) < 20] == []
    text = HfArgumentParser(LoRAGAConfig).format_help()  # a bare % in a help text breaks this
    for field in fields:
        assert f"--{field.name}" in text


def test_the_command_line_gives_the_types_of_the_fields():
    words = "--init lora_one --num_samples 8 --gamma 32 --probe_file a.safetensors --allow_unreached false"
    (config,) = HfArgumentParser(LoRAGAConfig).parse_args_into_dataclasses([*words.split(), "--probe_seed", "4"])
    assert config == LoRAGAConfig(
        init="lora_one", num_samples=8, gamma=32.0, probe_file="a.safetensors", allow_unreached=False, probe_seed=4
    )
    assert isinstance(config.gamma, float)


def test_an_empty_command_line_gives_the_defaults():
    (config,) = HfArgumentParser(LoRAGAConfig).parse_args_into_dataclasses([])
    assert config == LoRAGAConfig()


def test_a_bad_value_on_the_command_line_is_refused():
    with pytest.raises(ValueError, match="scale='huge'"):
        HfArgumentParser(LoRAGAConfig).parse_args_into_dataclasses(["--scale", "huge"])


@pytest.mark.parametrize("config", [LoRAGAConfig(), LoRAGAConfig(init="lora_one", num_samples=3, probe_file="p")])
def test_to_dict_survives_json_and_makes_the_same_config(config):
    assert LoRAGAConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(LoRAGAConfig)}


def test_a_default_gamma_gives_way_to_that_of_another_init_and_a_given_one_stays():
    assert replace(LoRAGAConfig(), init="lora_one").gamma == 128.0
    assert LoRAGAConfig(**{**LoRAGAConfig().to_dict(), "init": "lora_one"}).gamma == 128.0
    assert replace(LoRAGAConfig(gamma=16.0), init="lora_one").gamma == 16.0
    assert LoRAGAConfig(**LoRAGAConfig(gamma=7).to_dict()).gamma == 7
    assert json.loads(json.dumps(LoRAGAConfig().to_dict()))["gamma"] is None


@pytest.mark.parametrize(
    ("init", "field", "value"),
    [
        ("lora_one", "direction", "ArBr"),
        ("lora_one", "scale", "unit"),
        ("none", "direction", "random"),
        ("none", "scale", "gd"),
    ],
)
def test_a_field_that_the_init_does_not_read_is_refused(init, field, value):
    with pytest.raises(ValueError, match=rf"{field}={value!r} would do nothing with init='{init}'"):
        LoRAGAConfig(**{"init": init, field: value})


def test_every_field_is_described_in_the_help_of_the_class_and_of_a_parser():
    for field in fields(LoRAGAConfig):
        assert f"\n        {field.name}: " in LoRAGAConfig.__doc__
        assert len(field.metadata["help"]) > 20
