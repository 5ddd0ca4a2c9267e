"""Every arm of a comparison is what it says: its start, what learns, what stays."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from peft import PeftModel
from transformers import Seq2SeqTrainingArguments


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

import comparison.run as comparison_run
from comparison.arms import Arm, parse_arms
from comparison.compacter import HypercomplexLinear, WithCompacter
from comparison.lotr import LoTRLinear
from comparison.methods import METHODS
from comparison.run import Task, build_trainer, count_numbers, run_arm
from comparison.starts import Samples
from finetuning.arguments import LoraArguments
from finetuning.data import TaskData

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, find_adapted_layers


LORA = LoraArguments(lora_r=4, lora_alpha=8)
CONFIG = LoRAGAConfig(num_samples=8, estimator="exact")
RATE = 1e-2


class _Tokenizer:
    """What the collator asks of one: all rows have the same length."""

    def pad(self, rows: list[dict[str, Any]], **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return _Tokenizer().pad(rows)


@pytest.fixture
def task(tmp_path) -> Task:
    """Sixteen rows for a tiny Llama, whose weights do not depend on the run's seed."""
    data = TaskData(tiny.causal_rows(16), tiny.causal_rows(4, seed=9), None)
    args = Seq2SeqTrainingArguments(
        str(tmp_path / "unused"),
        max_steps=8,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
    )
    return Task(
        name="causal-lm",
        data=data,
        collate=collate,
        args=args,
        load_model=load_base,
        make_trainer=lambda model, run_args, config: LoRAGATrainer(
            model,
            run_args,
            train_dataset=data.train,
            eval_dataset=data.eval,
            data_collator=collate,
            lora_ga_config=config,
        ),
        folder=tmp_path,
    )


def load_base() -> torch.nn.Module:
    with torch.random.fork_rng():
        return tiny.llama()


def arm(name: str) -> Arm:
    return parse_arms(name, CONFIG, LORA)[0]


def trainer_of(task: Task, name: str, **changes: Any) -> LoRAGATrainer:
    args = replace(task.args, output_dir=str(task.folder / "run"), learning_rate=RATE, seed=0, **changes)
    return build_trainer(task, arm(name), args)


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        name.replace("base_layer.", ""): value.detach().clone()
        for name, value in base.named_parameters()
        if not any(part in name for part in ("lora", "lokr", "ranknum", "lotr", "compacter"))
    }


def delta(model: PeftModel) -> dict[str, torch.Tensor]:
    return {layer.name: layer.s * (layer.stored_B @ layer.stored_A).detach() for layer in find_adapted_layers(model)}


CHANGES_BASE = {"full", "pissa", "olora", "peft_lora_ga"}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "inca"])  # which classifies
def test_every_method_trains_and_only_those_that_say_so_change_the_base(task, method):
    trainer = trainer_of(task, method)
    before = base_weights(load_base())
    with torch.no_grad():
        ids = torch.arange(8)[None]
        clean, started = load_base().eval()(ids).logits, trainer.model.eval()(ids).logits
    if METHODS[method].init == "none":  # starts that are no step: the function is that of the base
        torch.testing.assert_close(started, clean, rtol=1e-4, atol=1e-4)
    trainer.train()
    with torch.no_grad():  # not the loss, which AdaLoRA's few small steps do not move in fp32
        ended = trainer.model.eval()(ids).logits
    after = base_weights(trainer.model)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before) == (method in CHANGES_BASE)
    assert not torch.equal(ended, started)
    trained, stored = count_numbers(trainer.model)
    assert 0 < trained <= stored or method in ("lokr", "adalora")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "inca"])  # whose heads are its own
