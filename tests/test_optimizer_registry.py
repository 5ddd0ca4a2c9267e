"""An optimizer is one entry of `OPTIMIZERS`: named there it can be asked for, is built, and refused by its facts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from torch.optim import SGD
from transformers import HfArgumentParser

from lora_ga_trainer import (
    OPTIMIZERS,
    LoRAGACallback,
    LoRAGAConfig,
    LoRAGATrainer,
    OptimizerEntry,
)
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.adapters.storage import anchored_parameter_names
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


@pytest.mark.parametrize("name", ["none", "lora_pro", "lora_pro_adamw"])
def test_the_help_lists_every_correction_with_its_source(name):
    (text,) = (a.help for a in HfArgumentParser(LoRAGAConfig)._actions if "--correction" in a.option_strings)
    assert f"{name!r} ({OPTIMIZERS[name].about})" in text
