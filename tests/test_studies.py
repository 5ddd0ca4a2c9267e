"""The studies behind the docs run, and show what the docs say of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import set_seed


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "studies"))

import byte_model
import directions
import forgetting
import learning_rates
import lora_pro_from_zero
import ranks
import rival_rules as rivals

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, find_adapted_layers


def rows_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    """Run the study. Returns the cells of its table by the correction."""
    monkeypatch.setattr(sys, "argv", ["study", "--inits", "none", "--seeds", "0", *words])
    lora_pro_from_zero.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {correction: [loss, change] for _, correction, _, loss, _, change in rows}


def test_from_zero_a_correction_moves_A_as_the_rate_lets_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """At a rate of 1e-9 nothing moves. At 1e-3 `lora_pro` moves `A` about as far as AdamW does (docs/lora_pro.md)."""
    results = ["--results", str(tmp_path / "found.jsonl")]
    still = rows_of(monkeypatch, capsys, "--rates", "1e-9", "--steps", "3", *results)
    assert {change.split()[0] for _, change in still.values()} == {"0.000"}
    assert set(still) == {"none", "lora_pro", "lora_pro_adamw"}
    found = rows_of(
        monkeypatch, capsys, "--corrections", "none", "lora_pro", "--rates", "1e-3", "--steps", "30", *results
    )
    moved = {correction: float(change.split()[0]) for correction, (_, change) in found.items()}
    assert moved["lora_pro"] == pytest.approx(moved["none"], rel=0.25)


def test_the_study_of_directions_turns_the_rows_as_the_init_does(tmp_path: Path) -> None:
    """Its arms are prototypes, which take fp64 gradients with hooks of their own."""
    study = directions.Study(tmp_path / "found.json", "manual", 2, 1)
    for arm, w in (("w=0", 0.0), ("w=.25", 0.25), ("w=.5", 0.5)):
        by_hand = study._trainer(arm, 8, 0.0, 3).model
        set_seed(3)
        config = LoRAGAConfig(init="gradient_directions", whitening=w, estimator="exact", probe_seed=3)
        model = directions.with_lora(study.model(), 8, arm)
        settings = byte_model.arguments(0.0, 3, 1)
        LoRAGATrainer(model, settings, train_dataset=study.train_rows, lora_ga_config=config).train()
        for one, other in zip(find_adapted_layers(by_hand), find_adapted_layers(model), strict=True):
            A, expected = other.stored_A.detach(), one.stored_A.detach()
            # The sign of a row is free. Where two singular values lie close, fp32 mixes their directions.
            cosines = torch.nn.functional.cosine_similarity(A, expected, dim=1).abs()
            assert cosines.mean() > 0.999, (arm, one.name, cosines)
            torch.testing.assert_close(A.norm(dim=1), expected.norm(dim=1), rtol=1e-5, atol=0)


def test_a_second_run_of_the_study_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--corrections", "none", "--rates", "1e-3", "--steps", "2", "--results", str(tmp_path / "found.jsonl")]
    first = rows_of(monkeypatch, capsys, *words)
    monkeypatch.setattr(lora_pro_from_zero, "train", None)
    assert rows_of(monkeypatch, capsys, *words) == first


def test_a_regret_is_what_the_found_rate_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One short cell: the table's regret is that of the kept losses, and a second run trains nothing anew."""
    results = tmp_path / "rates.json"
    options = [
        "--cells",
        "plain",
        "--seeds",
        "0",
        "--steps",
        "3",
        "--base_steps",
        "3",
        "--rates",
        "1e-3",
        "1e-2",
        "1e-1",
    ]
    monkeypatch.setattr(sys, "argv", ["study", "--results", str(results), *options])
    learning_rates.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| plain")]
    kept = json.loads(results.read_text())
    losses = {rate: kept[f"manual|plain|0|{rate:.3e}"] for rate in (1e-3, 1e-2, 1e-1)}
    regret = kept["manual|plain|0|loss at found"] - min(losses.values())
    assert float(row.split("|")[-2]) == pytest.approx(regret, abs=6e-5)
    monkeypatch.setattr(learning_rates, "loss_after_training", lambda trainer: pytest.fail("trained again"))
    learning_rates.main()


