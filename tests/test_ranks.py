"""Planned ranks: what each rule wants, how a budget is spent, what an adapter can be, what the trainer makes of it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import spy
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from lora_ga_trainer import (
    RULES,
    LayerRank,
    LoRAGACallback,
    LoRAGAConfig,
    LoRAGAMixin,
    LoRAGATrainer,
    RankPlan,
    estimate_gradients,
    find_adapted_layers,
    find_learning_rate,
    plan_ranks,
)
from lora_ga_trainer.adapters.find import find_lora_layers
from lora_ga_trainer.maths.dimension import two_nn
from lora_ga_trainer.maths.ranks import LayerEvidence, confirm, spend
from lora_ga_trainer.ranks.evidence import block_of
from lora_ga_trainer.saving.record import record_of_model


ROWS = 32


def seen(shape=(20, 12), spectrum=(1.0,), cost=None, **changes):
    spectrum = torch.tensor(spectrum, dtype=torch.float64)
    cost = sum(shape) if cost is None else cost
    return LayerEvidence(shape, cost, spectrum, spectrum.square().sum().item(), **changes)


def ranks_of(rule, evidence, budget):
    costs = [layer.cost for layer in evidence]
    return spend(RULES[rule].worths(evidence, budget / sum(costs)), costs, budget)


# --- spending


def test_what_is_bought_is_the_best_of_all_that_the_budget_can_buy():
    """Against every choice there is, at equal costs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        worths = torch.rand(3, 4, generator=generator).sort(descending=True).values.tolist()
        for afford in range(13):
            bought = spend(worths, [5, 5, 5], 5 * afford + 4)
            worth = lambda ranks: sum(sum(row[:r]) for row, r in zip(worths, ranks, strict=True))  # noqa: B023
            every = [ranks for ranks in itertools.product(range(5), repeat=3) if sum(ranks) <= afford]
            assert worth(bought) == pytest.approx(max(map(worth, every)))


@pytest.mark.parametrize("rule", ["uniform", "energy", "gora", "gelora"])
@pytest.mark.parametrize("budget", [31, 200, 777, 1500])
def test_no_layer_could_get_one_more_rank_within_the_budget(rule, budget):
    shapes = [(20, 12), (16, 15), (40, 8), (9, 30)]
    evidence = [
        seen(shape, [1 / (i + 1 + n) for i in range(min(shape))], sensitivity=1.0 + n, growth=n)
        for n, shape in enumerate(shapes)
    ]
    ranks = ranks_of(rule, evidence, budget)
    left = budget - sum(rank * layer.cost for rank, layer in zip(ranks, evidence, strict=True))
    assert left >= 0
    most = lambda layer: min(layer.cap, int(4 * budget / sum(e.cost for e in evidence)) or 1)
    for rank, layer in zip(ranks, evidence, strict=True):
        cap = most(layer) if rule == "gora" else layer.cap
        assert layer.cost > left or rank == cap


# --- the rules


@pytest.mark.parametrize("r", [1, 3, 8])
def test_at_the_budget_of_a_uniform_rank_uniform_gives_it_back(r):
    evidence = [seen((20, 12)), seen((64, 32)), seen((9, 10))]
    assert ranks_of("uniform", evidence, r * sum(layer.cost for layer in evidence)) == [r, r, r]


def test_energy_holds_the_most_of_it_per_parameter():
    """The second layer's directions cost twice as much, so one of energy 9 comes after one of 5."""
    evidence = [seen((6, 4), [5**0.5, 2.0, 1.0]), seen((12, 8), [3.0, 1.0])]
    assert ranks_of("energy", evidence, 10) == [1, 0]
    assert ranks_of("energy", evidence, 30) == [1, 1]
    assert ranks_of("energy", evidence, 40) == [2, 1]


def test_a_layer_with_all_the_energy_gets_its_cap_and_the_others_none():
    evidence = [seen((6, 4), [0.0]), seen((12, 8), [1.0 / (i + 1) for i in range(8)]), seen((6, 4), [0.0])]
    assert ranks_of("energy", evidence, 10_000) == [0, 8, 0]


