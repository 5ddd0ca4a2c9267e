"""Anchored factors are stepped as plain ones would be, or the optimizer is refused by its name before it steps."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from optional import require
from transformers import Trainer

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGATrainer, find_adapted_layers
from lora_ga_trainer.optimizers.lockstep import require_lockstep


CPU = torch.device("cpu")
ELEMENTWISE = ["adamw_torch", "sgd", "adagrad", "rmsprop"]


def train(folder, optim, steps=20, init="lora_ga", **changes):
    trainer = LoRAGATrainer(
        tiny.with_lora(tiny.llama()),
        tiny.arguments(folder, optim=optim, max_steps=steps, **changes),
        train_dataset=tiny.causal_rows(16),
        lora_ga_config=LoRAGAConfig(init=init, num_samples=8),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("optim", ELEMENTWISE)
def test_an_elementwise_optimizer_keeps_the_halves_tied_and_b0_fixed(optim, tmp_path):
    starts = {}

    class Remember(LoRAGATrainer):
        def training_step(self, *args, **kwargs):
            if not starts:
                starts.update(
                    (layer.name, (layer.stored_A.detach().clone(), layer.stored_B.detach().clone()))
                    for layer in find_adapted_layers(self.model)
                )
            return super().training_step(*args, **kwargs)

    trainer = Remember(
        tiny.with_lora(tiny.llama()),
        tiny.arguments(tmp_path, optim=optim, max_steps=100),
        train_dataset=tiny.causal_rows(16),
        lora_ga_config=LoRAGAConfig(num_samples=8),
    )
    trainer.train()
    for layer in find_adapted_layers(trainer.model):
        A0, B0 = starts[layer.name][0][:4], starts[layer.name][1][:, 4:]
        A, shift = layer.stored_A.detach().chunk(2)
        assert torch.equal(layer.stored_B.detach()[:, 4:], B0)
        # Each half is rounded by itself: in a hundred steps by half a unit in the last place of A at the most.
        assert (A - A0 - shift).abs().max() <= 100 * 2**-24 * A.abs().max()


@pytest.mark.parametrize("optim", ["adafactor", "muon"])
@pytest.mark.parametrize("bare", [False, True])
def test_an_optimizer_that_looks_at_a_whole_matrix_is_refused(optim, bare, tmp_path):
    model, rows, config = tiny.with_lora(tiny.llama()), tiny.causal_rows(8), LoRAGAConfig(num_samples=4)
    if optim == "muon":
        if not hasattr(torch.optim, "Muon"):
            pytest.skip("this release of torch has no Muon")
        choice = {"optimizer_cls_and_kwargs": (torch.optim.Muon, {"lr": 1e-3, "weight_decay": 0.0})}
        args = tiny.arguments(tmp_path)
    else:
        choice, args = {}, tiny.arguments(tmp_path, optim=optim)
    if bare:
        trainer = Trainer(model, args, train_dataset=rows, **choice)
        trainer.add_callback(LoRAGACallback(trainer, config))
    else:
        trainer = LoRAGATrainer(model, args, train_dataset=rows, lora_ga_config=config, **choice)
    with pytest.raises(ValueError, match=rf"(?i){optim} of \w+ does not step anchored factors .* init='lora_one'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_8_bit_optimizer_is_refused_with_the_start_that_it_can_train(tmp_path):
    require("bitsandbytes")
    with pytest.raises(ValueError, match=r"AdamW of \w+ does not step anchored factors .* differ by \d.* 8 bits"):
        train(tmp_path, "adamw_bnb_8bit", steps=1)
    assert train(tmp_path, "adamw_bnb_8bit", steps=1, init="lora_one").state.global_step == 1


def test_trying_an_optimizer_leaves_it_and_the_random_numbers_as_they_were():
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.0, weight_decay=0.0)
    before, state = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    require_lockstep(optimizer, optimizer.param_groups[0], CPU)
    assert optimizer.state_dict() == before
    assert torch.equal(parameter, torch.ones(3, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_optimizer_that_cannot_be_tried_is_named_in_a_warning(caplog):
    parameter = torch.nn.Parameter(torch.ones(2))
    require_lockstep(torch.optim.LBFGS([parameter]), {"lr": 1.0, "params": [parameter]}, CPU)
    assert "LBFGS of torch could not be tried" in caplog.text
