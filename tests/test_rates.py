"""The learning rate that is found: the search, the first updates, what trains with it, and what stays as it was."""

import json
import math
import types

import pytest
import tiny
import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from lora_ga_trainer import (
    LoRAGACallback,
    LoRAGAConfig,
    LoRAGAMixin,
    LoRAGATrainer,
    RateReport,
    find_learning_rate,
)
from lora_ga_trainer.engines.support import probed_module
from lora_ga_trainer.gradients.borrow import borrowed
from lora_ga_trainer.gradients.copies import TrainedCopies
from lora_ga_trainer.gradients.samples import micro_batches
from lora_ga_trainer.rates.search import NoRateFound, best_rate, largest_rate, search_rates
from lora_ga_trainer.rates.updates import FirstUpdates


ROWS = 32


# --- the search


@pytest.mark.parametrize("guess", [1e-7, 3e-3, 0.9, 40.0])
@pytest.mark.parametrize(("slope", "curvature"), [(1.0, 100.0), (2.0, 1e-2), (0.3, 7e4)])
def test_on_a_parabola_the_search_finds_the_least_and_the_largest_rate(guess, slope, curvature):
    loss = lambda rate: 3.0 - slope * rate + curvature * rate**2 / 2
    losses = search_rates(loss, 3.0, guess)
    # Exact but for the rounding of 3 - slope * rate: 4e-16 beside a dip of slope^2 / curvature >= 1e-6.
    assert best_rate(losses) == pytest.approx(slope / curvature, rel=1e-7)
    assert largest_rate(losses, 3.0) == pytest.approx(2 * slope / curvature, rel=1e-7)


def test_a_loss_that_is_not_finite_counts_as_infinite():
    loss = lambda rate: math.nan if rate > 0.05 else 1.0 - rate
    losses = search_rates(loss, 1.0, 1e-2)
    assert list(losses) == sorted(losses)
    assert losses[max(losses)] == math.inf
    assert best_rate(losses) == 0.04  # the best of those that were tried
    assert 0.04 <= largest_rate(losses, 1.0) < 0.08


def test_a_loss_that_only_rises_or_never_does_is_no_ground_for_a_rate():
    with pytest.raises(NoRateFound, match="do not descend"):
        search_rates(lambda rate: 1.0 + rate, 1.0, 1e-3)
    with pytest.raises(NoRateFound, match="nothing bounds it"):
        search_rates(lambda rate: 1.0 - math.tanh(rate), 1.0, 1e-3)


# --- the first updates


def make_trainer(folder, lora_ga=None, kind=LoRAGATrainer, model=None, lora=None, rows=None, **changes):
    return kind(
        tiny.with_lora(tiny.llama() if model is None else model, **(lora or {"lora_dropout": 0.1})),
        tiny.arguments(folder, **({"warmup_steps": 1, "weight_decay": 0.0} | changes)),
        train_dataset=tiny.causal_rows(ROWS) if rows is None else rows,
        eval_dataset=tiny.causal_rows(4, seed=2),
        lora_ga_config=LoRAGAConfig(**({"num_samples": 8} | (lora_ga or {}))),
    )


class AtBegin(TrainerCallback):
    """Calls a function when training begins and the start is done."""

    def __init__(self, look):
        self.look = look

    def on_train_begin(self, args, state, control, **kwargs):
        self.look()


def first_updates(trainer, steps=1):
    """Return the copies, the updates and the micro-batches that they were computed on."""
    found = []

    def look():
        model = probed_module(trainer)
        with borrowed(trainer, model):
            batches = list(micro_batches(trainer, 4 * steps))
            copies = TrainedCopies(model, [p for p in model.parameters() if p.requires_grad])
            updates = FirstUpdates(trainer, model, copies, [[b] for b in batches], trainer.lora_ga_config.optimizer)
        found.extend((copies, updates, batches))

    trainer.add_callback(AtBegin(look))
    trainer.train()
    return found


def gradients_of(trainer, batch):
    """The gradient of a batch by plain autograd, with the dropout off."""
    model = trainer.model.eval()
    model.zero_grad()
    model(**batch.batch).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_the_first_update_of_sgd_is_the_gradient(tmp_path):
    trainer = make_trainer(tmp_path, {"init": "none"}, optim="sgd", max_steps=1, warmup_steps=1)
    copies, updates, (batch,) = first_updates(trainer)  # a rate of 0: the warm-up's first step moves nothing
    for direction, gradient in zip(updates.directions, gradients_of(trainer, batch), strict=True):
        # The step is 1e-4 at most, rounded in fp32 beside values of size .2.
        torch.testing.assert_close(-direction, gradient, rtol=0, atol=2e-4 * updates.largest)
    assert updates.largest == pytest.approx(max(g.abs().max().item() for g in gradients_of(trainer, batch)), rel=1e-3)
    assert all(torch.equal(copy, start) for copy, start in zip(copies.values, updates.start, strict=True))


