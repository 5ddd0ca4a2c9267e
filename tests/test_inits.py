"""A start is one entry of `INITS`: named there, it can be asked for, is written, recorded and resumed."""

from __future__ import annotations

import pytest
import reference
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
    with pytest.raises(
        ValueError, match=r"init='top_rows' is unknown\. Choose one of lora_ga, lora_one, gradient_directions, none"
    ):
        LoRAGAConfig(init="top_rows")


@pytest.mark.parametrize("name", INITS)
def test_the_help_of_the_config_lists_every_start_with_its_source(name):
    assert f"{name!r} ({INITS[name].about})" in LoRAGAConfig.__dataclass_fields__["init"].metadata["help"]


def moments_of(folder, batch_size, needs, count=9, r=4, probe_file=None, name="needy"):
    """Return, by layer, what a start that asks for `needs` is given, and the report."""
    seen = {}

    def factors(gradient):
        seen[gradient.top.U.shape[0], gradient.top.Vt.shape[1], gradient.top.S[0].item()] = gradient.moments
        return gradient.top.U.new_zeros(gradient.top.U.shape[0], gradient.r), gradient.top.Vt[: gradient.r]

    INITS[name] = Init("of this test", 1.0, anchored=False, pairs=1, factors=factors, needs=frozenset(needs))
    try:
        trainer = LoRAGATrainer(
            tiny.with_lora(tiny.llama(), r=r),
            tiny.arguments(folder, max_steps=1, per_device_train_batch_size=batch_size),
            train_dataset=tiny.causal_rows(count),
            lora_ga_config=LoRAGAConfig(init=name, num_samples=count, estimator="exact", probe_file=probe_file),
        )
        trainer.train()
    finally:
        del INITS[name]
    assert len(seen) == len(trainer.lora_ga_report.layers)
    return dict(zip([layer.name for layer in trainer.lora_ga_report.layers], seen.values(), strict=True))


def true_rows(names, count=9):
    """Return `x` and `dy` of every layer in fp64, of one pass of the summed loss over all samples."""
    model, rows = tiny.llama().double().eval(), tiny.causal_rows(count)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def summed():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )

    return reference.layer_inputs_and_output_gradients(model, names, summed)


def test_a_start_gets_the_second_moments_it_asks_for(tmp_path):
    """Mean squares over all tokens of the input and of the summed loss's output-gradient, wherever the data is cut."""
    whole, *others = (moments_of(tmp_path, batch_size, {"second_moments"}) for batch_size in (9, 3, 1))
    for name, (x, dy) in true_rows(list(whole)).items():
        found = whole[name]
        assert found.tokens == 9 * 12
        assert found.holds == {"second_moments"}
        for value, rows in ((found.input_second_moments, x), (found.output_second_moments, dy)):
            true = rows.square().mean(dim=0)
            assert (value - true).norm() < 5e-6 * true.norm(), name
        for other in others:
            assert other[name].tokens == found.tokens
            for side in ("input_second_moments", "output_second_moments"):
                value, expected = getattr(other[name], side), getattr(found, side)
                assert (value - expected).norm() < 1e-6 * expected.norm(), (name, side)


def test_a_start_gets_the_covariance_directions_it_asks_for(tmp_path):
    """With as many columns as the layer is wide, r = 8 at 32 features, the sketch is the covariance itself."""
    found = moments_of(tmp_path, 3, {"covariance_directions"}, r=8)
    seen = 0
    for name, (x, dy) in true_rows(list(found)).items():
        moments = found[name]
        for rows, vectors, values in (
            (x, moments.input_directions, moments.input_eigenvalues),
            (dy, moments.output_directions, moments.output_eigenvalues),
        ):
            n, k = vectors.shape
            assert k == min(32, n)
            torch.testing.assert_close(vectors.T @ vectors, torch.eye(k), rtol=0, atol=1e-5)
            covariance = rows.T @ rows / len(rows)
            vectors, values = vectors.double(), values.double()
            if n == k:
                seen += 1
                error = (vectors * values) @ vectors.T - covariance
                assert error.norm() < 1e-5 * covariance.norm(), name
            # Rayleigh quotients: what the leading directions really hold, from 32 columns of up to 48.
            best = torch.linalg.eigvalsh(covariance).flip(0)[:4]
            held = torch.linalg.eigvalsh(vectors[:, :4].T @ covariance @ vectors[:, :4]).flip(0)
            assert (held > 0.95 * best).all(), (name, held / best)
            assert (values[:-1] >= values[1:]).all()
    assert seen


def test_a_start_that_asks_for_nothing_gathers_nothing(tmp_path):
    assert set(moments_of(tmp_path, 3, ()).values()) == {None}


def test_a_file_serves_a_start_that_needs_no_more_than_it_holds(tmp_path):
    file = str(tmp_path / "probe.safetensors")
    first = moments_of(tmp_path, 3, {"second_moments"}, probe_file=file)
    again = moments_of(tmp_path, 3, {"second_moments"}, probe_file=file)
    for name, moments in first.items():
        assert again[name].tokens == moments.tokens
        assert torch.equal(again[name].input_second_moments, moments.input_second_moments)
        assert torch.equal(again[name].output_second_moments, moments.output_second_moments)
    moments_of(tmp_path, 3, (), probe_file=file)
    with pytest.raises(ValueError, match=r"probe\.safetensors' .*does not hold the covariance_directions of .*De"):
        moments_of(tmp_path, 3, {"second_moments", "covariance_directions"}, probe_file=file)


def test_a_file_of_a_lower_rank_lacks_directions_of_a_higher_one(tmp_path):
    file = str(tmp_path / "probe.safetensors")
    moments_of(tmp_path, 3, {"covariance_directions"}, r=2, probe_file=file)
    moments_of(tmp_path, 3, {"covariance_directions"}, r=1, probe_file=file)
    with pytest.raises(ValueError, match=r"does not hold the covariance_directions of layer .* at rank 4\. Delete it"):
        moments_of(tmp_path, 3, {"covariance_directions"}, r=4, probe_file=file)


def test_experts_are_refused_by_name_before_the_passes(tmp_path, monkeypatch):
    init = Init("of this test", 1.0, anchored=False, pairs=1, factors=top_rows, needs=frozenset({"second_moments"}))
    monkeypatch.setitem(INITS, "needy", init)
    parameters = ["mlp.experts.down_proj"]
    trainer = LoRAGATrainer(
        tiny.with_lora(tiny.qwen3_moe(), target_modules=["q_proj"], target_parameters=parameters),
        tiny.arguments(tmp_path, max_steps=1),
        train_dataset=tiny.causal_rows(8),
        lora_ga_config=LoRAGAConfig(init="needy", num_samples=8),
    )
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: pytest.fail("a pass was run"))
    with pytest.raises(ValueError, match=r"init='needy' needs second_moments.*experts\.down_proj.*target_parameters"):
        trainer.train()