def test_gora_shares_by_the_mean_of_weight_times_gradient():
    """Equal shapes: ranks in proportion to the sensitivities, and none outside half and four times the uniform one."""
    evidence = [seen((40, 40), sensitivity=value) for value in (3.0, 2.0, 1.0)]
    assert ranks_of("gora", evidence, 6 * 240) == [9, 6, 3]
    evidence = [seen((40, 40), sensitivity=value) for value in (1.0, 0.0, 0.0)]
    assert ranks_of("gora", evidence, 4 * 240) == [8, 2, 2]
    assert ranks_of("gora", [seen((40, 40), sensitivity=1.0), seen((40, 40), sensitivity=0.0)], 1 * 160) == [2, 0]


def halves(rank, strength, seed, shape=(48, 32)):
    """Two sums of `rank` strong directions and noise of size 1, independent in the two."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
    U, V = torch.linalg.qr(draw(shape[0], max(rank, 1)))[0], torch.linalg.qr(draw(shape[1], max(rank, 1)))[0]
    signal = strength * U @ V.T if rank else torch.zeros(shape, dtype=torch.float64)
    return signal + draw(*shape), signal + draw(*shape)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_signal_supports_as_many_directions_as_both_halves_have(rank):
    counts = []
    for seed in range(10):
        confirmed, errors = confirm(*halves(rank, 60.0, seed))
        counts.append(seen((48, 32), confirmed=confirmed, errors=errors).sure)
    # One noise direction in 700 passes three standard errors: .5 of 320 are expected.
    assert sum(counts) - 10 * rank in (0, 1, 2)
    assert min(counts) == rank


def test_the_standard_error_is_that_of_repeated_halves():
    """Of pure noise it is the noise; of a strong signal it is twice that: its row and its column are both doubled."""
    confirmed, errors = zip(*(confirm(*halves(0, 0.0, seed)) for seed in range(60)), strict=True)
    assert torch.stack(confirmed).std() == pytest.approx(1.0, rel=0.05)
    assert torch.stack(errors).square().mean().sqrt() == pytest.approx(1.0, rel=0.05)
    confirmed, errors = zip(*(confirm(*halves(1, 60.0, seed)) for seed in range(60)), strict=True)
    spread = torch.stack(confirmed)[:, 0].std()
    # 60 draws know the spread to 9%.
    assert torch.stack(errors)[:, 0].square().mean().sqrt() / spread == pytest.approx(2.0, rel=0.25)


def test_signal_buys_what_is_confirmed_first_and_shares_out_the_rest_among_those_layers():
    values = torch.tensor([9.0, 0.1, 5.0, -7.0], dtype=torch.float64)
    evidence = [
        seen((4, 6), confirmed=values, errors=torch.ones(4, dtype=torch.float64)),
        seen((4, 6), confirmed=values / 100, errors=torch.ones(4, dtype=torch.float64)),
        seen((4, 6), confirmed=values / 2, errors=torch.ones(4, dtype=torch.float64)),
    ]
    assert [layer.sure for layer in evidence] == [2, 0, 1]
    assert [ranks_of("signal", evidence, 10 * n) for n in range(1, 5)] == [[1, 0, 0], [2, 0, 0], [2, 0, 1], [3, 0, 1]]
    assert ranks_of("signal", evidence, 10_000) == [4, 0, 4]


def test_gelora_gives_growth_plus_one_at_the_budget_of_just_that():
    evidence = [seen((20, 12), growth=0), seen((30, 12), growth=4), seen((9, 10), growth=1)]
    exact = sum((layer.growth + 1) * layer.cost for layer in evidence)
    assert ranks_of("gelora", evidence, exact) == [1, 5, 2]


@pytest.mark.parametrize("d", [2, 5])
def test_the_dimension_is_that_of_the_manifold_and_not_of_the_space(d):
    generator = torch.Generator().manual_seed(d)
    flat = torch.rand(1500, d, generator=generator) @ torch.randn(d, 40, generator=generator)
    ball = torch.randn(1500, d + 1, generator=generator)
    sphere = ball / ball.norm(dim=1, keepdim=True) @ torch.randn(d + 1, 40, generator=generator)
    for points in (flat, sphere):
        # The standard error is d / sqrt(1500). The border of a cube lowers the estimate by a few percent.
        assert two_nn(points) == pytest.approx(d, rel=0.1)
        assert two_nn(torch.cat([points, points])) == pytest.approx(two_nn(points))


def test_a_dimension_of_few_points_is_refused():
    with pytest.raises(ValueError, match="at least 20 points that differ, not 3"):
        two_nn(torch.eye(3).repeat(50, 1))


def test_the_block_of_a_layer_ends_in_its_first_number():
    assert block_of("model.layers.11.self_attn.q_proj") == "model.layers.11"
    assert block_of("encoder.block.0.layer.1.wo") == "encoder.block.0"
    assert block_of("lm_head") is None
    assert block_of("h.3.c_fc2") == "h.3"


# --- the plan


def make_trainer(folder, lora_ga=None, kind=LoRAGATrainer, model=None, lora=None, rows=None, **changes):
    torch.manual_seed(7)
    return kind(
        tiny.llama() if model is None else model,
        tiny.arguments(folder, **changes),
        train_dataset=tiny.causal_rows(ROWS) if rows is None else rows,
        peft_config=LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | (lora or {}))),
        lora_ga_config=LoRAGAConfig(**({"num_samples": 16} | (lora_ga or {}))),
    )


def gradient_of(trainer, rows):
    """`dL/dW` of every layer over rows, by plain autograd on the plain model, in fp64."""
    model = tiny.llama().double()
    for row in rows:
        batch = {name: value[None] for name, value in row.items()}
        count = batch["labels"][:, 1:].ne(-100).sum()
        (model(**batch).loss * count).backward()
    items = sum(int(row["labels"][1:].ne(-100).sum()) for row in rows)
    return {
        layer.name: model.get_submodule(layer.name).weight.grad / items for layer in find_adapted_layers(trainer.model)
    }


@pytest.mark.parametrize("rule", RULES)
def test_a_plan_leaves_no_trace_and_spends_what_the_adapter_has(rule, tmp_path):
    trainer = make_trainer(tmp_path, lora={"lora_dropout": 0.1})
    before = spy.Spy(trainer)
    plan = plan_ranks(trainer, rule=rule)
    before.assert_same(spy.Spy(trainer))
    layers = find_adapted_layers(trainer.model)
    assert plan.budget == sum(4 * sum(layer.shape) for layer in layers)
    cheapest = min(sum(layer.shape) for layer in layers)
    assert plan.spent <= plan.budget
    # `signal` leaves layers out, and those that it keeps have a largest rank.
    assert plan.budget - cheapest < plan.spent or rule == "signal"
    assert plan.spent == sum(layer.parameters for layer in plan.layers)
    assert plan.samples == 16
    if rule == "uniform":
        assert set(plan.ranks.values()) == {4}


def test_the_gradient_of_a_plan_and_its_error_are_those_of_autograd(tmp_path):
    """The lower bound: tails of the singular values of the true gradient, in fp64."""
    rows = tiny.causal_rows(16)
    trainer = make_trainer(tmp_path, rows=rows)
    exact = gradient_of(trainer, rows)
    for rule in ("energy", "signal"):
        plan = plan_ranks(trainer, rule=rule, budget=1200, config=LoRAGAConfig(num_samples=16, estimator="exact"))
        lost = whole = 0.0
        for layer in plan.layers:
            U, S, Vt = torch.linalg.svd(exact[layer.name])
            best = U[:, : layer.rank] * S[: layer.rank] @ Vt[: layer.rank]
            assert layer.expressed == pytest.approx(
                1 - ((exact[layer.name] - best).norm() / S.norm()).item() ** 2, abs=1e-5
            )
            lost, whole = lost + (exact[layer.name] - best).square().sum(), whole + S.square().sum()
        assert plan.missed == pytest.approx((lost / whole).sqrt().item(), abs=1e-5)
        assert f"{plan.missed:.3f}" in plan.summary()


def test_energy_misses_least_of_all_rules(tmp_path):
    trainer = make_trainer(tmp_path)
    missed = {rule: plan_ranks(trainer, rule=rule, budget=2000).missed for rule in RULES}
    assert min(missed, key=missed.__getitem__) == "energy"


def test_the_halves_are_of_different_samples_and_both_together_are_the_whole(tmp_path):
    trainer = make_trainer(tmp_path)
    exact = LoRAGAConfig(num_samples=8, estimator="exact")
    first, whole = (estimate_gradients(trainer, replace(exact, num_samples=n)) for n in (8, 16))
    second = estimate_gradients(trainer, exact, skip=8)
    for name, G in whole.estimators.items():
        both = first.estimators[name].G * first.items + second.estimators[name].G * second.items
        torch.testing.assert_close(both / whole.items, G.G, rtol=0, atol=1e-6 * G.G.abs().max().item())
    assert first.items + second.items == whole.items
    with pytest.raises(ValueError, match="gave 32 samples and 32 of them were to be passed over"):
        estimate_gradients(trainer, exact, skip=32)


def plan_of(ranks, shape=(6, 5), scaling=2.0):
    layers = [LayerRank(name, shape, r, r * sum(shape), scaling, 0.5, 1.0) for name, r in ranks.items()]
    return RankPlan("energy", 1000, 900, "parameters", 4, 0.1, layers)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_what_ranks_can_be_of_a_change_is_the_tail_of_its_singular_values(rank):
    change = torch.randn(6, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    U, S, Vt = torch.linalg.svd(change, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vt[:rank]
    error = plan_of({"a": rank}).express({"a": change})["a"]
    assert error == pytest.approx((change - best).norm().item() / change.norm().item(), abs=1e-12)
    # No product of that rank comes nearer, whatever it is.
    for seed in range(20):
        generator = torch.Generator().manual_seed(100 + seed)
        B = torch.randn(6, rank, generator=generator, dtype=torch.float64)
        A = torch.linalg.lstsq(B, change).solution if rank else torch.zeros(0, 5, dtype=torch.float64)
        assert (change - B @ A).norm() / change.norm() >= error - 1e-12


def test_a_change_of_another_layer_or_shape_is_refused():
    with pytest.raises(ValueError, match="b is not a layer of this plan"):
        plan_of({"a": 1}).express({"b": torch.zeros(6, 5)})
    with pytest.raises(ValueError, match=r"a: the change is \(5, 6\)"):
        plan_of({"a": 1}).express({"a": torch.zeros(5, 6)})


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 32}}])
def test_the_adapter_has_the_planned_ranks_and_every_layer_its_scaling(settings, tmp_path):
    trainer = make_trainer(tmp_path, lora=settings)
    scalings = {layer.name: layer.scaling for layer in find_adapted_layers(trainer.model)}
    plan = plan_ranks(trainer, rule="energy", budget=900)
    assert 0 in plan.ranks.values(), "some layer must be left out"
    base = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.25, **settings)
    made = plan.lora_config(base)
    assert made.lora_dropout == 0.25
    model = get_peft_model(tiny.llama(), made)
    layers = find_lora_layers(model)
    assert {layer.name: layer.rank for layer in layers} == {name: rank for name, rank in plan.ranks.items() if rank}
    assert {layer.name: layer.scaling for layer in layers} == pytest.approx(
        {layer.name: scalings[layer.name] for layer in layers}
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.spent


def test_a_uniform_plan_gives_back_the_config_but_for_the_names(tmp_path):
    plan = plan_ranks(make_trainer(tmp_path), rule="uniform")
    made = plan.lora_config(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    assert (made.r, made.lora_alpha, made.rank_pattern, made.alpha_pattern) == (4, 8, {}, {})
    assert made.target_modules == set(plan.ranks)


def test_a_budget_of_bytes_is_that_of_the_factors(tmp_path):
    trainer = make_trainer(tmp_path)
    of_parameters, of_bytes = plan_ranks(trainer, 1500), plan_ranks(trainer, 6000, in_bytes=True)
    assert of_bytes.ranks == of_parameters.ranks
    assert of_bytes.spent == 4 * of_parameters.spent
    assert of_bytes.unit == "bytes"


def test_table_picture_and_file_show_every_layer(tmp_path):
    plan = plan_ranks(make_trainer(tmp_path), rule="energy", budget=900)
    lines = plan.table().splitlines()
    assert len(lines) == 4  # head, rule, two blocks
    cells = [cell.strip() for line in lines[2:] for cell in line.strip("|").split("|")[1:]]
    assert sorted(map(int, cells)) == sorted(plan.ranks.values())
    plan.to_json(tmp_path / "plan.json")
    assert [layer["rank"] for layer in json.loads((tmp_path / "plan.json").read_text())["layers"]] == list(
        plan.ranks.values()
    )
    pytest.importorskip("matplotlib")
    assert plan.picture().shape[2] == 3
    assert math.isfinite(plan.metrics()["lora_ga/gradient_missed"])


# --- the trainer


def trained(trainer):
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("init", ["none", "lora_ga", "lora_one"])
def test_a_run_with_planned_ranks_is_the_run_with_that_config_to_the_bit(init, tmp_path):
    lora = {"lora_dropout": 0.1}
    auto = {"init": init, "ranks": "auto", "rank_rule": "energy", "rank_budget": 1500}
    trainer = make_trainer(tmp_path / "auto", auto, lora=lora)
    losses, weights = trained(trainer)
    plan = trainer.lora_ga_rank_plan
    assert 0 in plan.ranks.values()
    assert json.loads((tmp_path / "auto" / "lora_ga_ranks.json").read_text())["rule"] == "energy"
    torch.manual_seed(7)
    by_hand = LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(tmp_path / "hand"),
        train_dataset=tiny.causal_rows(ROWS),
        peft_config=plan.lora_config(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)),
        lora_ga_config=LoRAGAConfig(init=init, num_samples=16),
    )
    losses_by_hand, weights_by_hand = trained(by_hand)
    assert losses == losses_by_hand
    assert weights.keys() == weights_by_hand.keys()
    assert all(torch.equal(value, weights_by_hand[name]) for name, value in weights.items())


@pytest.mark.parametrize("init", ["none", "lora_ga"])
def test_checkpoints_hold_the_ranks_resume_with_them_and_load_with_plain_peft(init, tmp_path):
    auto = {"init": init, "ranks": "auto", "rank_rule": "energy", "rank_budget": 1500, "estimator": "exact"}
    saves = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", auto, **saves)
    _, weights = trained(whole)
    folder = tmp_path / "whole" / "checkpoint-2"
    resumed = make_trainer(tmp_path / "resumed", auto, **saves)
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.lora_ga_rank_plan is None
    assert all(torch.equal(value, dict(resumed.model.named_parameters())[name]) for name, value in weights.items())
    stored = 1 if init == "none" else 2
    plain = PeftModel.from_pretrained(tiny.llama(), str(folder))
    assert {layer.name: layer.rank for layer in find_lora_layers(plain)} == {
        name: stored * rank for name, rank in whole.lora_ga_rank_plan.ranks.items() if rank
    }
    batch = {name: value[None] for name, value in tiny.causal_rows(1)[0].items()}
    last = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(last(**batch).loss, whole.model.eval()(**batch).loss)


def test_a_second_training_keeps_the_ranks(tmp_path):
    trainer = make_trainer(tmp_path, {"init": "none", "ranks": "auto", "rank_rule": "energy"})
    trainer.train()
    plan, model = trainer.lora_ga_rank_plan, trainer.model
    trainer.train()
    assert trainer.lora_ga_rank_plan is plan
    assert trainer.model is model


def test_models_of_model_init_get_the_planned_ranks(tmp_path):
    torch.manual_seed(7)
    trainer = LoRAGATrainer(
        None,
        tiny.arguments(tmp_path),
        model_init=lambda: tiny.llama(),
        train_dataset=tiny.causal_rows(ROWS),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        lora_ga_config=LoRAGAConfig(num_samples=16, ranks="auto", rank_rule="energy", rank_budget=1500),
    )
    trainer.train()
    ranks = {name: rank for name, rank in trainer.lora_ga_rank_plan.ranks.items() if rank}
    assert {layer.name: layer.rank for layer in find_adapted_layers(trainer.model)} == ranks
    assert record_of_model(trainer.model).initialised


def test_a_rate_is_found_for_the_planned_adapter(tmp_path):
    trainer = make_trainer(tmp_path, {"ranks": "auto", "rank_rule": "energy", "rank_budget": 1500})
    assert find_learning_rate(trainer).learning_rate > 0
    assert 0 in trainer.lora_ga_rank_plan.ranks.values()


def test_a_classifier_is_planned_through_a_warm_head_and_trains_from_its_own(tmp_path):
    """The plan changes no weight of the head, and differs from the one through a random head."""
    of_steps = {}
    for steps in (0, 20):
        config = {"ranks": "auto", "rank_rule": "energy", "head_warmup_steps": steps}
        trainer = classifier(tmp_path, config)
        before = spy.Spy(trainer)
        of_steps[steps] = plan_ranks(trainer, 1500, "energy")
        before.assert_same(spy.Spy(trainer))
    assert of_steps[0].missed != of_steps[20].missed
    trainer.train()
    assert trainer.model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad


def classifier(folder, config):
    return make_trainer(
        folder,
        config,
        model=tiny.bert(),
        lora={
            "target_modules": ["query", "value", "dense"],
            "modules_to_save": ["classifier"],
            "task_type": "SEQ_CLS",
        },
        rows=tiny.class_rows(ROWS),
    )


# --- what is refused


def test_a_name_that_two_layers_end_in_is_refused(tmp_path):
    """`target_modules` are ends of names in PEFT: `fc` of the top is the end of `inner.fc`, too."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 8)})
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x, labels):
            return {"loss": (self.fc(x) + 1e-9 * self.inner["fc"](x)).square().mean() + 0 * labels.sum()}

    rows = [{"x": torch.randn(8), "labels": torch.tensor(0)} for _ in range(16)]
    trainer = make_trainer(
        tmp_path,
        {"init": "none", "ranks": "auto", "rank_rule": "energy", "rank_budget": 16},
        model=Two(),
        lora={"target_modules": ["fc"], "r": 1},
        rows=rows,
    )
    with pytest.raises(ValueError, match=r"Layer inner.fc: the plan says rank 0, PEFT made 1"):
        trainer.train()


