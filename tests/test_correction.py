"""A config's correction inside the Trainer: every start with every optimizer trains, resumes and agrees over ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from test_trainer import LORA, adapter_of, assert_bitwise, assert_same_state, logits_of, swap
from transformers import Trainer, TrainerCallback

from lora_ga_trainer import (
    LoRAGACallback,
    LoRAGAConfig,
    LoRAGATrainer,
    LoRAProAdamW,
    LoRAProOptimizer,
    correct_gradients,
)
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.adapters.storage import anchored_parameter_names


STARTS = ("lora_ga", "lora_one", "none")
MUON = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(MUON is None, reason=f"torch {torch.__version__} has no Muon")
CORRECTIONS = {
    "lora_pro": {"correction": "lora_pro"},
    "lora_pro_adamw": {"correction": "lora_pro_adamw"},
    "bf16 moments": {
        "correction": "lora_pro_adamw",
        "lora_pro_state_dtype": "bfloat16",
        "lora_pro_offload_state": True,
    },
    **({"muon": {"correction": "muon"}} if MUON else {}),
    "LoRA+": {"loraplus_lr_ratio": 8.0},
    "Riemannian": {"riemannian_reg": 1e-2},
}
KINDS = {
    "lora_pro": LoRAProOptimizer,
    "lora_pro_adamw": LoRAProAdamW,
    "bf16 moments": LoRAProAdamW,
    "muon": MUON,
    "LoRA+": torch.optim.AdamW,
    "Riemannian": torch.optim.AdamW,
}


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("name", CORRECTIONS)
def test_two_steps_and_a_resume_of_two_are_four_steps(init, name, tmp_path):
    """Every start with every optimizer; and the folder loads with plain PEFT on the clean base."""
    if init == "lora_ga" and name in ("Riemannian", "muon"):
        pytest.skip("refused: see test_config")
    settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    lora_ga = {"init": init, **CORRECTIONS[name]}
    whole = swap(tmp_path / "whole", lora_ga, **settings)
    before = adapter_of(whole)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, KINDS[name])
    assert any(not torch.equal(value, before[key]) for key, value in adapter_of(whole).items())
    resumed = swap(tmp_path / "resumed", lora_ga, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_bitwise(adapter_of(whole), adapter_of(resumed))
    left, right = (
        torch.load(tmp_path / run / "checkpoint-4" / "optimizer.pt", weights_only=True) for run in ("whole", "resumed")
    )
    assert_same_state(left, right)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "whole" / "checkpoint-4")
    torch.testing.assert_close(logits_of(stock), logits_of(whole.model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("correction", ["lora_pro", "lora_pro_adamw"])
def test_the_loss_falls(correction, tmp_path):
    rows = tiny.causal_rows(16)
    trainer = swap(tmp_path, {"correction": correction}, rows=rows, eval_dataset=rows, max_steps=8)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.01


@pytest.mark.parametrize("correction", ["lora_pro", "lora_pro_adamw"])
@pytest.mark.parametrize(
    ("init", "changes"),
    [
        ("lora_one", {"use_dora": True}),
        ("lora_ga", {"use_rslora": True}),
        ("lora_ga", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("none", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_every_kind_of_adapter(correction, init, changes, tmp_path):
    gamma = {} if init == "none" else {"gamma": 4.0}
    torch.manual_seed(11)
    trainer = LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(24),
        peft_config=LoraConfig(**LORA, **changes),
        lora_ga_config=LoRAGAConfig(init=init, correction=correction, num_samples=8, **gamma),
    )
    before = adapter_of(trainer)
    trainer.train()
    still = [name for name, value in adapter_of(trainer).items() if torch.equal(value, before[name])]
    assert not still


def test_only_the_active_adapter_of_two_is_trained(tmp_path):
    model = tiny.with_lora_seedless(tiny.llama(), **LORA)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    first = {name: p.detach().clone() for name, p in model.named_parameters() if "default" in name}
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(24),
        lora_ga_config=LoRAGAConfig(init="none", correction="lora_pro"),
    )
    trainer.train()
    assert {pair.adapter for pair in trainer.optimizer.optimizer.pairs} == {"second"}
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters() if name in first)


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch"])
def test_the_wrapped_optimizer_is_that_of_the_training_arguments(optim, tmp_path):
    trainer = swap(tmp_path / "ours", {"correction": "lora_pro"}, optim=optim, weight_decay=0.1)
    plain = swap(tmp_path / "plain", optim=optim, weight_decay=0.1)
    ours, theirs = trainer.create_optimizer(), plain.create_optimizer()
    assert type(ours.inner) is type(theirs)
    assert len(ours.param_groups) == len(theirs.param_groups)
    for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


def test_an_optimizer_that_was_passed_is_wrapped(tmp_path):
    model = tiny.with_lora_seedless(tiny.llama(), **LORA)
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(8),
        lora_ga_config=LoRAGAConfig(init="none", correction="lora_pro"),
        optimizers=(inner, None),
    )
    trainer.train()
    assert trainer.optimizer.optimizer.inner is inner


def test_a_second_train_does_not_correct_twice(tmp_path):
    trainer = swap(tmp_path, {"correction": "lora_pro"}, max_steps=1)
    trainer.train()
    first = trainer.optimizer.optimizer
    trainer.train()
    assert type(first) is LoRAProOptimizer
    assert type(trainer.optimizer.optimizer) is LoRAProOptimizer
    assert type(trainer.optimizer.optimizer.inner) is torch.optim.AdamW


def test_the_norm_is_clipped_before_the_correction(tmp_path):
    """The raw gradients have norm `max_grad_norm` when the step comes, and SGD moves by the correction of those."""
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            layers = find_adapted_layers(model)
            factors = [p for layer in layers for p in (layer.lora_A.weight, layer.lora_B.weight)]
            seen["norm"] = torch.nn.utils.get_total_norm([p.grad for p in factors]).item()
            layer = layers[0]
            A, B = layer.lora_A.weight.detach().clone(), layer.lora_B.weight.detach().clone()
            dA, dB = correct_gradients(A, B, layer.lora_A.weight.grad, layer.lora_B.weight.grad, layer.s)
            seen["expected"] = A - 0.5 * dA, B - 0.5 * dB

    trainer = swap(
        tmp_path,
        {"init": "lora_one", "correction": "lora_pro"},
        max_grad_norm=0.01,
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        callbacks=[Look()],
    )
    trainer.train()
    layer = find_adapted_layers(trainer.model)[0]
    assert seen["norm"] == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(layer.lora_A.weight.detach(), seen["expected"][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.lora_B.weight.detach(), seen["expected"][1], rtol=1e-4, atol=1e-6)


def test_decay_of_anchored_parameters_is_left_to_the_net_decay(tmp_path):
    decays = {}
    for correction in ("lora_pro", "lora_pro_adamw"):
        trainer = swap(tmp_path / correction, {"correction": correction}, weight_decay=0.1, max_steps=1)
        trainer.train()
        names = {id(p): n for n, p in trainer.model.named_parameters()}
        anchored = anchored_parameter_names(trainer.model)
        groups = trainer.optimizer.param_groups
        decays[correction] = {g["weight_decay"] for g in groups for p in g["params"] if names[id(p)] in anchored}
    assert decays == {"lora_pro": {0.0}, "lora_pro_adamw": {0.1}}


def plain_model(tmp_path, **config):
    return LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(8),
        lora_ga_config=LoRAGAConfig(init="none", **config),
    )


def given_optimizer(tmp_path, **config):
    model = tiny.with_lora_seedless(tiny.llama(), **LORA)
    return LoRAGATrainer(
        model,
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(8),
        lora_ga_config=LoRAGAConfig(init="none", **config),
        optimizers=(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), None),
    )


def only_callback(tmp_path, **config):
    model = tiny.with_lora_seedless(tiny.llama(), **LORA)
    trainer = Trainer(model, tiny.arguments(tmp_path), train_dataset=tiny.causal_rows(8))
    return LoRAGACallback(trainer, LoRAGAConfig(**config))


PRO, PRO_ADAMW = {"correction": "lora_pro"}, {"correction": "lora_pro_adamw"}
REFUSED = {
    "no adapter": (plain_model, PRO, "LlamaForCausalLM without a PEFT adapter"),
    "LoRA+ without adapter": (plain_model, {"loraplus_lr_ratio": 4.0}, "without a PEFT adapter"),
    "given optimizer": (given_optimizer, PRO_ADAMW, "was given a SGD.*correction='lora_pro'"),
    "LoRA+ and a given one": (given_optimizer, {"loraplus_lr_ratio": 4.0}, "was given a SGD"),
    "bare callback": (only_callback, PRO, "a callback has no say.*LoRAGATrainer or LoRAGAMixin"),
    "other optim": (
        lambda folder, **config: swap(folder, config, optim="adafactor"),
        PRO_ADAMW,
        "optim='adafactor'.*optim='adamw_torch'",
    ),
}


@pytest.mark.parametrize(("build", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_built_is_refused_before_training(build, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"correction": "lora_pro", "loraplus_lr_ratio": 4.0}, "correction='lora_pro' and loraplus_lr_ratio"),
        ({"init": "none", "loraplus_lr_ratio": 4.0, "riemannian_reg": 1.0}, "loraplus_lr_ratio and riemannian_reg"),
        ({"riemannian_reg": 1e-2}, "riemannian_reg=0.01 does not go with init='lora_ga'.*delta form"),
        ({"correction": "muon"}, "correction='muon' does not go with init='lora_ga'.*delta form"),
        ({"lora_pro_state_dtype": "bfloat16"}, "lora_pro_state_dtype='bfloat16' is for correction='lora_pro_adamw'"),
        ({"lora_pro_offload_state": True, "correction": "lora_pro"}, "lora_pro_offload_state=True is for"),
        ({"lora_pro_state_dtype": "fp8"}, "lora_pro_state_dtype='fp8' is unknown"),
        ({"loraplus_lr_ratio": -1.0}, "loraplus_lr_ratio=-1.0 must be a number greater than 0"),
    ],
)
def test_pairs_that_cannot_go_together_are_refused_by_the_config(config, message):
    with pytest.raises(ValueError, match=message):
        LoRAGAConfig(**config)


def muon(folder, changes=None, kind=LoRAGATrainer, **settings):
    return kind(
        tiny.llama(),
        tiny.arguments(folder, **settings),
        train_dataset=tiny.causal_rows(24),
        peft_config=LoraConfig(**LORA | (changes or {})),
        lora_ga_config=LoRAGAConfig(init="none", correction="muon"),
    )


@needs_muon
def test_muon_moves_every_factor_as_far_as_adamw_mostly_does(tmp_path):
    """By .2 times the rate, in the root mean square of its entries, whatever the gradient's size."""
    settings = {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer, seen = muon(tmp_path, **settings), []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(adapter_of(trainer))

    trainer.add_callback(Keep())
    trainer.train()
    for name, before in seen[1].items():  # in the first step B = 0 leaves A without a gradient
        step = (seen[2][name] - before) / 1e-2
        # Newton and Schulz's iterations leave singular values near 1, not at it.
        assert 0.7 * 0.2 < step.square().mean().sqrt() < 1.2 * 0.2, name


@needs_muon
def test_muon_decays_as_the_trainer_would(tmp_path):
    class Half(LoRAGATrainer):
        def get_decay_parameter_names(self, model):
            return [name for name in super().get_decay_parameter_names(model) if "lora_A" in name]

    trainer = muon(tmp_path, kind=Half, weight_decay=0.1)
    trainer.create_optimizer()
    decays = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    decaying = set(trainer.get_decay_parameter_names(trainer.model))
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert decays[id(parameter)] == (0.1 if name in decaying else 0)
    assert set(decays.values()) == {0.1, 0.0}
    assert {g["lr"] for g in trainer.optimizer.param_groups} == {trainer.args.learning_rate}


@needs_muon
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.*is no LoRA factor of the active adapter"),
        ({"use_dora": True}, "magnitude.*is no LoRA factor"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens is a convolution or an embedding"),
    ],
)
def test_muon_refuses_what_is_no_matrix_of_a_layer(changes, named, tmp_path):
    with pytest.raises(ValueError, match=f"correction='muon': .*{named}"):
        muon(tmp_path, changes).train()