def test_the_first_update_of_adamw_is_the_sign_where_there_is_a_gradient(tmp_path):
    trainer = make_trainer(tmp_path, {"init": "none"}, max_steps=1)
    _, updates, (batch,) = first_updates(trainer)
    for direction, gradient in zip(updates.directions, gradients_of(trainer, batch), strict=True):
        large = gradient.abs() > 1e-5  # AdamW's eps is 1e-8
        torch.testing.assert_close(direction[large], -gradient.sign()[large], rtol=0, atol=2e-3)
        assert not direction[gradient == 0].any()
    assert updates.largest == pytest.approx(1.0, rel=1e-3)


def test_a_moves_in_the_second_update_only(tmp_path):
    once = first_updates(make_trainer(tmp_path, {"init": "none"}, max_steps=1), steps=1)
    twice = first_updates(make_trainer(tmp_path, {"init": "none"}, max_steps=1), steps=2)
    names = [name for name, p in tiny.with_lora(tiny.llama()).named_parameters() if p.requires_grad]
    sizes = lambda found: {
        name: direction.abs().max().item()
        for name, direction in zip(names, found[1].directions, strict=True)
        if "lora_A" in name
    }
    assert set(sizes(once).values()) == {0.0}
    # The step without a gradient does not count. AdamW's second step after a first of 0 is 0.1 / 0.19 of its gradient
    # over the root of 0.001 / 0.001999 of its square: 0.744. The 1e-8 that AdamW adds takes some of it off small ones.
    for size in sizes(twice).values():
        assert 0.68 < size < 0.7441


def test_lora_plus_keeps_its_ratio(tmp_path):
    trainer = make_trainer(tmp_path, {"init": "none", "loraplus_lr_ratio": 16.0}, max_steps=1)
    _, updates, _ = first_updates(trainer)
    assert updates.largest == pytest.approx(16.0, rel=1e-3)


@pytest.mark.parametrize("init", ["none", "lora_ga", "lora_one"])
def test_the_direction_is_that_of_the_real_optimizer(tmp_path, init):
    trainer = make_trainer(
        tmp_path, {"init": init}, lora={"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, max_steps=1
    )
    _, updates, (batch,) = first_updates(trainer)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    # The warm-up's first rate is 0, so the parameters are at the start still.
    gradients_of(trainer, batch)
    before = [p.detach().clone() for p in trained]
    torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0).step()
    for direction, parameter, start in zip(updates.directions, trained, before, strict=True):
        torch.testing.assert_close(direction * 1e-4, parameter.detach() - start, rtol=0, atol=3e-6)


# --- what trains with it

CASES = {
    "plain": ({"init": "none"}, {}),
    "lora_ga": ({}, {}),
    "lora_one": ({"init": "lora_one"}, {}),
    "lora_plus": ({"init": "none", "loraplus_lr_ratio": 4.0}, {}),
    "lora_pro": ({"correction": "lora_pro"}, {}),
    "lora_pro_adamw": ({"correction": "lora_pro_adamw"}, {}),
    **({"muon": ({"init": "none", "correction": "muon"}, {})} if hasattr(torch.optim, "Muon") else {}),
    "sgd": ({}, {"optim": "sgd"}),
    "accumulation": ({}, {"gradient_accumulation_steps": 2}),
    "constant": ({}, {"lr_scheduler_type": "constant", "warmup_steps": 0}),
    "min_lr": ({}, {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}),
    "polynomial": ({}, {"lr_scheduler_type": "polynomial"}),
    "plateau": (
        {},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2, "warmup_steps": 0},
    ),
}


