"""
The record of a start in an adapter's folder, which of them can be resumed, and the digests that tell one base or data
set from another.
"""

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, load_adapter
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.saving.fingerprint import fingerprint_base, fingerprint_dataset, fingerprint_heads
from lora_ga_trainer.saving.record import (
    FILE_NAME,
    RecordedLoraConfig,
    StartRecord,
    attach_record,
    plain_config,
    read_record,
    record_of_model,
    write_record,
)
from lora_ga_trainer.saving.resume import require_resumable
from lora_ga_trainer.starts.prepare import prepare_adapter


RECORD = StartRecord(init="lora_ga", rank=4, anchored=True, base="0" * 32, initialised=True)
CONTENT = {"format": 1, "init": "lora_ga", "rank": 4, "anchored": True, "base": "0" * 32}


def prepared(init="lora_ga", base=None, **changes):
    """Return an adapter as a run with `init` has it once its factors are written."""
    model = tiny.with_lora(tiny.llama() if base is None else base, **changes)
    prepare_adapter(model, LoRAGAConfig(init=init))
    record_of_model(model).initialised = True
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def digest(model):
    return fingerprint_base(model, find_adapted_layers(model))


class TestRecord:
    def test_what_is_written_is_what_is_read(self, tmp_path):
        write_record(RECORD, tmp_path)
        assert read_record(tmp_path) == RECORD
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]

    def test_a_folder_without_one_has_none(self, tmp_path):
        assert read_record(tmp_path) is None
        assert read_record(saved(tiny.with_lora(tiny.llama()), tmp_path)) is None

    def test_every_save_of_the_model_writes_it(self, tmp_path):
        model = prepared()
        found = read_record(saved(model, tmp_path))
        assert found == StartRecord("lora_ga", 4, True, digest(model), True)
        assert found == record_of_model(model)

    def test_a_second_adapters_record_lies_in_its_own_folder(self, tmp_path):
        model = tiny.with_lora(tiny.llama())
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("second")
        prepare_adapter(model, LoRAGAConfig())
        record_of_model(model).initialised = True
        saved(model, tmp_path)
        assert read_record(tmp_path) is None
        assert read_record(tmp_path / "second").rank == 2

    def test_a_start_that_was_not_written_leaves_no_record(self, tmp_path):
        model = prepared()
        record_of_model(model).initialised = False
        assert read_record(saved(model, tmp_path)) is None

    def test_adapter_config_is_byte_for_byte_that_of_the_plain_config(self, tmp_path):
        config = LoraConfig(
            r=6, lora_alpha=9, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}, lora_dropout=0.1
        )
        config.save_pretrained(tmp_path / "plain")
        recorded = attach_record(config, RECORD)
        recorded.save_pretrained(tmp_path / "recorded")
        # Sets are written in no fixed order.
        plain, other = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("plain", "recorded"))
        for content in (plain, other):
            content["target_modules"] = sorted(content["target_modules"])
        assert other == plain
        assert recorded.to_dict() == config.to_dict()

    def test_attaching_carries_every_field_and_taking_off_gives_the_plain_config_back(self):
        config = LoraConfig(r=6, target_modules=["q_proj"])
        config.a_private_field = object()
        recorded = attach_record(config, RECORD)
        assert isinstance(recorded, RecordedLoraConfig)
        assert recorded.a_private_field is config.a_private_field
        assert recorded.record is RECORD
        back = plain_config(recorded)
        assert type(back) is LoraConfig
        assert vars(back) == vars(config)

    def test_a_copy_of_the_config_keeps_its_record(self):
        assert copy.deepcopy(attach_record(LoraConfig(), RECORD)).record == RECORD

    def test_a_plain_adapter_and_a_plain_model_have_no_record(self):
        assert record_of_model(tiny.with_lora(tiny.llama())) is None
        assert record_of_model(tiny.llama()) is None