def test_the_loss_between_two_rates_of_a_sweep_is_linear_in_the_logarithm() -> None:
    losses = {1e-3: 2.0, 1e-2: 1.0, 1e-1: 3.0}
    assert learning_rates.loss_at(losses, 1e-2) == 1.0
    assert learning_rates.loss_at(losses, 10**-2.5) == pytest.approx(1.5)
    assert learning_rates.loss_at(losses, 1e-9) == 2.0
    # A parabola through (0, 2), (1, 1), (2, 3) is least at 5/6.
    assert learning_rates.best_of(losses)[0] == pytest.approx(10 ** (-3 + 5 / 6))


def test_directions_are_those_of_the_gradient_and_rows_keep_their_lengths(tmp_path: Path) -> None:
    study = directions.Study(tmp_path / "directions.json", "manual", base_steps=2, steps=2)
    model = study.model()
    order = torch.randperm(len(study.train_rows), generator=torch.Generator().manual_seed(3)).tolist()
    for begin in range(0, directions.SAMPLES, directions.BATCH):
        batch = torch.stack([study.train_rows[i]["input_ids"] for i in order[begin : begin + directions.BATCH]])
        model(input_ids=batch, labels=batch).loss.backward()
    found = study._directions("w=0", 2, seed=3)
    adapted = directions.with_lora(study.model(), 2, "plain")
    lengths = [layer.stored_A.norm(dim=1) for layer in find_adapted_layers(adapted)]
    directions.write_rows(adapted, found)
    for layer, length in zip(find_adapted_layers(adapted), lengths, strict=True):
        V = torch.linalg.svd(model.get_submodule(layer.name).weight.grad)[2][:2].T
        # The projectors: a singular vector has no sign. fp32 gradients, whose gaps are percents of them.
        torch.testing.assert_close((found[layer.name] @ found[layer.name].T).float(), V @ V.T, rtol=0, atol=1e-3)
        torch.testing.assert_close(layer.stored_A.norm(dim=1), length)
        assert not layer.stored_B.any()


def test_the_rows_of_lora_da_make_its_objective_least(tmp_path: Path) -> None:
    """
    `-||D A^T||^2 + .03 tr(P^-1) / N tr(A Q^-1 A^T)` over orthonormal rows of `A`, with `D` from inverses.

    At the least value the gradient on the manifold vanishes, and no rows nearby or at random have a smaller one.
    """
    study = directions.Study(tmp_path / "directions.json", "manual", base_steps=2, steps=2)
    found, count, r = study._directions("lora_da", 2, seed=3), len(study.train_rows), 2
    generator = torch.Generator().manual_seed(0)
    for name, (G, of_x, of_dy) in study._means(3).items():
        P = torch.diag(of_dy + 0.01 * of_dy.sum() / len(of_dy))
        Q = of_x + 0.01 * of_x.trace() / len(of_x) * torch.eye(len(of_x), dtype=torch.float64)
        D = torch.linalg.inv(P) @ G @ torch.linalg.inv(Q)
        variance = 0.03 * torch.linalg.inv(P).trace() / count

        def objective(V: torch.Tensor) -> float:
            return (variance * (V.T @ torch.linalg.solve(Q, V)).trace() - (D @ V).square().sum()).item()  # noqa: B023

        V = found[name]
        torch.testing.assert_close(V.T @ V, torch.eye(r, dtype=torch.float64))
        least = objective(V)
        assert variance * torch.linalg.inv(Q).trace() > 0
        for size in (1e-3, 1e-1, 1e3):
            noise = torch.randn(V.shape, generator=generator, dtype=torch.float64)
            assert objective(torch.linalg.qr(V + size * noise)[0]) > least


def test_the_means_of_the_study_are_those_of_one_row_at_a_time(tmp_path: Path) -> None:
    study = directions.Study(tmp_path / "directions.json", "manual", base_steps=2, steps=2)
    model, name = study.model(), "model.layers.1.mlp.up_proj"
    order = torch.randperm(len(study.train_rows), generator=torch.Generator().manual_seed(3)).tolist()
    seen = {"x": [], "dy": []}
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, args, y: seen["x"].append(args[0].detach()[0].double()))
    layer.register_full_backward_hook(lambda module, dx, dy: seen["dy"].append(dy[0][0].double()))
    for index in order[: directions.SAMPLES]:
        row = study.train_rows[index]["input_ids"][None]
        model(input_ids=row, labels=row).loss.backward()
    x, dy = (torch.cat(rows) for rows in seen.values())
    G, of_x, of_dy = study._means(3)[name]
    for ours, expected in (
        (G, dy.T @ x / directions.SAMPLES),
        (of_x, x.T @ x / len(x)),
        (of_dy, dy.square().mean(dim=0)),
    ):
        assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_the_scalings_are_what_their_names_say() -> None:
    scalings = dict.fromkeys(("plain", "rslora", "alpha16", "alpha256"), 0.0)
    for arm in scalings:
        model = directions.with_lora(tiny.llama(), 4, arm)
        scalings[arm] = find_adapted_layers(model)[0].scaling
    assert scalings == {"plain": 2.0, "rslora": 8.0, "alpha16": 4.0, "alpha256": 128.0}


