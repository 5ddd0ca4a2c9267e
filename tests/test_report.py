"""Contracts of `report.py` and of how the callback publishes it."""

import json
import logging
import math

import pytest
import tiny
import torch
from matplotlib.figure import Figure
from PIL import Image

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.starts.report import Action, GradientReport, LayerReport
from lora_ga_trainer.starts.tracking import REPORT_NAME


def layer(name, action=Action.INITIALISED, share=0.5, kept=1.0):
    return LayerReport(
        name=name,
        shape=(4, 6),
        rank=2,
        scale=0.3,
        singular_values=[2.0, 1.0, 0.5, 0.25],
        energy_share_r=share,
        energy_share_2r=share + 0.2,
        energy_kept=kept,
        sketched=kept < 1,
        action=action,
    )


def report(**changes):
    values = {
        "init": "lora_ga",
        "samples": 8,
        "items": 31.0,
        "tokens": 96,
        "seconds": 1.25,
        "probe_seconds": 1.0,
        "probe_bytes": 3 << 20,
        "bytes_sent": 0,
        "loss_before": 2.5,
        "loss_after": 2.25,
        "layers": [
            layer("h.0.q", kept=0.9),
            layer("h.0.v", share=0.7),
            layer("h.1.q", Action.UNREACHED, share=0.0, kept=0.0),
        ],
    }
    return GradientReport(**(values | changes))


def trainer_in(folder, rows=8, **changes):
    return LoRAGATrainer(
        tiny.with_lora(tiny.llama(), target_modules=["q_proj", "down_proj"]),
        tiny.arguments(folder, max_steps=2, **changes),
        train_dataset=tiny.causal_rows(rows),
        lora_ga_config=LoRAGAConfig(num_samples=6),
    )


def test_metrics_average_over_the_layers_that_were_started():
    assert report().metrics() == {
        "lora_ga/samples": 8,
        "lora_ga/tokens": 96,
        "lora_ga/seconds": 1.25,
        "lora_ga/probe_bytes": 3 << 20,
        "lora_ga/bytes_sent": 0,
        "lora_ga/loss_before": 2.5,
        "lora_ga/loss_after": 2.25,
        "lora_ga/layers_initialised": 2,
        "lora_ga/layers_plain": 1,
        "lora_ga/energy_share_r": pytest.approx(0.6),
        "lora_ga/energy_share_2r": pytest.approx(0.8),
        "lora_ga/energy_kept_min": 0.9,
        "lora_ga/layers_seen_twice": 0,
    }


def test_metrics_leave_out_what_is_not_known():
    found = report(loss_before=None, loss_after=None, layers=[layer("h.0.q", Action.UNREACHED)]).metrics()
    assert {name for name in found if "loss" in name or "energy" in name} == set()
    assert found["lora_ga/layers_plain"] == 1


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, ["lora_ga: 2 layers", "1 left plain", "8 samples", "96 tokens", "3.0 MiB", "60%", "80%", "90.0%"], []),
        ({}, ["loss 2.5000 -> 2.2500"], []),
        ({"loss_before": None, "loss_after": None}, ["2 layers"], ["loss"]),
        ({"layers": [layer("h.0.q", Action.UNREACHED)]}, ["0 layers", "1 left plain"], ["energy"]),
        ({"layers": [layer("h.0.q")], "init": "lora_one"}, ["lora_one: 1 layers"], ["plain"]),
    ],
)
def test_the_summary_is_one_line_that_says_what_happened(changes, present, absent):
    text = report(**changes).summary()
    assert "\n" not in text
    assert [part for part in present if part not in text] == []
    assert [part for part in absent if part in text] == []


def test_json_gives_the_report_back(tmp_path):
    original = report()
    original.to_json(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    layers = [LayerReport(**(item | {"shape": tuple(item["shape"])})) for item in content.pop("layers")]
    assert GradientReport(**content, layers=layers) == original
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_json_replaces_an_older_report_whole(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("x" * 100_000)
    report().to_json(path)
    assert json.loads(path.read_text())["samples"] == 8


def test_plot_draws_a_picture_that_shows_the_data(tmp_path):
    report().plot(tmp_path / "a.png")
    report(layers=[layer("h.0.q", share=0.1)]).plot(str(tmp_path / "b.png"))
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        assert first.format == second.format == "PNG"
        assert first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (
            tiny.bert(),
            {
                "encoder.layer.attention.self.query": 2,
                "encoder.layer.attention.self.key": 2,
                "encoder.layer.attention.self.value": 2,
                "encoder.layer.attention.output.dense": 2,
                "encoder.layer.intermediate.dense": 2,
                "encoder.layer.output.dense": 2,
                "pooler.dense": 1,
            },
        ),
        (
            tiny.llama(num_hidden_layers=3),
            {
                "self_attn.q_proj": 3,
                "self_attn.k_proj": 3,
                "self_attn.v_proj": 3,
                "self_attn.o_proj": 3,
                "mlp.gate_proj": 3,
                "mlp.up_proj": 3,
                "mlp.down_proj": 3,
            },
        ),
    ],
    ids=["bert", "llama"],
)
def test_a_line_of_the_plot_is_one_kind_of_layer_at_all_depths(tmp_path, monkeypatch, model, kinds):
    settings = {"task_type": "SEQ_CLS"} if "pooler.dense" in kinds else {}
    layers = [layer(found.name) for found in find_adapted_layers(tiny.with_lora(model, **settings))]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    report(layers=layers).plot(tmp_path / "a.png")
    solid = [line for line in drawn[0].axes[0].lines if not line.get_label().startswith("_")]
    assert {line.get_label(): len(line.get_xdata()) for line in solid} == kinds


