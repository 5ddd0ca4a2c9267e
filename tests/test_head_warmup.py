"""The warm-up of fresh heads moves the heads and nothing else, once."""

import pytest
import tiny
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.adapters.find import saved_modules
from lora_ga_trainer.starts.head_warmup import warm_up_heads


ROWS = 16


def make_trainer(folder, steps, callbacks=(), rows=None, lora=None, **changes):
    settings = {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "lora_dropout": 0.1}
    return LoRAGATrainer(
        tiny.with_lora(tiny.bert(), **(settings | (lora or {}))),
        tiny.arguments(folder, **changes),
        train_dataset=tiny.class_rows(ROWS) if rows is None else rows,
        lora_ga_config=LoRAGAConfig(num_samples=8, head_warmup_steps=steps, head_warmup_learning_rate=1e-2),
        callbacks=list(callbacks),
    )


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def heads(model):
    return {name for name in model.state_dict() if "modules_to_save" in name}


@torch.no_grad()
def loss_of(model, rows):
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    return model.eval()(**batch).loss.item()


class AtFirstStep(TrainerCallback):
    """Calls a function when the start is done and no step is taken yet."""

    def __init__(self, look):
        self.look = look

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.look(model)


def test_only_the_heads_move(tmp_path):
    trainer = make_trainer(tmp_path, 3)
    before = state_of(trainer.model)
    trainer.create_optimizer()
    warm_up_heads(trainer, trainer.lora_ga_config)
    assert moved(trainer.model, before) == heads(trainer.model)


def test_the_model_is_given_back_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path, 2)
    model = trainer.model.eval()
    parameters = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    dropouts = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    rng = torch.get_rng_state()
    warm_up_heads(trainer, trainer.lora_ga_config)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == parameters
    assert [parameter for parameter in model.parameters() if parameter.grad is not None] == []
    assert [module.training for module in model.modules()] == modes
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == dropouts
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_frozen_part_of_a_head_stays_frozen(tmp_path):
    trainer = make_trainer(tmp_path, 2)
    (head,) = saved_modules(trainer.model)
    head.bias.requires_grad_(False)
    bias = head.bias.clone()
    warm_up_heads(trainer, trainer.lora_ga_config)
    assert not head.bias.requires_grad
    assert torch.equal(head.bias, bias)


def test_the_first_step_is_adam_on_the_mean_loss_of_the_first_batch(tmp_path):
    """One batch holds every row, so the step is known: each weight moves by the learning rate against its gradient."""
    trainer = make_trainer(tmp_path, 1, per_device_train_batch_size=ROWS)
    rows = tiny.class_rows(ROWS)
    (head,) = saved_modules(trainer.model)
    start = head.weight.detach().clone()
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    (gradient,) = torch.autograd.grad(trainer.model.eval()(**batch).loss, [head.weight])
    warm_up_heads(trainer, trainer.lora_ga_config)
    clear = gradient.abs() > 1e-5
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(
        (head.weight.detach() - start)[clear], -1e-2 * gradient.sign()[clear], rtol=2e-3, atol=0
    )


def heads_of_ones_after(folder, dtype, steps, rate):
    trainer = make_trainer(folder, steps)
    trainer.model.to(dtype)
    (head,) = saved_modules(trainer.model)
    with torch.no_grad():
        head.weight.fill_(1.0)
    warm_up_heads(trainer, LoRAGAConfig(head_warmup_steps=steps, head_warmup_learning_rate=rate))
    assert head.weight.dtype == dtype
    return head.weight.detach()


def test_fp64_heads_keep_what_fp32_would_round_away(tmp_path):
    weight = heads_of_ones_after(tmp_path, torch.float64, steps=3, rate=1e-2)
    assert not torch.equal(weight, weight.float().double())


def test_bf16_heads_add_up_steps_below_their_rounding(tmp_path):
    """A step of 2^-10 from 1 is rounded away in bf16 (2^-9 below, 2^-8 above would do); twelve of them are not."""
    weight = heads_of_ones_after(tmp_path, torch.bfloat16, steps=12, rate=2**-10)
    assert (weight != 1.0).float().mean() > 0.5