def test_every_method_goes_on_a_classifier_and_trains_its_head(task, method):
    with torch.random.fork_rng():
        base = tiny.bert()
    model = METHODS[method].make(base, LORA, "sequence-classification", classifier_samples(task))
    trainer = LoRAGATrainer(
        model,
        replace(task.args, max_steps=2, learning_rate=RATE),
        train_dataset=tiny.class_rows(8),
        data_collator=collate,
        lora_ga_config=arm(method).config,
    )
    if METHODS[method].after_start is not None:
        METHODS[method].after_start(trainer)
    heads = {name: p.detach().clone() for name, p in model.named_parameters() if "classifier" in name}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if name in heads and not torch.equal(p, heads[name])}
    assert len(moved) == 2  # weight and bias


def classifier_samples(task: Task) -> Samples:
    return Samples(tiny.class_rows(8), collate, replace(task.args, seed=0, max_steps=20), CONFIG.num_samples)


@pytest.mark.parametrize("name", ["lora+lora_pro", "lora_ga+lora_pro", "lora_one+lora_pro", "dora+lora_pro"])
def test_a_correction_goes_with_every_start(task, name):
    trainer = trainer_of(task, name)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "LoRAProOptimizer"


def test_rslora_scales_by_the_root_of_the_rank(task):
    layers = find_adapted_layers(trainer_of(task, "rslora").model)
    assert {layer.s for layer in layers} == {8 / 2.0}


def test_lora_plus_gives_b_sixteen_times_the_rate(task):
    trainer = trainer_of(task, "lora_plus", optim="adamw_torch")
    trainer.create_optimizer()
    assert {group["lr"] for group in trainer.optimizer.param_groups if group["params"]} == {RATE, 16 * RATE}


class _Stop(Exception):
    pass