def test_paired_differences_have_their_standard_error() -> None:
    assert directions.paired([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]) == "+1.3333 (0.8819)"


@pytest.mark.slow
def test_what_was_forgotten_is_the_rise_of_the_loss_on_text_of_the_base_s_kind() -> None:
    """A strength of 1 changes nothing; the adapter learns its text, and the base is the one it was trained on."""
    base = byte_model.train_base(100)
    count, found = forgetting.measure(base, "none", 0.01, 8, 40, [1.0, 0.0], k=10, eps=0.5)
    assert count > 0
    assert found["strength 1"] == found["adapter"]
    assert found["adapter"][1] < found["base"][1] - 0.1
    # With nothing left of the new directions the model knows less of the new text.
    assert found["strength 0"][1] > found["adapter"][1] + 0.1
    twin = byte_model.load_base(base).eval()
    rows = torch.stack([row["input_ids"] for row in byte_model.rows_of("email/*.py", 40_000)])
    with torch.no_grad():
        whole = twin(input_ids=rows, labels=rows).loss.item()
    assert found["base"][0] == pytest.approx(whole, rel=1e-5)


def test_rules_are_compared_at_their_best_rates_and_equal_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best of the first rates is inside, so no other is tried; a second run trains nothing anew."""
    losses = {ranks.RATES[index]: 1 + abs(index - 9) for index in ranks.FIRST}
    monkeypatch.setattr(
        ranks.LoRAGATrainer, "evaluate", lambda trainer: {"eval_loss": losses[trainer.args.learning_rate]}
    )
    words = [
        "--tasks",
        "tables",
        "--ranks",
        "2",
        "--rules",
        "energy",
        "--seeds",
        "0",
        "--steps",
        "1",
        "--base_steps",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["study", "--results", str(tmp_path / "ranks.json"), *words])
    ranks.main()
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("| tables")]
    _, task, budget, rule, rate, loss, gap, *_ = (cell.strip() for cell in row.split("|"))
    assert (task, budget, rule, rate) == ("tables", "r = 2", "energy", f"{ranks.RATES[9]:.1e}")
    assert (loss, gap) == ("1.0000 (1.0000-1.0000)", "+0.0000 (nan)")
    kept = json.loads((tmp_path / "ranks.json").read_text())
    assert len(kept) == 6
    assert all(0.95 < run["share"] <= 1 for run in kept.values())
    monkeypatch.setattr(ranks.LoRAGATrainer, "train", lambda trainer: pytest.fail("trained again"))
    ranks.main()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tables")] == [row]


def test_a_range_test_suggests_where_the_loss_falls_fastest() -> None:
    """Flat, a fall of 40 steps, flat again. The smoothed loss of torch-lr-finder (.05) falls most where it ends."""
    rates = [10 ** (-5 + step / 12) for step in range(60)]
    tried = {rate: 4.0 - 0.05 * min(max(step - 10, 0), 40) for step, rate in enumerate(rates)}
    # The gap to the raw loss, and so the fall, grows as long as the raw loss falls: to step 50.
    assert rivals.steepest(tried) == rates[49]
    # fastai's smoothed loss falls from step 11 to the last: half-way from one before it.
    assert rivals.valley(tried) == pytest.approx(rates[34], rel=0.3)


def test_a_missing_library_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps prodigyopt, or leave"):
        rivals.require_libraries(["race", "prodigy"])
    rivals.require_libraries(["race"])


def test_the_published_rate_is_5e_minus_4_at_a_hidden_size_of_2000() -> None:
    assert rivals.published(2000) == 5e-4
    assert rivals.published(4096) == pytest.approx(2.86e-4, rel=2e-3)
