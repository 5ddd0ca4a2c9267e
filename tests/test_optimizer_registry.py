"""An optimizer is one entry of `OPTIMIZERS`: named there it can be asked for, is built, and refused by its facts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from torch.optim import SGD
from transformers import HfArgumentParser, TrainerCallback

from lora_ga_trainer import (
    OPTIMIZERS,
    LoRAGACallback,
    LoRAGAConfig,
    LoRAGATrainer,
    LoRAProAdamW,
    LoRAProOptimizer,
    OptimizerEntry,
    correct_gradients,
)
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.adapters.storage import anchored_parameter_names
from lora_ga_trainer.optimizers.batches import correct_batch
from lora_ga_trainer.optimizers.build import require_buildable


class SignSGD(SGD):
    """Each weight moves by the learning rate against the sign of its gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * (parameter.grad.sign() + group["weight_decay"] * parameter))


def sign_sgd(request):
    """Take the groups of the Trainer's optimizer over, as the entries of the package do."""
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in request.create().param_groups]
    return SignSGD(groups, lr=request.trainer.args.learning_rate)


@pytest.fixture
def entry(monkeypatch):
    entry = OptimizerEntry("signs of this test", build=sign_sgd, kind=SignSGD)
    monkeypatch.setitem(OPTIMIZERS, "sign_sgd", entry)
    return entry


def trainer_with(folder, init="lora_ga", **changes):
    return LoRAGATrainer(
        tiny.with_lora(tiny.llama()),
        tiny.arguments(folder, **({"max_steps": 1, "max_grad_norm": 0.0, "warmup_steps": 0} | changes)),
        train_dataset=tiny.causal_rows(16),
        lora_ga_config=LoRAGAConfig(init=init, num_samples=8, correction="sign_sgd"),
    )


def test_a_new_entry_is_all_that_a_new_optimizer_needs(tmp_path, entry):
    """From `B = 0` the first step moves every entry of `B` with a gradient by the rate, and `A` not at all."""
    trainer = trainer_with(tmp_path, init="none", learning_rate=0.25)
    assert trainer.lora_ga_config.optimizer.entry is entry
    before = [layer.stored_A.detach().clone() for layer in find_adapted_layers(trainer.model)]
    trainer.train()
    for layer, A in zip(find_adapted_layers(trainer.model), before, strict=True):
        assert torch.equal(layer.stored_A, A)
        assert set(layer.stored_B.detach().abs().unique().tolist()) <= {0.0, 0.25}
        assert layer.stored_B.any()


def test_it_steps_anchored_factors_in_lockstep_and_its_weight_decay_leaves_them_out(tmp_path, entry):
    trainer = trainer_with(tmp_path, max_steps=3, weight_decay=0.1)
    trainer.train()
    anchored = anchored_parameter_names(trainer.model)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        held = {names[id(parameter)] for parameter in group["params"]}
        assert group["weight_decay"] == 0.0 or not held & anchored
    assert any(held for held in anchored)
    for layer in find_adapted_layers(trainer.model):
        A, shift = layer.stored_A.detach().chunk(2)
        start = A - shift
        torch.testing.assert_close(torch.linalg.vector_norm(start, dim=1), torch.full((4,), start[0].norm()))


def test_a_second_train_keeps_the_optimizer(tmp_path, entry):
    trainer = trainer_with(tmp_path)
    trainer.train()
    first = trainer.optimizer.optimizer
    assert type(first) is SignSGD
    trainer.train()
    assert trainer.optimizer.optimizer is first


def test_it_may_decay_the_net_update_itself(tmp_path, entry, monkeypatch):
    """An entry that says so keeps its anchored parameters in the groups with weight decay."""
    monkeypatch.setitem(
        OPTIMIZERS, "sign_sgd", OptimizerEntry("the same", sign_sgd, kind=SignSGD, decays_net_update=True)
    )
    trainer = trainer_with(tmp_path, weight_decay=0.1)
    trainer.train()
    decayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    parameters = dict(trainer.model.named_parameters())
    assert all(id(parameters[name]) in decayed for name in anchored_parameter_names(trainer.model))