def test_accumulated_micro_batches_are_one_step(tmp_path):
    """4 micro-batches of 4 rows and 1 of 16 are the same mean over the same rows."""
    found = []
    for size, accumulation in ((16, 1), (4, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tmp_path, 3, **changes)
        warm_up_heads(trainer, trainer.lora_ga_config)
        found.append(saved_modules(trainer.model)[0].weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_more_steps_than_the_data_holds_start_it_over(tmp_path):
    """ROWS / 4 = 4 steps an epoch; the loss on the training rows falls all the way."""
    losses = []
    for steps in (1, 4, 30):
        trainer = make_trainer(tmp_path, steps)
        first = loss_of(trainer.model, tiny.class_rows(ROWS))
        warm_up_heads(trainer, trainer.lora_ga_config)
        losses.append(loss_of(trainer.model, tiny.class_rows(ROWS)))
    assert first > losses[0] > losses[1] > losses[2]


def test_the_loss_that_the_probe_starts_from_is_the_warmed_up_one(tmp_path):
    found = []
    for steps in (0, 30):
        trainer = make_trainer(tmp_path, steps, max_steps=1)
        trainer.train()
        found.append(trainer.lora_ga_report.loss_before)
    assert found[1] < found[0] - 1e-3


@pytest.mark.parametrize("steps", [1, 5])
def test_training_goes_on_as_from_heads_set_by_hand(steps, tmp_path):
    """Data order, dropout masks and every weight after training are those of a run whose heads were set."""
    warm = {}
    first = make_trainer(tmp_path, steps, [AtFirstStep(lambda model: warm.update(state_of(model)))])
    first.train()
    second = make_trainer(tmp_path, 0)
    assert moved(second.model, warm) >= heads(second.model)
    second.model.load_state_dict({name: warm[name] for name in heads(second.model)}, strict=False)
    second.train()
    assert moved(second.model, first.model.state_dict()) == set()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (first, second)]
    assert losses[0] == losses[1]


def test_a_second_train_does_not_repeat_it(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, 3, [AtFirstStep(lambda model: seen.append(state_of(model)))], max_steps=2)
    trainer.train()
    ended = state_of(trainer.model)
    trainer.train()
    assert len(seen) == 2
    assert all(torch.equal(seen[1][name], ended[name]) for name in ended)


def test_a_resume_does_not_repeat_it(tmp_path):
    straight = make_trainer(tmp_path / "straight", 3)
    straight.train()
    make_trainer(tmp_path / "halved", 3, save_strategy="steps", save_steps=2).train()
    resumed = make_trainer(tmp_path / "halved", 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halved" / "checkpoint-2"))
    assert resumed.lora_ga_report is None
    assert moved(resumed.model, straight.model.state_dict()) == set()


def bare_trainer(folder):
    lora = tiny.with_lora(tiny.bert(), target_modules=["query"])
    trainer = Trainer(lora, tiny.arguments(folder), train_dataset=tiny.class_rows(8))
    trainer.add_callback(LoRAGACallback(trainer, LoRAGAConfig(num_samples=4, head_warmup_steps=2)))
    return trainer


@pytest.mark.parametrize("bare", [False, True])
def test_an_adapter_without_heads_is_refused_with_two_ways_out(bare, tmp_path):
    trainer = bare_trainer(tmp_path) if bare else make_trainer(tmp_path, 2, lora={"modules_to_save": None})
    before = state_of(trainer.model)
    with pytest.raises(ValueError, match=r"head_warmup_steps=2.*no `modules_to_save`.*head_warmup_steps=0"):
        trainer.train()
    assert moved(trainer.model, before) == set()
    assert trainer.state.global_step == 0


def test_labels_that_are_all_ignored_are_refused(tmp_path):
    rows = [{**row, "labels": -100} for row in tiny.class_rows(8)]
    trainer = make_trainer(tmp_path, 2, rows=rows)
    before = state_of(trainer.model)
    with pytest.raises(ValueError, match=r"head_warmup_steps.*label"):
        warm_up_heads(trainer, trainer.lora_ga_config)
    assert moved(trainer.model, before) == set()


def test_gradients_are_given_back_after_an_error(tmp_path):
    trainer = make_trainer(tmp_path, 2)
    requires_grad = [parameter.requires_grad for parameter in trainer.model.parameters()]

    def fail(*args, **kwargs):
        raise RuntimeError("thrown inside")

    trainer.compute_loss = fail
    with pytest.raises(RuntimeError, match="thrown inside"):
        warm_up_heads(trainer, trainer.lora_ga_config)
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == requires_grad
    assert [parameter for parameter in trainer.model.parameters() if parameter.grad is not None] == []


def test_a_start_that_fails_gives_the_heads_back_and_a_second_try_trains_them_as_the_first_would_have(tmp_path):
    fine = make_trainer(tmp_path / "fine", 3, max_steps=1, learning_rate=0.0)
    trainer = make_trainer(tmp_path / "failed", 3, max_steps=1, learning_rate=0.0)
    before = state_of(trainer.model)
    compute_loss = trainer.compute_loss
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(1)
        loss = compute_loss(*args, **kwargs)
        return loss * float("nan") if len(calls) == 5 else loss  # after 3 steps of a micro-batch: in the probe

    trainer.compute_loss = poisoned
    with pytest.raises(ValueError, match=r"the loss is nan\. No weight was changed"):
        trainer.train()
    assert not moved(trainer.model, before)
    trainer.compute_loss = compute_loss
    trainer.train()
    fine.train()
    assert heads(trainer.model) <= moved(trainer.model, before)
    assert not moved(trainer.model, state_of(fine.model))


def test_a_head_tied_to_the_embedding_steps_once_on_the_gradient_of_both_uses(tmp_path):
    """Adam's first step is `lr g / (|g| + eps)` with `g` the sum of what reaches the parameter under its two names."""
    model = tiny.with_lora(
        tiny.llama(tie_word_embeddings=True),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    rows = tiny.causal_rows(4)
    embedding, head = saved_modules(model)
    assert embedding.weight is head.weight
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    (gradient,) = torch.autograd.grad(model(**batch).loss, [embedding.weight])
    before = embedding.weight.detach().clone()
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path, learning_rate=0.0, max_steps=1),
        train_dataset=rows,
        lora_ga_config=LoRAGAConfig(num_samples=4, head_warmup_steps=1, head_warmup_learning_rate=1e-2),
    )
    trainer.train()
    assert embedding.weight is head.weight
    expected = before - 1e-2 * gradient / (gradient.abs() + 1e-8)
    seen = gradient.abs() > 1e-6
    torch.testing.assert_close(head.weight.detach()[seen], expected[seen], rtol=1e-4, atol=1e-5)