def started(task: Task, name: str) -> LoRAGATrainer:
    """Return a trainer whose start is written and that has not stepped."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise _Stop

    trainer = trainer_of(task, name)
    trainer.add_callback(Stop())
    with pytest.raises(_Stop):
        trainer.train()
    return trainer


def test_the_random_start_has_the_lengths_of_lora_ga_and_other_directions(task):
    ours, random = started(task, "lora_ga"), started(task, "random_orthogonal")
    for like, other in zip(find_adapted_layers(ours.model), find_adapted_layers(random.model), strict=True):
        r = like.stored_rank // 2
        A, B = other.stored_A[:r].detach(), other.stored_B[:, r:].detach()
        scale = like.stored_A[:r].detach().norm(dim=1).mean()
        torch.testing.assert_close(A @ A.T, scale**2 * torch.eye(r), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B.T @ B, scale**2 * torch.eye(r), rtol=1e-4, atol=1e-5)
        overlap = (A @ like.stored_A[:r].detach().T / scale**2).square().sum() / r
        assert overlap < 0.5
    assert all(not value.any() for value in delta(random.model).values())


def test_lora_ga_free_starts_as_lora_ga_and_then_moves_every_part(task):
    tied, free = started(task, "lora_ga"), started(task, "lora_ga_free")
    begin = {}
    for one, other in zip(find_adapted_layers(tied.model), find_adapted_layers(free.model), strict=True):
        assert torch.equal(one.stored_A, other.stored_A)
        assert torch.equal(one.stored_B, other.stored_B)
        assert type(other.lora_A) is torch.nn.Linear
        begin[one.name] = one.stored_A.detach().clone(), one.stored_B.detach().clone()
    tied, free = (trainer_of(task, name, max_steps=1) for name in ("lora_ga", "lora_ga_free"))
    tied.train()
    free.train()
    step = delta(free.model)
    for layer in find_adapted_layers(tied.model):  # to first order the step is the same: dB dA is all that lacks
        r = layer.stored_rank // 2
        second_order = layer.s * (layer.stored_B[:, :r] @ layer.stored_A[r:]).detach()
        expected = delta(tied.model)[layer.name] - second_order
        torch.testing.assert_close(step[layer.name], expected, rtol=1e-4, atol=1e-3 * second_order.abs().max().item())
    trainer = trainer_of(task, "lora_ga_free", optim="adamw_torch")
    trainer.train()
    for layer in find_adapted_layers(trainer.model):
        A, B = begin[layer.name]
        r = layer.stored_rank // 2
        assert not torch.equal(layer.stored_B[:, r:], B[:, r:])
        moved = layer.stored_A - A
        assert not torch.allclose(moved[:r], moved[r:])


def test_asymmetric_lora_trains_b_alone_on_orthonormal_rows(task):
    trainer = trainer_of(task, "asymmetric")
    before = {layer.name: layer.stored_A.detach().clone() for layer in find_adapted_layers(trainer.model)}
    trainer.train()
    for layer in find_adapted_layers(trainer.model):
        A = layer.stored_A.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(layer.stored_rank), rtol=1e-5, atol=1e-5)
        assert torch.equal(A, before[layer.name])
        assert layer.stored_B.any()
    trained, stored = count_numbers(trainer.model)
    assert trained < stored


@pytest.mark.parametrize("name", ["frozen_a", "lora_ga:train_A=false", "lora_fa"])
def test_the_arms_of_a_frozen_a_train_b_alone(task, name):
    trainer = trainer_of(task, name)
    start = started(task, name)
    A = {layer.name: layer.stored_A.detach().clone() for layer in find_adapted_layers(start.model)}
    trainer.train()
    for layer in find_adapted_layers(trainer.model):
        assert torch.equal(layer.stored_A, A[layer.name])
        assert layer.stored_B.any()
    trained, stored = count_numbers(trainer.model)
    assert trained == sum(layer.stored_B.numel() for layer in find_adapted_layers(trainer.model)) < stored


def test_pefts_lora_fa_steps_by_the_gradient_of_b_over_s_squared_a_a_t(task):
    trainer = trainer_of(task, "lora_fa", max_steps=1, per_device_train_batch_size=16)
    layers = find_adapted_layers(trainer.model)
    batch = collate(task.data.train)
    trainer.model.eval()(**batch).loss.backward()
    gradients = {layer.name: layer.stored_B.grad.double() for layer in layers}
    trainer.model.zero_grad()
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == "LoraFAOptimizer"
    for layer in layers:
        A = layer.stored_A.detach().double()
        expected = gradients[layer.name] @ torch.linalg.inv(A @ A.T) / layer.s**2
        found = trainer.optimizer.state[f"base_model.model.{layer.name}.lora"]["exp_avg_B"].double() / 0.1
        assert (found - expected).norm() < 2e-2 * expected.norm()  # PEFT multiplies in bf16


def test_lotr_changes_like_layers_by_one_tensor_of_low_rank(task):
    trainer = trainer_of(task, "lotr")
    before = dict(load_base().named_modules())
    trainer.train()
    kinds: dict[int, list[LoTRLinear]] = {}
    for module in trainer.model.modules():
        if isinstance(module, LoTRLinear):
            kinds.setdefault(id(module.lotr_left), []).append(module)
    assert sorted(len(layers) for layers in kinds.values()) == [2] * 7  # two blocks, seven layers in each
    x = torch.randn(5, 32)
    for layers in kinds.values():
        left, right = layers[0].lotr_left, layers[0].lotr_right
        assert all(layer.lotr_right is right for layer in layers)
        cores = torch.stack([layer.lotr_core.detach() for layer in layers])
        assert cores.flatten(1).any(dim=1).all()
        changes = reference.tensor_of_changes(left.detach(), cores, right.detach())
        # The rank of each side's unfolding is that of the cores, however many layers there are.
        assert torch.linalg.matrix_rank(changes.transpose(0, 1).flatten(1)) <= 4
        x = torch.randn(5, right.shape[1])
        for layer, change in zip(layers, changes, strict=True):
            with torch.no_grad():
                moved = layer(x) - layer.base_layer(x)
            torch.testing.assert_close(moved.double(), 2.0 * x.double() @ change.T, rtol=1e-4, atol=1e-5)
    assert before.keys() <= {name.replace(".base_layer", "") for name, _ in trainer.model.named_modules()}
    trained, stored = count_numbers(trainer.model)
    shapes = {(32, 32): 2, (16, 32): 2, (48, 32): 2, (32, 48): 1}
    assert trained == stored == sum(count * 4 * (o + i) for (o, i), count in shapes.items()) + 14 * 16


def test_compacter_adds_sums_of_kronecker_products_behind_both_parts_of_a_block(task):
    trainer = trainer_of(task, "compacter")
    trainer.train()
    layers = [module for module in trainer.model.modules() if isinstance(module, WithCompacter)]
    assert len(layers) == 4  # two blocks: o_proj and down_proj
    assert len({id(linear.rules) for layer in layers for linear in (layer.compacter_down, layer.compacter_up)}) == 1
    for layer in layers:
        x = torch.randn(5, layer.base_layer.in_features)
        y, weights = layer.base_layer(x).detach().double(), []
        for linear in (layer.compacter_down, layer.compacter_up):
            parts = (linear.rules.detach(), linear.s.detach(), linear.t.detach())
            weights.append(reference.hypercomplex_weight(*parts))
            torch.testing.assert_close(linear.weight.detach().double(), weights[-1], rtol=1e-5, atol=1e-6)
        down, up = (linear.bias.detach().double() for linear in (layer.compacter_down, layer.compacter_up))
        expected = y + torch.nn.functional.gelu(y @ weights[0].T + down) @ weights[1].T + up
        torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-4, atol=1e-5)
    n, bottleneck, width = 4, 12, 32
    of_adapter = 2 * n * (width // n + bottleneck // n) + width + bottleneck
    assert count_numbers(trainer.model)[0] == n**3 + 4 * of_adapter


def test_a_hypercomplex_weight_has_the_size_of_a_linear_layers():
    """Variance 1 / in, as its rules and factors are drawn."""
    torch.manual_seed(0)
    rules = torch.nn.Parameter(torch.randn(4, 4, 4) / 2)
    squares = [HypercomplexLinear(64, 32, rules).weight.square().mean().item() for _ in range(200)]
    assert sum(squares) / 200 == pytest.approx(rules.square().mean().item() * 4 / 64, rel=0.1)


def classifier_with_inca(task: Task) -> LoRAGATrainer:
    with torch.random.fork_rng():
        base = tiny.bert(hidden_dropout_prob=0.5)
    torch.manual_seed(0)
    model = METHODS["inca"].make(base, LORA, "sequence-classification", classifier_samples(task))
    return LoRAGATrainer(
        model,
        replace(task.args, max_steps=3, learning_rate=RATE),
        train_dataset=tiny.class_rows(8),
        eval_dataset=tiny.class_rows(4, seed=7),
        data_collator=collate,
        lora_ga_config=arm("inca").config,
    )


def test_inca_reads_a_frozen_model_without_a_backward_pass_through_it(task):
    trainer = classifier_with_inca(task)
    heads = {name: p.detach().clone() for name, p in trainer.model.heads.named_parameters()}
    before = {name: p.detach().clone() for name, p in trainer.model.base.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.base.named_parameters())
    still = {name for name, p in trainer.model.heads.named_parameters() if torch.equal(p, heads[name])}
    assert not still
    batch = collate(tiny.class_rows(4, seed=7))
    graphs: list[bool] = []
    trainer.model.base.encoder.register_forward_hook(
        lambda module, args, y: graphs.append(any(h.requires_grad for h in y if isinstance(h, torch.Tensor)))
    )
    trainer.model.train()
    out = trainer.model(**batch)
    assert graphs == [False]
    assert out.loss.requires_grad
    assert not any(module.training for module in trainer.model.base.modules())


def test_the_heads_of_inca_learn_apart_and_padding_is_not_read(task):
    trainer = classifier_with_inca(task)
    model, batch = trainer.model.train(), collate(tiny.class_rows(4, seed=7))
    alone = []
    for number, head in enumerate(model.heads):
        model.zero_grad()
        with torch.no_grad():
            h = model.base(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
        loss = torch.nn.functional.cross_entropy(
            head(h.hidden_states[number], batch["attention_mask"] == 0), batch["labels"]
        )
        loss.backward()
        alone.append([p.grad.clone() for p in head.parameters()])
    model.zero_grad()
    model(**batch).loss.backward()
    for head, gradients in zip(model.heads, alone, strict=True):
        for parameter, gradient in zip(head.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    model.eval()
    changed = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5))
    with torch.no_grad():
        one, other = model(**batch), model(**changed)
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.loss, torch.nn.functional.cross_entropy(one.logits, batch["labels"]))


def test_inca_is_refused_where_rows_are_not_classified(task):
    with pytest.raises(ValueError, match=r"arm 'inca'.*sequence-classification"):
        trainer_of(task, "inca")


def test_peft_lora_ga_reads_the_gradient_of_the_mean_over_all_items(task):
    """The rows of its `A` lie in the top right singular vectors of that gradient; rows have unequal label counts."""
    samples = Samples(task.data.train, collate, replace(task.args, seed=0), CONFIG.num_samples)
    model = load_base().eval()
    batches = samples.batches()
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=items).loss.backward()
    gradients = {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters()}
    adapted = METHODS["peft_lora_ga"].make(load_base(), LORA, "causal-lm", samples)
    layers = find_adapted_layers(adapted)
    assert len(layers) == 14
    for layer in layers:
        Vt = torch.linalg.svd(gradients[layer.name], full_matrices=False).Vh[: 2 * layer.stored_rank]
        A = layer.stored_A.detach()
        torch.testing.assert_close(A @ Vt.T @ Vt, A, rtol=1e-3, atol=1e-3 * A.abs().max().item())


def test_eva_starts_from_the_directions_in_which_the_inputs_of_the_layers_vary(task):
    trainer = trainer_of(task, "eva")
    layers = {layer.name: layer for layer in find_adapted_layers(trainer.model)}
    assert sum(layer.stored_rank for layer in layers.values()) == pytest.approx(4 * len(layers), abs=len(layers))
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.base.register_forward_hook(lambda module, args, output, kept=seen[name]: kept.append(args[0].detach()))
    with torch.no_grad():
        for batch in Samples(task.data.train, collate, trainer.args, CONFIG.num_samples).batches():
            trainer.model(**batch)
    for name, layer in layers.items():
        inputs = torch.cat([x.flatten(0, 1) for x in seen[name]])
        inputs = inputs - inputs.mean(dim=0)
        A = layer.stored_A.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(layer.stored_rank), rtol=1e-3, atol=1e-3)
        best = torch.linalg.svdvals(inputs)[: layer.stored_rank].square().sum()
        # PEFT adds up batches and stops when directions settle, so not all; at random it would be about an eighth.
        assert (inputs @ A.T).square().sum() > 0.8 * best


def test_adalora_takes_directions_away_in_training(task):
    trainer = trainer_of(task, "adalora", max_steps=20)
    full = {name: value.clone() for name, value in trainer.model.named_parameters() if "lora_E" in name}
    assert {value.shape[0] for value in full.values()} == {6}
    trainer.train()
    left = sum(int((v != 0).sum()) for n, v in trainer.model.named_parameters() if "lora_E" in n)
    assert left == 4 * len(full)


def test_adalora_is_judged_without_its_penalty(task):
    trainer = trainer_of(task, "adalora", max_steps=2)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        judged = trainer.model.eval()(**batch).loss
        plain = trainer.model.get_base_model()(**batch).loss
        learned = trainer.model.train()(**batch).loss
    assert judged == plain
    assert learned > plain + 0.1
    assert trainer.model.peft_config["default"].orth_reg_weight == 0.5


def test_full_fine_tuning_widens_half_precision(task):
    model = METHODS["full"].make(tiny.llama().bfloat16(), LORA, "causal-lm", None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_full_fine_tuning_trains_every_weight(task):
    trainer = trainer_of(task, "full")
    before = base_weights(trainer.model)
    trainer.train()
    after = base_weights(trainer.model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert count_numbers(trainer.model)[0] == sum(value.numel() for value in before.values())


def test_anchored_adapters_store_twice_what_they_train(task):
    plain, anchored = (count_numbers(trainer_of(task, name).model) for name in ("lora", "lora_ga"))
    assert plain[0] == plain[1] == anchored[0]
    assert anchored[1] == 2 * plain[1]


# --- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_reports_its_evaluations_times_and_sizes(task):
    result = run_arm(task, arm("lora_ga"), 10 * RATE, seed=1, points=4)
    assert [point["step"] for point in result.evals] == [2, 4, 6, 8]
    assert all(set(point) == {"step", "eval_loss"} for point in result.evals)
    assert len({point["eval_loss"] for point in result.evals}) == 4
    assert result.step_seconds > 0
    assert result.start_seconds > result.step_seconds  # the probe is in it
    assert result.peak_bytes is None or result.peak_bytes > 2**20
    assert not (task.folder / "runs" / "lora_ga" / "rate0.1_seed1").exists()


def test_rates_and_arms_of_one_seed_and_init_share_a_probe_and_get_the_same_start(task, monkeypatch):
    """Another init has one of its own: how large a sketch is, and what else is kept, is a matter of the init."""
    alone = run_arm(replace(task, folder=task.folder / "alone"), arm("lora_ga:gamma=64"), RATE, seed=0, points=4)
    probes = []
    import lora_ga_trainer.gradients.probe_file as probe_file

    estimate = probe_file.estimate_gradients
    monkeypatch.setattr(probe_file, "estimate_gradients", lambda *args: probes.append(1) or estimate(*args))
    run_arm(task, arm("lora_ga"), RATE, seed=0, points=4)
    run_arm(task, arm("lora_ga"), 2 * RATE, seed=0, points=4)
    shared = run_arm(task, arm("lora_ga:gamma=64"), RATE, seed=0, points=4)
    assert len(probes) == 1
    assert shared.evals == alone.evals
    run_arm(task, arm("lora_ga"), RATE, seed=1, points=4)
    run_arm(task, arm("lora_ga:num_samples=4"), RATE, seed=0, points=4)
    assert len(probes) == 3
    for name in ("lora_one", "gradient_directions", "gradient_directions:whitening=0.5", "lora_ga:whitening=0.25"):
        run_arm(task, arm(name), RATE, seed=0, points=4)
    assert len(probes) == 7


def classifier_task(task: Task) -> Task:
    """The same task for a tiny BERT, whose head is drawn as its other weights are."""

    def load() -> torch.nn.Module:
        with torch.random.fork_rng():
            return tiny.bert()

    data = TaskData(tiny.class_rows(16), tiny.class_rows(4, seed=9), None)
    make = lambda model, run_args, config: LoRAGATrainer(
        model,
        run_args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=collate,
        lora_ga_config=config,
    )
    return replace(task, name="sequence-classification", data=data, load_model=load, make_trainer=make)


# Those that keep what others do not. The others share their code, and 4 s each.
CUT_OFF = ("lora_ga", "lora_ga+lora_pro", "adalora", "lotr", "compacter", "inca", "lora_fa", "full")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in CUT_OFF else pytest.mark.slow) for name in (*METHODS, "lora_ga+lora_pro")],
)
def test_a_run_that_was_cut_off_continues_and_ends_where_it_would_have(task, name, monkeypatch):
    task = classifier_task(task) if name == "inca" else task
    task = replace(task, args=replace(task.args, save_strategy="steps", optim="adamw_torch"))
    whole = run_arm(replace(task, folder=task.folder / "whole"), arm(name), RATE, seed=0, points=4)
    end = comparison_run._Stopwatch.on_step_end

    def cut(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise _Stop
        end(self, args, state, control, **kwargs)

    monkeypatch.setattr(comparison_run._Stopwatch, "on_step_end", cut)
    with pytest.raises(_Stop):
        run_arm(task, arm(name), RATE, seed=0, points=4)
    run_arm(task, arm(name), RATE, seed=0, points=1, steps=2)  # the plan's trial must not cost it its checkpoint
    kept = list(task.folder.glob("runs/*/*/checkpoint-*"))
    assert len(kept) == METHODS[arm(name).method].resumes
    for last in kept:
        last.with_name("checkpoint-6").mkdir()  # killed again, while it wrote the next one
        (last.with_name("checkpoint-6") / "trainer_state.json").write_text("{")
    steps = []
    monkeypatch.setattr(
        comparison_run._Stopwatch, "on_step_end", lambda self, args, state, *a, **k: steps.append(state.global_step)
    )
    resumed = run_arm(task, arm(name), RATE, seed=0, points=4)
    assert steps == ([5, 6, 7, 8] if kept else list(range(1, 9)))
    assert resumed.evals == whole.evals


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_arm_takes_options_and_a_correction():
    arms = parse_arms("lora, lora_ga:gamma=64:lora_r=16+lora_pro,lora_one,rslora", CONFIG, LORA)
    assert [a.method for a in arms] == ["lora", "lora_ga", "lora_one", "rslora"]
    assert (arms[1].config.gamma, arms[1].lora.lora_r, arms[1].config.correction) == (64, 16, "lora_pro")
    assert arms[0].config.init == "none"
    assert arms[2].config.gamma == 128  # LoRA-One's own default, not that of the shared config
    assert all(a.config.num_samples == 8 for a in arms)
    assert arms[1].slug == "lora_ga_gamma=64_lora_r=16+lora_pro"


def test_lotr_begins_two_decades_lower_since_its_first_step_is_that_much_longer(task):
    """AdamW's first step moves every entry that has a gradient by the rate: the cores here, B of plain LoRA."""
    sizes = {}
    for name in ("lora", "lotr"):
        trainer = trainer_of(task, name, max_steps=1, optim="adamw_torch", weight_decay=0.0)
        trainer.train()
        changes = [
            2.0 * (m.lotr_left @ m.lotr_core @ m.lotr_right)
            for m in trainer.model.modules()
            if isinstance(m, LoTRLinear)
        ] or list(delta(trainer.model).values())
        sizes[name] = sum(change.detach().square().mean() for change in changes).sqrt().item()
    assert 10 < sizes["lotr"] / sizes["lora"] < 1000
    assert parse_arms("lotr", CONFIG, LORA)[0].rate_factor == 0.01