def test_it_is_refused_where_its_facts_do_not_fit(tmp_path, entry):
    chosen = LoRAGAConfig(correction="sign_sgd").optimizer
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"correction='sign_sgd' reads gradients of parameters, .* flat partitions"):
        require_buildable(SimpleNamespace(accelerator=accelerator, args=None), chosen)
    trainer = tiny_trainer_with_an_optimizer(tmp_path)
    with pytest.raises(ValueError, match=r"correction='sign_sgd' makes the optimizer itself, .* given a AdamW"):
        require_buildable(trainer, chosen)
    with pytest.raises(ValueError, match=r"LoRAGACallback: correction='sign_sgd' is built when the Trainer"):
        LoRAGACallback(trainer, LoRAGAConfig(correction="sign_sgd"))
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio and correction='sign_sgd' each change the same"):
        LoRAGAConfig(correction="sign_sgd", loraplus_lr_ratio=4.0)
    with pytest.raises(ValueError, match=r"lora_pro_offload_state=True is for correction='lora_pro_adamw'"):
        LoRAGAConfig(correction="sign_sgd", lora_pro_offload_state=True)


def tiny_trainer_with_an_optimizer(folder):
    from transformers import Trainer

    model = tiny.with_lora(tiny.llama())
    optimizer = torch.optim.AdamW(model.parameters())
    return Trainer(model, tiny.arguments(folder), train_dataset=tiny.causal_rows(4), optimizers=(optimizer, None))


def test_without_the_entry_the_name_is_refused_with_those_that_are_there():
    with pytest.raises(ValueError, match=r"'sign_sgd' is unknown.* Choose one of none, lora_pro, lora_pro_adamw"):
        LoRAGAConfig(correction="sign_sgd")
    with pytest.raises(ValueError, match="correction='lora_plus' is unknown"):  # chosen by a field of its own
        LoRAGAConfig(correction="lora_plus")


@pytest.mark.parametrize("name", ["none", "lora_pro", "lora_pro_adamw", "muon"])
def test_the_help_lists_every_correction_with_its_source(name):
    (text,) = (a.help for a in HfArgumentParser(LoRAGAConfig)._actions if "--correction" in a.option_strings)
    assert f"{name!r} ({OPTIMIZERS[name].about})" in text


def test_the_help_and_the_config_know_an_entry_while_it_is_there(entry):
    (text,) = (a.help for a in HfArgumentParser(LoRAGAConfig)._actions if "--correction" in a.option_strings)
    assert f"'sign_sgd' ({entry.about})" in text
    with pytest.raises(ValueError, match=r"Choose one of none, lora_pro, lora_pro_adamw, muon, sign_sgd"):
        LoRAGAConfig(correction="sgd")


class Watch(TrainerCallback):
    """Keeps the adapter and its gradients as they are just before the last step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in trained.items()}
        self.gradients = {name: p.grad.clone() for name, p in trained.items()}


@pytest.mark.parametrize("init", ["none", "lora_one", "lora_ga"])
def test_every_parameter_takes_the_step_of_the_entry_with_its_decay(init, tmp_path, entry):
    """`w - lr (sign(g) + decay w)`, with a decay of 0 for anchored parameters alone."""
    settings = {"max_steps": 2, "weight_decay": 0.5, "learning_rate": 2.0**-8, "lr_scheduler_type": "constant"}
    trainer, watch = trainer_with(tmp_path, init=init, **settings), Watch()
    trainer.add_callback(watch)
    trainer.train()
    anchored = anchored_parameter_names(trainer.model)
    assert bool(anchored) == (init == "lora_ga")
    for name, after in ((n, p.detach()) for n, p in trainer.model.named_parameters() if p.requires_grad):
        before, sign = watch.values[name], watch.gradients[name].sign()
        expected = before - 2.0**-8 * (sign + (0.0 if name in anchored else 0.5) * before)
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-7)


class Wrapped(LoRAProOptimizer):
    """LoRA-Pro's correction around an optimizer, as an entry of this test."""