def deep(levels):
    return "[" * levels + "]" * levels


DAMAGED = {
    "empty": "",
    "truncated": json.dumps(CONTENT)[:-9],
    "not JSON": "rank: 4",
    "not UTF-8": b'{"format": 1, "init": "\xff\xfe"}',
    "a list": json.dumps([CONTENT]),
    "null": "null",
    "no rank": json.dumps({key: value for key, value in CONTENT.items() if key != "rank"}),
    "a key too many": json.dumps(CONTENT | {"initialised": False}),
    "rank is a string": json.dumps(CONTENT | {"rank": "4"}),
    "rank is a float": json.dumps(CONTENT | {"rank": 4.0}),
    "rank is a bool": json.dumps(CONTENT | {"rank": True}),
    "rank is 0": json.dumps(CONTENT | {"rank": 0}),
    "rank is negative": json.dumps(CONTENT | {"rank": -4}),
    "anchored is a number": json.dumps(CONTENT | {"anchored": 1}),
    "init is unknown": json.dumps(CONTENT | {"init": "pissa"}),
    "init is none": json.dumps(CONTENT | {"init": "none"}),
    "init is a list": json.dumps(CONTENT | {"init": ["lora_ga"]}),
    "base is null": json.dumps(CONTENT | {"base": None}),
    "format of the future": json.dumps(CONTENT | {"format": 2}),
    "duplicate keys": json.dumps(CONTENT)[:-1] + ', "rank": 8}',
    "too large": json.dumps(CONTENT | {"base": "0" * (1 << 20)}),
    "too deep": deep(100_000),
    "a number of 10,000 digits": json.dumps(CONTENT)[:-1] + ', "more": ' + "9" * 10_000 + "}",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_a_value_error_with_its_path(text, tmp_path):
    (tmp_path / FILE_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{tmp_path.name}/{FILE_NAME} is not a record of lora_ga_trainer"):
        read_record(tmp_path)


def test_the_message_about_a_damaged_record_says_how_to_go_on(tmp_path):
    (tmp_path / FILE_NAME).write_text(DAMAGED["truncated"])
    with pytest.raises(ValueError, match=r"Restore the file, or delete it to continue .* plain LoRA adapter"):
        read_record(tmp_path)


def test_a_damaged_record_stops_load_adapter(tmp_path):
    saved(prepared(), tmp_path)
    (tmp_path / FILE_NAME).write_text(DAMAGED["duplicate keys"])
    with pytest.raises(ValueError, match="duplicate keys"):
        load_adapter(tiny.llama(), tmp_path)


@pytest.mark.parametrize("change", [{"rank": 3}, {"rank": 8}, {"anchored": False}, {"init": "lora_one"}])
def test_a_record_that_contradicts_the_adapter_beside_it_is_refused(change, tmp_path):
    """The folder holds an anchored LoRA-GA adapter of rank 4, stored as 8; the record says otherwise."""
    content = json.loads((saved(prepared(), tmp_path) / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=str(next(iter(change)))):
        load_adapter(tiny.llama(), tmp_path)


class TestRequireResumable:
    def test_the_same_start_on_the_same_base_passes(self, tmp_path):
        folder = saved(prepared(), tmp_path)
        assert require_resumable(folder, prepared()) is None

    def test_another_rank_is_refused(self, tmp_path):
        folder = saved(prepared(r=4), tmp_path)
        with pytest.raises(ValueError, match=rf"{tmp_path.name} was trained with rank=4, this run has rank=2.*Resume"):
            require_resumable(folder, prepared(r=2))

    def test_a_plain_adapter_of_the_stored_rank_is_another_rank(self, tmp_path):
        folder = saved(prepared(r=4), tmp_path)
        with pytest.raises(ValueError, match="rank=4, this run has rank=8"):
            require_resumable(folder, prepared(r=8))

    @pytest.mark.parametrize(("first", "second"), [("lora_ga", "lora_one"), ("lora_one", "lora_ga")])
    def test_another_init_is_refused(self, first, second, tmp_path):
        folder = saved(prepared(first), tmp_path)
        with pytest.raises(ValueError, match=f"{tmp_path.name} .*init='{first}', this run has init='{second}'"):
            require_resumable(folder, prepared(second))

    def test_a_checkpoint_without_a_record_is_refused_with_two_ways_out(self, tmp_path):
        folder = saved(tiny.with_lora(tiny.llama(), r=8), tmp_path)
        with pytest.raises(ValueError, match=rf"{tmp_path.name} has no {FILE_NAME}.*init='none'.*restore {FILE_NAME}"):
            require_resumable(folder, prepared())

    def test_another_base_is_refused(self, tmp_path):
        folder = saved(prepared(), tmp_path)
        with pytest.raises(ValueError, match=rf"{tmp_path.name} was trained with base='\w+', this run has base="):
            require_resumable(folder, prepared(base=tiny.llama(seed=1)))

    def test_another_dtype_of_the_base_is_refused(self, tmp_path):
        folder = saved(prepared(), tmp_path)
        with pytest.raises(ValueError, match="base="):
            require_resumable(folder, prepared(base=tiny.llama().bfloat16()))

    def test_a_damaged_record_is_refused(self, tmp_path):
        (saved(prepared(), tmp_path) / FILE_NAME).write_text("{")
        with pytest.raises(ValueError, match=f"{tmp_path.name}/{FILE_NAME}"):
            require_resumable(tmp_path, prepared())

    def test_an_adapter_of_another_name_is_looked_for_in_its_folder(self, tmp_path):
        def named():
            model = tiny.with_lora(tiny.llama())
            model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
            model.set_adapter("second")
            prepare_adapter(model, LoRAGAConfig())
            record_of_model(model).initialised = True
            return model

        saved(named(), tmp_path)
        require_resumable(tmp_path, named())
        (tmp_path / "second" / FILE_NAME).unlink()
        with pytest.raises(ValueError, match=f"second has no {FILE_NAME}"):
            require_resumable(tmp_path, named())

    def test_a_model_without_a_start_is_none_of_its_business(self, tmp_path):
        folder = saved(tiny.with_lora(tiny.llama()), tmp_path)
        assert require_resumable(folder, tiny.with_lora(tiny.llama(), r=2)) is None

    def test_a_missing_folder_is_left_to_the_trainer(self, tmp_path):
        assert require_resumable(tmp_path / "nowhere", prepared()) is None


class TestFingerprintOfTheBase:
    def test_it_is_the_same_for_the_same_base_whatever_the_adapter(self):
        first, second = tiny.with_lora(tiny.llama(), seed=1), tiny.with_lora(tiny.llama(), seed=2, r=2, lora_alpha=3)
        assert digest(first) == digest(second)

    def test_it_does_not_change_when_the_adapter_is_trained_or_anchored(self):
        model = tiny.with_lora(tiny.llama(), init_lora_weights=False)
        assert digest(model) == digest(tiny.with_lora(tiny.llama()))
        assert digest(prepared()) == digest(tiny.with_lora(tiny.llama()))

    @pytest.mark.parametrize("place", [0, -1])
    @pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
    def test_it_changes_with_a_sampled_weight_of_any_adapted_layer(self, name, place):
        """The first and the last weight of a layer are among the 64 that are read."""
        model = tiny.with_lora(tiny.llama())
        before = digest(model)
        with torch.no_grad():
            weight = model.get_base_model().get_submodule(name).get_base_layer().weight.view(-1)
            weight[place] = torch.nextafter(weight[place], torch.tensor(9.0))
        assert digest(model) != before

    def test_it_changes_with_the_dtype_of_the_weights(self):
        assert digest(tiny.with_lora(tiny.llama().bfloat16())) != digest(tiny.with_lora(tiny.llama()))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("rms_norm_eps", 1e-3),
            ("hidden_act", "gelu"),
            ("num_attention_heads", 8),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ],
    )
    def test_it_changes_with_what_the_layers_compute(self, name, value):
        model = tiny.with_lora(tiny.llama())
        before = digest(model)
        assert getattr(model.get_base_model().config, name) != value
        setattr(model.get_base_model().config, name, value)
        assert digest(model) != before

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("_name_or_path", "elsewhere"),
            ("use_cache", False),
            ("id2label", {0: "no", 1: "yes"}),
            ("output_hidden_states", True),
            ("attention_dropout", 0.5),
            ("a_field_of_the_next_release", 1),
        ],
    )
    def test_it_does_not_change_with_where_the_model_came_from_or_how_it_is_run(self, name, value):
        model = tiny.with_lora(tiny.llama())
        before = digest(model)
        setattr(model.get_base_model().config, name, value)
        assert digest(model) == before

    def test_a_float_of_the_config_may_come_back_as_an_integer(self):
        model = tiny.with_lora(tiny.llama())
        before = digest(model)
        rope = model.get_base_model().config.rope_parameters
        assert type(rope["rope_theta"]) is float
        rope["rope_theta"] = int(rope["rope_theta"])
        assert digest(model) == before

    def test_it_does_not_change_with_the_attention_implementation(self):
        eager, sdpa = tiny.llama(attn_implementation="eager"), tiny.llama(attn_implementation="sdpa")
        assert digest(tiny.with_lora(eager)) == digest(tiny.with_lora(sdpa))

    @pytest.mark.parametrize("kind", ["dataclass", "slots", "namespace", "class", "mapping"])
    def test_a_model_whose_config_is_not_of_transformers_has_one(self, kind):
        @dataclasses.dataclass(slots=kind == "slots")
        class Config:
            num_heads: int = 4
            hidden_act: Any = torch.nn.functional.gelu

        class Net(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                torch.manual_seed(0)
                self.config, self.layer = config, torch.nn.Linear(8, 8)

        def digest(**values):
            values = {"num_heads": 4, "hidden_act": torch.nn.functional.gelu} | values
            made = {
                "namespace": lambda: SimpleNamespace(**values),
                "class": lambda: type("Config", (), {})(),
                "mapping": lambda: values,
            }.get(kind, lambda: Config(**values))()
            if kind == "class":
                vars(made).update(values)
            model = get_peft_model(Net(made), LoraConfig(target_modules=["layer"]))
            return fingerprint_base(model, find_adapted_layers(model))

        assert digest() == digest()
        assert digest() != digest(num_heads=8)
        assert digest() != digest(hidden_act=torch.nn.functional.relu)

    def test_a_base_that_was_saved_and_loaded_is_the_same_base(self, tmp_path):
        base = tiny.llama()
        base.save_pretrained(tmp_path)
        assert digest(tiny.with_lora(type(base).from_pretrained(tmp_path))) == digest(tiny.with_lora(tiny.llama()))

    def test_a_base_that_has_run_is_the_same_base(self):
        """BERT's forward writes `problem_type` into its config."""
        model = tiny.with_lora(tiny.bert())
        before = digest(model)
        row = tiny.class_rows(1)[0]
        model(**{key: torch.as_tensor(value)[None] for key, value in row.items()})
        assert digest(model) == before

    def test_special_tokens_set_after_the_model_was_loaded_do_not_make_it_another_base(self):
        """`train()` aligns them with the tokenizer, after the start was prepared."""
        model = tiny.with_lora(tiny.llama())
        before = digest(model)
        model.get_base_model().config.pad_token_id = 7
        assert digest(model) == before


def test_training_can_be_resumed_by_the_trainer_that_wrote_the_checkpoint(tmp_path):
    args = tiny.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    model = tiny.with_lora(tiny.bert(), target_modules=["query"])
    trainer = LoRAGATrainer(model, args, train_dataset=tiny.class_rows(8), lora_ga_config=LoRAGAConfig(num_samples=4))
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2


def test_the_heads_have_a_digest_of_their_own():
    def head(seed):
        model = tiny.with_lora(tiny.bert(), target_modules=["query"], modules_to_save=["classifier"])
        torch.manual_seed(seed)
        with torch.no_grad():
            model.get_base_model().classifier.modules_to_save["default"].weight.normal_()
        return model

    assert fingerprint_heads(head(0)) == fingerprint_heads(head(0))
    assert fingerprint_heads(head(0)) != fingerprint_heads(head(1))
    assert digest(head(0)) == digest(head(1))


class TestFingerprintOfTheData:
    def test_it_is_the_same_for_the_same_rows(self):
        assert fingerprint_dataset(tiny.causal_rows(20)) == fingerprint_dataset(tiny.causal_rows(20))

    def test_it_changes_with_the_number_of_rows(self):
        assert fingerprint_dataset(tiny.causal_rows(32)) != fingerprint_dataset(tiny.causal_rows(33))

    @pytest.mark.parametrize("key", ["input_ids", "attention_mask", "labels"])
    def test_it_changes_with_one_number_of_a_read_row(self, key):
        rows = tiny.causal_rows(10)
        before = fingerprint_dataset(rows)
        rows[9][key][-1] = 1 - rows[9][key][-1]
        assert fingerprint_dataset(rows) != before

    def test_it_changes_with_a_name_of_a_column(self):
        rows = tiny.causal_rows(4)
        renamed = [{"ids" if key == "input_ids" else key: value for key, value in row.items()} for row in rows]
        assert fingerprint_dataset(rows) != fingerprint_dataset(renamed)

    def test_it_does_not_depend_on_the_order_of_the_columns(self):
        rows = tiny.causal_rows(4)
        assert fingerprint_dataset(rows) == fingerprint_dataset([dict(reversed(row.items())) for row in rows])

    def test_it_does_not_change_with_the_order_of_training(self, tmp_path):
        rows = tiny.causal_rows(20)
        before = fingerprint_dataset(rows)
        for seed in (1, 2):
            trainer = LoRAGATrainer(
                tiny.with_lora(tiny.llama(), target_modules=["q_proj"]),
                tiny.arguments(tmp_path, seed=seed, max_steps=1),
                train_dataset=rows,
                lora_ga_config=LoRAGAConfig(num_samples=4),
            )
            trainer.train()
            assert fingerprint_dataset(trainer.train_dataset) == before

    def test_a_large_array_is_read_to_its_middle(self):
        """The `repr` of an array of more than 1,000 numbers leaves its middle out."""
        rows = [{"pixel_values": np.zeros(4000)}]
        before = fingerprint_dataset(rows)
        rows[0]["pixel_values"][2000] = 1.0
        assert fingerprint_dataset(rows) != before

    def test_the_same_image_is_the_same_data(self):
        """The `repr` of a PIL image holds its address."""
        first, second = ([{"image": Image.new("L", (4, 4), 7)}] for _ in range(2))
        assert fingerprint_dataset(first) == fingerprint_dataset(second)
        assert fingerprint_dataset([{"image": Image.new("L", (4, 4), 8)}]) != fingerprint_dataset(first)

    def test_a_datasets_dataset_and_its_stream_can_be_read(self):
        data = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        other = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 5]], "labels": [0, 1]})
        assert fingerprint_dataset(data) == fingerprint_dataset(data.select(range(2)))
        assert fingerprint_dataset(data) != fingerprint_dataset(other)
        assert fingerprint_dataset(data.to_iterable_dataset()) == fingerprint_dataset(data.to_iterable_dataset())
        assert fingerprint_dataset(data.to_iterable_dataset()) != fingerprint_dataset(other.to_iterable_dataset())