def test_fields_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match="rank_budget=10 would do nothing with ranks='given'"):
        LoRAGAConfig(rank_budget=10)
    other = next(name for name in RULES if name != LoRAGAConfig().rank_rule)
    with pytest.raises(ValueError, match=f"rank_rule={other!r} would do nothing"):
        LoRAGAConfig(rank_rule=other)
    with pytest.raises(ValueError, match=r"rank_rule='best' is unknown.*uniform, energy"):
        LoRAGAConfig(ranks="auto", rank_rule="best")


def test_an_adapter_of_another_maker_is_refused(tmp_path):
    config = LoRAGAConfig(ranks="auto")
    given = (tiny.with_lora(tiny.llama()), tiny.arguments(tmp_path))
    with pytest.raises(ValueError, match=r"LoRAGATrainer: ranks='auto'.*plan first"):
        LoRAGATrainer(*given, train_dataset=tiny.causal_rows(8), lora_ga_config=config)

    class Mine(LoRAGAMixin, Trainer):
        pass

    with pytest.raises(ValueError, match=r"Mine: ranks='auto'.*plan first"):
        Mine(*given, train_dataset=tiny.causal_rows(8), lora_ga_config=config)
    plain = Trainer(*given, train_dataset=tiny.causal_rows(8))
    with pytest.raises(ValueError, match=r"LoRAGACallback: ranks='auto'.*plan first"):
        LoRAGACallback(plain, config)


def test_bad_rules_and_budgets_are_refused_before_the_probe(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("lora_ga_trainer.ranks.find.gather_evidence", None)
    with pytest.raises(ValueError, match=r"rule='best' is unknown.*uniform, energy"):
        plan_ranks(trainer, rule="best")
    for budget in (0, 10, 2.5):
        with pytest.raises(ValueError, match=f"budget={budget!r} must be a whole number of at least 48"):
            plan_ranks(trainer, budget)


def test_an_optimizer_of_the_first_adapter_is_refused(tmp_path):
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"ranks='auto' makes the adapter anew.*optimizer_cls_and_kwargs"):
        LoRAGATrainer(
            model,
            tiny.arguments(tmp_path),
            train_dataset=tiny.causal_rows(8),
            optimizers=(optimizer, None),
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
            lora_ga_config=LoRAGAConfig(init="none", ranks="auto"),
        )


def test_layers_without_a_rank_of_their_own_are_refused(tmp_path):
    trainer = make_trainer(
        tmp_path,
        model=tiny.qwen3_moe(),
        lora={"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    )
    with pytest.raises(ValueError, match=r"gate_up_proj .* has no rank of its own"):
        plan_ranks(trainer)