def factors(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def rates(trainer):
    return [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]


@pytest.mark.parametrize("case", CASES)
def test_training_is_to_the_bit_that_with_the_rate_given(tmp_path, case):
    lora_ga, changes = CASES[case]
    found = make_trainer(tmp_path / "found", {**lora_ga, "find_learning_rate": True}, **changes)
    found.train()
    rate = found.lora_ga_rate_report.learning_rate
    assert found.args.learning_rate == rate != 1e-3
    given = make_trainer(tmp_path / "given", lora_ga, learning_rate=rate, **changes)
    given.train()
    assert rates(found) == rates(given)
    assert max(rates(found)) == pytest.approx(rate, rel=0.51)
    for name, value in factors(given).items():
        assert torch.equal(factors(found)[name], value), name


@pytest.mark.parametrize("scale", [1e-2, 1e2])
def test_the_unit_of_the_loss_does_not_matter_to_adamw(tmp_path, scale):
    class Scaled(LoRAGATrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * scale

    of = lambda kind: find_learning_rate(make_trainer(tmp_path, kind=kind)).learning_rate
    # AdamW's eps of 1e-8 is not scaled: it is 1e-2 of a gradient of 1e-6, and few are so small.
    assert of(Scaled) == pytest.approx(of(LoRAGATrainer), rel=0.02)


@pytest.mark.parametrize(("ratio", "share"), [(None, 0.9), (1.0, 0.9), (16.0, 0.9 * 2**0.5), (0.25, 0.9)])
def test_the_rate_is_that_share_of_the_best_on_the_line_it_reports(ratio, share, tmp_path):
    """With LoRA+ it grows as the eighth root of the ratio: by the root of 2 at a ratio of 16."""
    config = {"init": "none", "loraplus_lr_ratio": ratio}
    report = find_learning_rate(make_trainer(tmp_path, config))
    losses = dict(zip(report.rates, report.losses, strict=True))
    assert report.learning_rate == pytest.approx(share * best_rate(losses), rel=1e-12)
    assert report.curvature == 2 / report.largest_rate == 2 / largest_rate(losses, report.loss_before)
    assert min(report.losses) < report.loss_before < report.losses[-1]
    assert report.forward_passes <= 20
    assert report.backward_passes == report.updates == 2
    assert report.samples == 8


@pytest.mark.parametrize("correction", [*(["muon"] if "muon" in CASES else []), "lora_pro", "lora_pro_adamw", "sgd"])
def test_the_share_is_that_of_the_optimizer(correction, tmp_path, caplog):
    """Muon's own; that of AdamW around which LoRA-Pro is; and of others AdamW's, with a warning."""
    config = {"init": "none", "correction": "none" if correction == "sgd" else correction}
    changes = {"optim": "sgd"} if correction == "sgd" else {}
    report = find_learning_rate(make_trainer(tmp_path, config, **changes))
    losses = dict(zip(report.rates, report.losses, strict=True))
    share = 0.2 if correction == "muon" else 0.9
    assert report.learning_rate == pytest.approx(share * best_rate(losses), rel=1e-12)
    said = [record.message for record in caplog.records if "was measured with AdamW and with Muon" in record.message]
    assert len(said) == (correction == "sgd")
    assert all("For SGD it is taken" in message for message in said)


def test_with_the_callback_alone_it_is_the_same_rate(tmp_path):
    trainer = Trainer(
        tiny.with_lora(tiny.llama(), lora_dropout=0.1),
        tiny.arguments(tmp_path, warmup_steps=1),
        train_dataset=tiny.causal_rows(ROWS),
    )
    callback = LoRAGACallback(trainer, LoRAGAConfig(num_samples=8, find_learning_rate=True))
    trainer.add_callback(callback)
    trainer.train()
    assert callback.rate.report.learning_rate == find_learning_rate(make_trainer(tmp_path)).learning_rate


def test_finding_leaves_the_start_and_nothing_else(tmp_path):
    found = make_trainer(tmp_path / "found")
    report = find_learning_rate(found)
    assert isinstance(report, RateReport)
    assert found.args.learning_rate == 1e-3
    assert found.state.global_step == 0
    assert found.optimizer is None
    assert found.lr_scheduler is None
    found.train()
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    for name, value in factors(plain).items():
        assert torch.equal(factors(found)[name], value), name
    assert rates(found) == rates(plain)


def test_a_second_train_keeps_the_rate(tmp_path):
    trainer = make_trainer(tmp_path, {"find_learning_rate": True})
    trainer.train()
    rate, report = trainer.args.learning_rate, trainer.lora_ga_rate_report
    trainer.train()
    assert trainer.args.learning_rate == rate
    assert trainer.lora_ga_rate_report is report
    assert max(rates(trainer)) <= rate


@pytest.mark.parametrize("schedule", ["linear", "cosine_with_min_lr"])
def test_a_resumed_run_is_the_whole_one_to_the_bit(tmp_path, schedule):
    changes = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": schedule}
    if schedule != "linear":
        changes["lr_scheduler_kwargs"] = {"min_lr": 1e-4}
    whole = make_trainer(tmp_path / "whole", {"find_learning_rate": True}, **changes)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", {"find_learning_rate": True}, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.lora_ga_rate_report is None
    assert resumed.args.learning_rate == whole.args.learning_rate
    assert rates(resumed) == rates(whole)
    for name, value in factors(whole).items():
        assert torch.equal(factors(resumed)[name], value), name


def test_a_checkpoint_without_a_schedule_still_has_the_rate(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    whole = make_trainer(tmp_path / "whole", {"find_learning_rate": True}, **changes)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", {"find_learning_rate": True}, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.args.learning_rate == whole.args.learning_rate


def test_a_checkpoint_of_another_rate_is_refused(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "whole", **changes).train()
    resumed = make_trainer(tmp_path / "resumed", {"find_learning_rate": True}, **changes)
    with pytest.raises(ValueError, match="trained without find_learning_rate"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_the_report_is_logged_written_and_drawn(tmp_path):
    trainer = make_trainer(tmp_path, {"find_learning_rate": True})
    trainer.train()
    report = trainer.lora_ga_rate_report
    written = json.loads((tmp_path / "lora_ga_rate.json").read_text())
    assert written["learning_rate"] == report.learning_rate
    assert written["rates"] == report.rates
    (logged,) = [log for log in trainer.state.log_history if "lora_ga/learning_rate" in log]
    assert logged["lora_ga/largest_rate"] == report.largest_rate
    assert f"{report.learning_rate:.2e}" in report.summary()
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "rate.png")
    assert (tmp_path / "rate.png").stat().st_size > 5000
    assert report.picture().shape[2] == 3


# --- what is refused


def test_it_is_a_switch_beside_the_rate_of_the_training_arguments():
    """One parser reads both classes in the recipes, where no two fields have one name."""
    with pytest.raises(ValueError, match="find_learning_rate='auto' must be True or False"):
        LoRAGAConfig(find_learning_rate="auto")
    HfArgumentParser((TrainingArguments, LoRAGAConfig))


def test_a_loss_of_rewards_is_refused(tmp_path):
    class Rewarded(LoRAGAMixin, Trainer):
        reward_funcs = ()

    with pytest.raises(ValueError, match="`reward_funcs`"):
        make_trainer(tmp_path, {"find_learning_rate": True}, kind=Rewarded)
    make_trainer(tmp_path, kind=Rewarded)


def test_a_loss_of_classes_is_refused(tmp_path):
    trainer = make_trainer(
        tmp_path,
        {"find_learning_rate": True},
        model=tiny.bert(),
        lora={"target_modules": ["query"], "modules_to_save": ["classifier"]},
        rows=tiny.class_rows(ROWS),
        eval_strategy="no",
    )
    with pytest.raises(ValueError, match=r"labels of shape \(4,\)"):
        trainer.train()


@pytest.mark.parametrize(
    ("config", "schedule", "words"),
    [
        ({"optimizer": {"type": "AdamW"}}, {}, "a section 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "a section 'scheduler'"),
        ({}, {"lr_scheduler_type": "polynomial"}, "'polynomial'"),
        (
            {},
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
            "'cosine_with_min_lr'",
        ),
    ],
)
def test_under_deepspeed_what_keeps_a_rate_of_its_own_is_refused(tmp_path, config, schedule, words):
    trainer = make_trainer(tmp_path, **schedule)
    trainer.args.hf_deepspeed_config = types.SimpleNamespace(config=config)
    with pytest.raises(ValueError, match=words):
        find_learning_rate(trainer)


def test_a_rate_of_zero_and_a_schedule_of_ones_own_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"learning_rate=0\.0 must be greater"):
        make_trainer(tmp_path, {"find_learning_rate": True}, learning_rate=0.0)
    model = tiny.with_lora(tiny.llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=4)
    with pytest.raises(ValueError, match="OneCycleLR"):
        LoRAGATrainer(
            model,
            tiny.arguments(tmp_path),
            train_dataset=tiny.causal_rows(ROWS),
            optimizers=(optimizer, schedule),
            lora_ga_config=LoRAGAConfig(init="none", find_learning_rate=True),
        )


def test_an_optimizer_and_a_schedule_of_ones_own_are_scaled(tmp_path):
    model = tiny.with_lora(tiny.llama())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained[:2], "lr": 2e-3}, {"params": trained[2:], "lr": 1e-3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path, learning_rate=1e-3, max_steps=2),
        train_dataset=tiny.causal_rows(ROWS),
        optimizers=(optimizer, schedule),
        lora_ga_config=LoRAGAConfig(init="none", find_learning_rate=True),
    )
    trainer.train()
    rate = trainer.lora_ga_rate_report.learning_rate
    assert schedule.base_lrs == pytest.approx([2 * rate, rate])
    assert schedule.get_last_lr() == pytest.approx([2 * rate / 3, rate / 3])


def test_an_optimizer_that_cannot_be_copied_is_refused_by_name(tmp_path):
    class Holding(torch.optim.SGD):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            self.generator = (number for number in range(3))

    trainer = LoRAGATrainer(
        tiny.with_lora(tiny.llama()),
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(ROWS),
        optimizer_cls_and_kwargs=(Holding, {"lr": 1e-3}),
        lora_ga_config=LoRAGAConfig(init="none", find_learning_rate=True),
    )
    with pytest.raises(ValueError, match="Holding holds what can't be copied"):
        trainer.train()


def test_a_trainer_without_the_callback_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no LoRAGACallback"):
        find_learning_rate(
            Trainer(tiny.with_lora(tiny.llama()), tiny.arguments(tmp_path), train_dataset=tiny.causal_rows(4))
        )