@needs_muon
def test_muon_refuses_another_optimizer_and_a_torch_without_it(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"correction='muon' is an optimizer of its own.*optim='sgd'"):
        muon(tmp_path, optim="sgd")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"correction='muon' is torch\.optim\.Muon, which torch .* lacks"):
        muon(tmp_path)


DDP = """
import sys
sys.path.insert(0, {tests!r})
import os, torch
torch.set_num_threads(1)
assert os.environ["WORLD_SIZE"] == "2"
from test_trainer import swap
for correction in ("lora_pro", "lora_pro_adamw"):
    trainer = swap({folder!r}, max_steps=3, per_device_train_batch_size=2,
                   lora_ga={{"num_samples": 10, "correction": correction}})
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    torch.save({{n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}},
               {folder!r} + f"/{{correction}}{{trainer.accelerator.process_index}}.pt")
from processes import end_processes
end_processes()
"""


def test_two_processes_take_the_same_steps_bitwise(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(DDP.format(tests=str(Path(__file__).parent), folder=str(tmp_path))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29637"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for correction in ("lora_pro", "lora_pro_adamw"):
        assert_bitwise(*(torch.load(tmp_path / f"{correction}{rank}.pt", weights_only=True) for rank in range(2)))


def test_the_optimizer_class_that_was_passed_gives_its_options(tmp_path):
    torch.manual_seed(11)
    trainer = LoRAGATrainer(
        tiny.llama(),
        tiny.arguments(tmp_path),
        train_dataset=tiny.causal_rows(8),
        peft_config=LoraConfig(**LORA),
        lora_ga_config=LoRAGAConfig(num_samples=8, **PRO_ADAMW),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 3e-4, "betas": (0.8, 0.9)}),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is LoRAProAdamW
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
