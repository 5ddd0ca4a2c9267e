"""The optimizers of the study of steps take the steps of their formulas, and the study measures what it says."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from pathlib import Path

import pytest
import reference
import tiny
import torch
from torch import Tensor
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "studies"))

import factor_steps
import steps

from lora_ga_trainer import OPTIMIZERS, LoRAGAConfig, LoRAGATrainer, find_adapted_layers


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in factor_steps.ENTRIES.items():
        monkeypatch.setitem(OPTIMIZERS, name, entry)


class Watch(TrainerCallback):
    """Keeps the factors and their gradients of every step, in fp64."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[Tensor, ...]]] = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        keep = lambda layer: (layer.stored_A, layer.stored_B, layer.stored_A.grad, layer.stored_B.grad)
        layers = find_adapted_layers(model)
        self.steps.append({layer.name: tuple(t.detach().double().clone() for t in keep(layer)) for layer in layers})

    def moves(self, name: str, side: int) -> list[Tensor]:
        values = [step[name][side] for step in self.steps]
        return [before - after for before, after in itertools.pairwise(values)]

    def gradients(self, name: str, side: int) -> list[Tensor]:
        return [step[name][side + 2] for step in self.steps]


def walked(folder: Path, correction: str, r: int = 3, count: int = 4) -> tuple[Watch, LoRAGATrainer]:
    """Train tiny layers in fp64 at a constant rate of .01, so that moves are steps."""
    model = tiny.with_lora(tiny.llama(), r=r).double()
    settings = {"max_steps": count, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(folder, **settings, max_grad_norm=0.0),
        train_dataset=tiny.causal_rows(16),
        lora_ga_config=LoRAGAConfig(init="none", correction=correction),
    )
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return watch, trainer


def nesterov(gradients: list[Tensor], momentum: float) -> list[Tensor]:
    """`m <- momentum m + g`, and the step is taken along `g + momentum m`."""
    return [
        g + momentum * sum(momentum ** (t - i) * gradients[i] for i in range(t + 1)) for t, g in enumerate(gradients)
    ]


def test_muon_steps_along_the_polar_factor_of_its_momentum(tmp_path: Path) -> None:
    watch, _ = walked(tmp_path, "exact_muon")
    for name in watch.steps[0]:
        for side, turn in ((0, lambda M: M), (1, lambda M: M.T)):
            found = watch.moves(name, side)
            for move, M in zip(found, nesterov(watch.gradients(name, side), 0.95), strict=False):
                n = turn(M).shape[1]
                torch.testing.assert_close(
                    turn(move), 0.01 * n**0.5 * reference.polar_reference(turn(M)), atol=1e-9, rtol=0
                )
            # The step of B has all singular values sqrt(n) from the first on, and that of A from the second on.
            lengths = torch.linalg.svdvals(found[-1]) / (0.01 * n**0.5)
            torch.testing.assert_close(lengths, torch.ones(3).double(), atol=1e-8, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason=f"torch {torch.__version__} has no Muon")
def test_the_packages_muon_takes_a_fifth_of_that_step_nearly(tmp_path: Path) -> None:
    """Its five Newton-Schulz iterations leave singular values between .6 and 1.3 where the polar factor has 1."""
    watch, _ = walked(tmp_path, "muon")
    for name in watch.steps[0]:
        for side, turn in ((0, lambda M: M), (1, lambda M: M.T)):
            directions = nesterov(watch.gradients(name, side), 0.95)
            for move, M in list(zip(watch.moves(name, side), directions, strict=False))[side == 0 :]:
                n = turn(M).shape[1]
                U = reference.polar_reference(turn(M))
                along = turn(move) @ U.T / (0.01 * 0.2 * n**0.5)
                assert torch.linalg.eigvalsh((along + along.T) / 2).min() > 0.6
                assert torch.linalg.svdvals(turn(move) / (0.01 * 0.2 * n**0.5)).max() < 1.3


def test_one_sided_soap_at_rank_one_is_adam(tmp_path: Path) -> None:
    watch, _ = walked(tmp_path, "soap", r=1)
    for name in watch.steps[0]:
        for side in (0, 1):
            expected = reference.adam_reference(watch.gradients(name, side))
            for move, step in zip(watch.moves(name, side), expected, strict=False):
                torch.testing.assert_close(move, 0.01 * step, atol=1e-12, rtol=1e-9)


