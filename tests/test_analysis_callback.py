"""Checkpoints are analysed while training runs, and a saved folder by one command."""

import json
import logging
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import Trainer

from lora_ga_trainer import (
    AdapterAnalysisCallback,
    LoRAGAConfig,
    LoRAGATrainer,
    analyse_adapter,
    newest_complete_checkpoint,
)


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import analyse_adapter as recipe


K = {"k": 4, "eps": 0.6}


def make(folder, kind=LoRAGATrainer, **changes):
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.05} | changes
    more = {"lora_ga_config": LoRAGAConfig(num_samples=8)} if kind is LoRAGATrainer else {}
    return kind(
        tiny.with_lora(tiny.llama(), lora_alpha=16),
        tiny.arguments(folder, **settings),
        train_dataset=tiny.causal_rows(16),
        **more,
    )


def figures(report):
    return report.to_dict() | {"folder": None, "seconds": None}


@pytest.mark.parametrize("kind", [LoRAGATrainer, Trainer])
def test_each_checkpoint_is_analysed_as_its_folder_is_and_logged(kind, tmp_path):
    trainer = make(tmp_path, kind)
    callback = AdapterAnalysisCallback(trainer, **K)
    trainer.add_callback(callback)
    trainer.train()
    assert list(callback.reports) == [2, 4]
    for step, report in callback.reports.items():
        folder = tmp_path / f"checkpoint-{step}"
        expected = analyse_adapter(tiny.llama(), folder, **K)
        assert figures(report) == figures(expected)
        written = json.loads((folder / "adapter_report.json").read_text())
        assert written["layers"] == json.loads(json.dumps(expected.to_dict()))["layers"]
        (logged,) = [row for row in trainer.state.log_history if row["step"] == step and "lora_ga/adapter_norm" in row]
        wanted = report.metrics()
        assert {name: logged[name] for name in wanted} == wanted
    assert (
        callback.reports[4].metrics()["lora_ga/adapter_norm"] > callback.reports[2].metrics()["lora_ga/adapter_norm"]
    )
    if kind is LoRAGATrainer:
        assert newest_complete_checkpoint(trainer).endswith("checkpoint-4")  # one more file in it is no harm


def test_training_is_the_same_to_the_bit_with_it(tmp_path):
    plain, watched = make(tmp_path / "plain"), make(tmp_path / "watched")
    watched.add_callback(AdapterAnalysisCallback(watched, **K))
    for trainer in (plain, watched):
        trainer.train()
    one, two = (dict(trainer.model.named_parameters()) for trainer in (plain, watched))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_without_intruders_the_base_is_not_read(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    callback = AdapterAnalysisCallback(trainer, k=0)
    trainer.add_callback(callback)
    monkeypatch.setattr("lora_ga_trainer.analysis.analyse.open_base", None)
    trainer.train()
    assert callback.reports[4].layers[0].intruders is None
    assert callback.reports[4].layers[0].start_share_out > 0


def test_what_can_not_be_analysed_is_one_warning(tmp_path, caplog):
    trainer = Trainer(
        tiny.with_lora(tiny.llama(), use_dora=True),
        tiny.arguments(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=tiny.causal_rows(16),
    )
    callback = AdapterAnalysisCallback(trainer)
    trainer.add_callback(callback)
    with caplog.at_level(logging.WARNING, logger="lora_ga_trainer"):
        trainer.train()
    (message,) = [record.message for record in caplog.records if "AdapterAnalysisCallback" in record.message]
    assert "use_dora=True" in message
    assert callback.reports == {}
    assert trainer.state.global_step == 4


def test_impossible_settings_are_refused_when_it_is_made(tmp_path):
    with pytest.raises(ValueError, match="AdapterAnalysisCallback: k=-2"):
        AdapterAnalysisCallback(make(tmp_path), k=-2)


# --- the program


def test_the_program_prints_writes_and_mends(tmp_path, capsys):
    tiny.llama().save_pretrained(tmp_path / "base")
    trainer = make(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    folder = str(tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not name its base"):
        recipe.main([folder])
    words = [folder, "--base", str(tmp_path / "base"), "--k", "4", "--eps", "0.6"]
    report = recipe.main([*words, "--remove", str(tmp_path / "out"), "--strength", "0.5"])
    printed = capsys.readouterr().out
    assert report.table() in printed
    assert report.summary() in printed
    assert f"{report.intruders} intruders scaled to 0.5" in printed
    assert (tmp_path / "adapter" / "adapter_report.png").is_file()
    after = recipe.main([str(tmp_path / "out"), "--k", "0"])
    ranks = [layer.rank + len(layer.intruders) for layer in report.layers]
    assert [layer.rank for layer in after.layers] == ranks
    assert sum(ranks) > 8 * len(ranks)


def test_the_program_reads_the_base_that_the_adapter_names(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = tiny.with_lora(type(tiny.llama()).from_pretrained(tmp_path / "base"), init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    report = recipe.main([str(tmp_path / "adapter")])
    assert figures(report) == figures(analyse_adapter(tiny.llama(), tmp_path / "adapter"))