def given(folder, optimizer_of, **config):
    """A trainer that was passed an optimizer."""
    model = tiny.with_lora(tiny.llama())
    optimizer = optimizer_of(model)
    return LoRAGATrainer(
        model,
        tiny.arguments(folder, max_steps=1, max_grad_norm=0.0),
        train_dataset=tiny.causal_rows(8),
        lora_ga_config=LoRAGAConfig(init="none", **config),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )


def test_an_entry_that_wraps_takes_an_optimizer_that_was_passed_and_wraps_it_once(tmp_path, monkeypatch):
    build = lambda request: Wrapped(request.create(), request.model)
    monkeypatch.setitem(OPTIMIZERS, "wrapped", OptimizerEntry("of this test", build, kind=Wrapped, wraps=True))
    trainer, watch = given(tmp_path, lambda model: SGD(model.parameters(), lr=0.5), correction="wrapped"), Watch()
    inner = trainer.optimizer
    trainer.add_callback(watch)
    trainer.train()
    for layer in find_adapted_layers(trainer.model):
        names = [f"base_model.model.{layer.name}.lora_{side}.default.weight" for side in "AB"]
        A, B = (watch.values[name] for name in names)
        dA, dB = correct_gradients(A, B, *(watch.gradients[name] for name in names), layer.s)
        torch.testing.assert_close(layer.stored_A.detach(), A - 0.5 * dA, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.stored_B.detach(), B - 0.5 * dB, rtol=1e-4, atol=1e-6)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is Wrapped
    assert trainer.optimizer.optimizer.inner is inner


@pytest.mark.parametrize(
    ("changes", "accepted"),
    [
        ({}, set()),
        ({"gathers_gradients": True}, {"FSDP"}),
        ({"gathers_gradients": True, "correct": correct_batch}, {"FSDP", "DEEPSPEED"}),
        ({"reads_gradients": False}, {"FSDP", "DEEPSPEED"}),
    ],
    ids=["reads", "gathers", "corrects", "sets groups"],
)
def test_an_engine_that_hides_or_spreads_gradients_is_refused_unless_the_entry_copes(
    changes, accepted, tmp_path, monkeypatch, entry
):
    monkeypatch.setitem(OPTIMIZERS, "sign_sgd", replace(entry, **changes))
    args, model = tiny.arguments(tmp_path), tiny.with_lora(tiny.llama())
    chosen = LoRAGAConfig(init="none", correction="sign_sgd").optimizer
    for engine, message in (("DEEPSPEED", "flat partitions"), ("FSDP", "needs whole gradients")):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2))
        accelerator = SimpleNamespace(distributed_type=DistributedType[engine], state=state)
        trainer = SimpleNamespace(accelerator=accelerator, args=args, model=model, optimizer=None)
        if engine in accepted:
            require_buildable(trainer, chosen)
            continue
        with pytest.raises(ValueError, match=f"correction='sign_sgd'.*{message}"):
            require_buildable(trainer, chosen)


def test_an_optimizer_that_decays_anchored_parameters_against_its_entry_is_refused(tmp_path, monkeypatch, entry):
    all_in_one = lambda request: SignSGD(request.model.parameters(), lr=0.1, weight_decay=0.1)
    monkeypatch.setitem(OPTIMIZERS, "sign_sgd", replace(entry, build=all_in_one))
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 to an anchored parameter"):
        trainer_with(tmp_path).train()


@pytest.mark.parametrize("config", [{"correction": "lora_pro"}, {"loraplus_lr_ratio": 4.0}])
def test_an_optimizer_of_another_entry_does_not_pass_for_the_one_asked_for(config, tmp_path):
    """Both change what the optimizer steps with, so neither may take the place of the other in silence."""
    with pytest.raises(ValueError, match=r"LoRAProAdamW changes the gradients itself|was given a LoRAProAdamW"):
        given(tmp_path, lambda model: LoRAProAdamW(model.parameters(), model, lr=1e-4), **config).train()


@pytest.mark.parametrize("changes", [{"wraps": True}, {"decays_net_update": True}])
def test_an_entry_that_has_to_be_known_by_its_class_names_it(changes, entry):
    with pytest.raises(ValueError, match="kind is missing"):
        replace(entry, kind=None, **changes)