def test_the_equivalent_adamw_and_full_fine_tuning_begin_a_decade_lower():
    arms = parse_arms("lora,full,lora_ga+lora_pro_adamw,lora_ga+lora_pro", CONFIG, LORA)
    assert [a.rate_factor for a in arms] == [1.0, 0.1, 0.1, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorra", "arm 'lorra': there is no method 'lorra'. Did you mean 'lora'"),
        ("lora+pro", "'pro' is not a correction. Use lora_pro or lora_pro_adamw"),
        ("full+lora_pro", "full has no plain pairs"),
        ("lora,lora", "stands there twice"),
        ("", "names no arm"),
        ("lora_ga:gama=2", "there is no option 'gama'. Did you mean 'gamma'"),
        ("lora_ga:gamma", "Write name=value"),
        ("lora_ga:gamma=-1", "arm 'lora_ga:gamma=-1': LoRAGAConfig: gamma=-1 must be"),
        ("lora_ga:init=none", "there is no option 'init'"),
        ("full:head_warmup_steps=3", "full fine-tuning has none"),
    ],
)
def test_an_arm_that_can_not_be_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        parse_arms(text, CONFIG, LORA)


@pytest.mark.parametrize("changes", [{"gamma": 64.0}, {"init": "lora_one"}, {"correction": "lora_pro"}])
def test_what_arms_differ_in_can_not_be_said_for_all(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*Write it into the arm"):
        parse_arms("lora", LoRAGAConfig(**changes), LORA)
