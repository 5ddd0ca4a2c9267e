"""A start is one entry of `INITS`: named there, it can be asked for, is written, recorded and resumed."""

from __future__ import annotations

import pytest
import tiny
import torch

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.maths.inits import INITS, Init


ARGUMENTS = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}


def top_rows(gradient):
    """A0 = V_r^T / gamma, B0 = 0: the first step is the projection of G on its own top directions."""
    top, r = gradient.top, gradient.r
    return top.U.new_zeros(top.U.shape[0], r), top.Vt[:r] / gradient.gamma


@pytest.fixture
def named(monkeypatch):
    init = Init("a start of this test", default_gamma=2.0, anchored=False, pairs=1, factors=top_rows)
    monkeypatch.setitem(INITS, "top_rows", init)
    return init


def train(folder, steps=2, resume=None, **settings):
    trainer = LoRAGATrainer(
        tiny.with_lora(tiny.llama()),
        tiny.arguments(folder, **(ARGUMENTS | {"max_steps": steps} | settings)),
        train_dataset=tiny.causal_rows(16),
        lora_ga_config=LoRAGAConfig(init="top_rows", num_samples=8, estimator="exact"),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_new_entry_is_all_that_a_new_start_needs(tmp_path, named):
    assert LoRAGAConfig(init="top_rows").gamma == 2.0
    trainer = train(tmp_path, learning_rate=0.0)
    assert trainer.lora_ga_report.init == "top_rows"
    for layer, report in zip(find_adapted_layers(trainer.model), trainer.lora_ga_report.layers, strict=True):
        A = layer.stored_A.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(4) / 4, rtol=1e-4, atol=1e-5)
        assert not layer.stored_B.any()
        assert report.scale == pytest.approx(0.5, rel=1e-4)


def test_a_run_with_it_continues_where_it_stopped(tmp_path, named):
    whole = train(tmp_path / "whole", steps=4)
    train(tmp_path / "half", steps=2)
    resumed = train(tmp_path / "half", steps=4, resume=True)
    assert resumed.lora_ga_report is None
    for one, other in zip(find_adapted_layers(whole.model), find_adapted_layers(resumed.model), strict=True):
        assert torch.equal(one.stored_A, other.stored_A)
        assert torch.equal(one.stored_B, other.stored_B)


def test_a_start_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"init='top_rows' is unknown\. Choose one of lora_ga, lora_one, none"):
        LoRAGAConfig(init="top_rows")


@pytest.mark.parametrize("name", INITS)
def test_the_help_of_the_config_lists_every_start_with_its_source(name):
    assert f"{name!r} ({INITS[name].about})" in LoRAGAConfig.__dataclass_fields__["init"].metadata["help"]