def test_a_plot_of_one_kind_is_named_by_its_last_word(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    report(layers=[layer("h.0.attn.q"), layer("h.1.attn.q")]).plot(tmp_path / "a.png")
    (label,) = (text.get_text() for text in drawn[0].axes[0].get_legend().get_texts())
    assert label == "q"


def test_a_run_publishes_what_it_did(tmp_path, caplog):
    trainer = trainer_in(tmp_path)
    assert trainer.lora_ga_report is None
    with caplog.at_level(logging.INFO, logger="lora_ga_trainer"):
        trainer.train()
    found = trainer.lora_ga_report
    written = json.loads((tmp_path / REPORT_NAME).read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert found.summary() in [record.getMessage() for record in caplog.records]
    logged = next(entry for entry in trainer.state.log_history if "lora_ga/samples" in entry)
    assert {key: logged[key] for key in found.metrics()} == found.metrics()


def test_a_runs_figures_count_what_was_there(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train()
    found = trainer.lora_ga_report
    # 6 samples are asked for; micro-batches of 4 are not cut.
    assert (found.init, found.samples, found.tokens, found.bytes_sent) == ("lora_ga", 8, 8 * 12, 0)
    assert 0 < found.probe_seconds <= found.seconds
    assert found.probe_bytes > 0
    # An anchored adapter starts as the base, so the loss is that of before.
    assert found.loss_after == pytest.approx(found.loss_before, rel=1e-6)
    # q_proj (32, 32) and down_proj (32, 48) of two layers, in the model's order
    assert [(item.shape, item.rank) for item in found.layers] == [((32, 32), 4), ((32, 48), 4)] * 2
    for item in found.layers:
        assert item.action == Action.INITIALISED
        assert item.scale == pytest.approx(32**0.25 / math.sqrt(16), rel=1e-5)
        assert len(item.singular_values) == 8
        assert item.singular_values == sorted(item.singular_values, reverse=True)
        assert 0 < item.energy_share_r <= item.energy_share_2r <= 1 + 1e-6


def test_the_items_are_the_labels_that_the_loss_is_a_mean_over(tmp_path):
    """All 8 rows are probed, whatever their order; the first label of a row is no target."""
    trainer = LoRAGATrainer(
        tiny.with_lora(tiny.llama(), target_modules=["q_proj"]),
        tiny.arguments(tmp_path, max_steps=1),
        train_dataset=tiny.causal_rows(8),
        lora_ga_config=LoRAGAConfig(num_samples=8),
    )
    trainer.train()
    assert trainer.lora_ga_report.items == sum(int((row["labels"][1:] != -100).sum()) for row in tiny.causal_rows(8))


@pytest.mark.parametrize("obstacle", [REPORT_NAME + ".partial", REPORT_NAME])
def test_a_report_that_cannot_be_written_is_a_warning_and_training_goes_on(obstacle, tmp_path, caplog):
    (tmp_path / obstacle).mkdir()
    (tmp_path / obstacle / "occupied").touch()
    trainer = trainer_in(tmp_path)
    with caplog.at_level(logging.WARNING, logger="lora_ga_trainer"):
        trainer.train()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([text for text in warnings if REPORT_NAME in text and "Training goes on" in text]) == 1
    assert trainer.state.global_step == 2
    assert trainer.lora_ga_report.samples == 8


def test_an_output_folder_that_is_a_file_is_a_warning_too(tmp_path, caplog):
    (tmp_path / "file").touch()
    trainer = trainer_in(tmp_path / "fine")
    trainer.args.output_dir = str(tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING, logger="lora_ga_trainer"):
        trainer.train()
    assert any("Training goes on" in record.getMessage() for record in caplog.records)
    assert trainer.state.global_step == 2


def test_a_layer_without_gradient_is_reported_as_plain(tmp_path):
    base = tiny.llama()
    base.model.aside = torch.nn.Linear(32, 32)
    trainer = LoRAGATrainer(
        tiny.with_lora(base, target_modules=["q_proj", "aside"]),
        tiny.arguments(tmp_path, max_steps=1),
        train_dataset=tiny.causal_rows(8),
        lora_ga_config=LoRAGAConfig(num_samples=4, allow_unreached=True),
    )
    trainer.train()
    actions = {item.name: item.action for item in trainer.lora_ga_report.layers}
    assert actions.pop("model.aside") == Action.UNREACHED
    assert set(actions.values()) == {Action.INITIALISED}
    assert trainer.lora_ga_report.metrics()["lora_ga/layers_plain"] == 1