def test_one_sided_soap_in_a_frozen_basis_is_adam_of_what_that_basis_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the identity it is Adam. In a turned basis it is Adam of the turned gradient, turned back."""
    turned = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    for Q in (torch.eye(3).double(), turned):
        monkeypatch.setattr(factor_steps.OneSidedSOAP, "basis_of", lambda self, moment, Q=Q: Q)
        watch, _ = walked(tmp_path, "soap")
        for name in watch.steps[0]:
            for side, turn in ((0, lambda M: M), (1, lambda M: M.T)):
                seen = [Q.T @ turn(g) for g in watch.gradients(name, side)]
                for move, step in zip(watch.moves(name, side), reference.adam_reference(seen), strict=False):
                    torch.testing.assert_close(turn(move), 0.01 * Q @ step, atol=1e-12, rtol=1e-9)


def test_the_basis_of_soap_makes_the_running_second_moment_diagonal(tmp_path: Path) -> None:
    _, trainer = walked(tmp_path, "soap", count=2)
    for state in trainer.optimizer.optimizer.state.values():
        D = state["basis"].T @ state["moment"] @ state["basis"]
        torch.testing.assert_close(D, torch.diag(D.diag()), atol=1e-12 * float(D.max()), rtol=0)


def test_polora_steps_by_its_formula_and_no_further_than_the_rate(tmp_path: Path) -> None:
    watch, trainer = walked(tmp_path, "polora")
    # Its last P and Q belong to the last step, whose outcome is in the model.
    optimizer, found = trainer.optimizer.optimizer, find_adapted_layers(trainer.model)
    for index, layer in enumerate(found):
        A, B, _, _ = watch.steps[-1][layer.name]
        dA, dB = (A - layer.stored_A).detach(), (B - layer.stored_B).detach()
        M_A, M_B = (nesterov(watch.gradients(layer.name, side), 0.9)[-1] for side in (0, 1))
        P, Q = (optimizer.seen[index][key] for key in ("dy", "x"))
        P, Q = (m / m.mean() + 0.01 for m in (P, Q))
        of_A, of_B = reference.polora_reference(A, B, M_A, M_B, P, Q)
        torch.testing.assert_close(dA, 0.01 * of_A, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(dB, 0.01 * of_B, atol=1e-9, rtol=1e-6)
        assert torch.linalg.matrix_norm(B @ dA + dB @ A, 2) <= 0.01 * (1 + 1e-9)


def test_polora_sees_the_mean_squares_of_inputs_and_output_gradients(tmp_path: Path) -> None:
    model = tiny.with_lora(tiny.llama(), r=3).double().train()
    optimizer = factor_steps.PoLoRA(model, lr=0.1)
    plain = tiny.llama().double()
    names = [layer.name for layer in find_adapted_layers(model)]
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    for seed in (1, 2):
        rows = tiny.causal_rows(4, seed=seed)
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        model(**batch).loss.backward()
        # B = 0, so the plain model has the same activations.
        seen = reference.layer_inputs_and_output_gradients(plain, names, lambda batch=batch: plain(**batch).loss)
        for name in names:
            kept[name].append([value.square().mean(0) for value in seen[name]])
    for index, name in enumerate(names):
        for key, first, second in zip(("x", "dy"), *kept[name], strict=True):
            torch.testing.assert_close(optimizer.seen[index][key], 0.99 * first + 0.01 * second, rtol=1e-6, atol=0)


def test_a_step_of_factors_refuses_what_else_is_trained() -> None:
    model = tiny.with_lora(tiny.llama())
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Muon: .*lm_head\.weight is trained and not a factor"):
        factor_steps.ExactMuon(model, lr=0.1)


def test_the_study_finds_a_rate_with_worse_ones_beside_it_and_trains_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses that are known beforehand: a parabola in the logarithm of the rate, lower for muon, higher when short."""

    def trained(self, arm, r, rate, seed, length):
        best = {"adamw": 10**-1.25, "muon": 1e-2}[arm]
        gain = 0.1 if arm == "muon" else 0.0
        return 2 + (torch.tensor(rate / best).log10() ** 2).item() + seed / 10 - gain + (250 - length) / 1000

    monkeypatch.setattr(steps.Study, "_train", trained)
    monkeypatch.setattr(steps, "train_base", lambda count: {})
    results = tmp_path / "steps.json"
    words = ["study", "--results", str(results), "--arms", "adamw", "muon", "--ranks", "8"]
    monkeypatch.setattr(sys, "argv", words)
    steps.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][1:4] == ["adamw", "5.6e-02", "2.1000 (2.0000-2.2000)"]
    # 250 / 1.5 = 167 steps lose .083 of the .1 that it is ahead, 125 lose .125.
    assert cells[1][1:] == ["muon", "1.0e-02", "2.0000 (1.9000-2.1000)", "-0.1000 (0.0000)", "1.5"]
    assert statistics.mean(json.loads(results.read_text())[f"manual|muon|8|1.000e-02|{s}|250"] for s in range(3)) == 2
    monkeypatch.setattr(steps.Study, "_train", None)
    steps.main()


@pytest.mark.slow
def test_the_study_trains_each_optimizer_and_a_rate_that_breaks_it_is_the_worst(tmp_path: Path) -> None:
    study = steps.Study(tmp_path / "steps.json", "unittest", base_steps=2, steps=2)
    for arm in steps.ARMS:
        assert 3 < study.loss(arm, 2, -12, seed=0) < 8  # ln 256 = 5.5
    assert study.loss("muon", 2, 120, seed=0) > 1e3
