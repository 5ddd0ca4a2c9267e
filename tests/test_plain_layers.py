"""Layers that get no start keep PEFT's own, are named, and are right in every form beside layers that got one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, TrainerCallback

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, load_adapter
from lora_ga_trainer.adapters.find import find_adapted_layers, find_lora_layers
from lora_ga_trainer.maths.inits import INITS
from lora_ga_trainer.starts.report import Action


TARGETS = ["body", "aside"]


class TwoTowers(nn.Module):
    """Text in every batch, an image in some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.aside, self.head = nn.Linear(6, 9), nn.Linear(5, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor, labels: Tensor, image: Tensor | None = None) -> dict[str, Tensor]:
        seen = torch.zeros(()) if image is None else self.aside(image)
        logits = self.head(torch.tanh(self.body(x) + seen))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count: int, images: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    made = [{"x": torch.randn(6, generator=generator), "labels": i % 3} for i in range(count)]
    images_of = [torch.randn(5, generator=generator) for _ in made]
    return [row | {"image": image} for row, image in zip(made, images_of, strict=True)] if images else made


class Recording(LoRAGATrainer):
    """Keeps the batches of its training steps."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = [*getattr(self, "seen", []), dict(inputs)]
        return super().training_step(model, inputs, *args, **kwargs)


def made(folder: Any, model: nn.Module, **changes: Any) -> Recording:
    config = {"num_samples": 8} | changes.pop("lora_ga", {})
    arguments = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    return Recording(
        model,
        tiny.arguments(folder, **arguments),
        train_dataset=rows(16, images=True),
        probe_dataset=rows(8, images=False),
        lora_ga_config=LoRAGAConfig(**config),
        **changes,
    )


class Freeze(TrainerCallback):
    """Lets a layer train from the second step on, as callbacks that unfreeze layer by layer do."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in (self.layer.lora_A._parameters["weight"], self.layer.lora_B._parameters["weight"]):
            parameter.requires_grad_(state.global_step >= 1)


class Start(TrainerCallback):
    """Keeps what every layer starts from: stored factors, and the offset of the weight that is taken off again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in find_lora_layers(self.model):
            self.factors[layer.name] = (layer.stored_A.detach().clone(), layer.stored_B.detach().clone())


def twin_of(trainer: LoRAGATrainer, start: dict[str, tuple[Tensor, Tensor]], peft_start: dict[str, Any]) -> PeftModel:
    """Plain LoRA of rank r on a base without `s B0 A0` of the started layers, and with PEFT's start elsewhere."""
    base = TwoTowers()
    twin = tiny.with_lora(base, target_modules=TARGETS)
    for layer in find_lora_layers(twin):
        stored_A, stored_B = start[layer.name]
        A, B = stored_A[: layer.rank], peft_start[layer.name][1]
        with torch.no_grad():
            if INITS[trainer.lora_ga_config.init].anchored:
                B = stored_B[:, layer.rank :]
                layer.weight.sub_(layer.s * (B @ A))
            else:
                B = stored_B
            layer.stored_A.copy_(A)
            layer.stored_B.copy_(B)
    return twin


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
@pytest.mark.parametrize("why", ["unreached", "frozen before the trainer", "frozen after it"])
def test_a_plain_layer_is_right_in_memory_training_saving_loading_and_merging(
    init: str, why: str, tmp_path: Any, caplog: Any
) -> None:
    model = tiny.with_lora(TwoTowers(), target_modules=TARGETS)
    peft_start = {
        layer.name: (layer.stored_A.detach().clone(), layer.stored_B.detach().clone())
        for layer in find_lora_layers(model)
    }
    if why == "frozen before the trainer":
        model.base_model.aside.requires_grad_(False)
    trainer = made(tmp_path / "run", model, lora_ga={"init": init})
    if why == "frozen after it":
        model.base_model.aside.requires_grad_(False)
    aside = {layer.name: layer for layer in find_lora_layers(model)}["aside"]
    start = Start(model)
    trainer.add_callback(start)
    if why != "unreached":
        trainer.add_callback(Freeze(aside))
        # Training makes its optimizer of what requires grad; a group for later is the user's own affair.
        trainer.create_optimizer()
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        late = [p for p in (aside.stored_A, aside.stored_B) if id(p) not in held]
        trainer.optimizer.add_param_group({"params": late, "weight_decay": 0.0})
    with caplog.at_level(logging.WARNING):
        trainer.train()

    # It is named once in a warning and in the report.
    wanted = Action.UNREACHED if why == "unreached" else Action.FROZEN
    assert {layer.name: layer.action for layer in trainer.lora_ga_report.layers} == {
        "body": Action.INITIALISED if init == "lora_one" else trainer.lora_ga_report.layers[0].action,
        "aside": wanted,
    }
    assert not trainer.lora_ga_report.layers[0].action.is_plain
    named = [record.getMessage() for record in caplog.records if "aside" in record.getMessage()]
    assert len(named) == 1
    assert "never reaches" in named[0] or "frozen" in named[0]
    assert "1 left plain" in trainer.lora_ga_report.summary()

    # At the start it holds PEFT's own, and adds nothing.
    A, B = start.factors["aside"]
    assert torch.equal(A[: aside.rank], peft_start["aside"][0])
    assert not B.any()
    assert not A[aside.rank :].any()

    # Every step is that of plain LoRA in this layer, and of LoRA-GA in the other.
    twin = twin_of(trainer, start.factors, peft_start)
    plain = {layer.name: layer for layer in find_lora_layers(twin)}
    frozen = [plain["aside"].stored_A, plain["aside"].stored_B]
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.05)
    for step, batch in enumerate(trainer.seen):
        for parameter in frozen:
            parameter.requires_grad_(why == "unreached" or step >= 1)
        twin(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    batch = trainer.data_collator(rows(6, images=True))
    logits = twin(**batch)["logits"]
    assert (logits - TwoTowers()(**batch)["logits"]).abs().max() > 1e-3
    torch.testing.assert_close(model(**batch)["logits"], logits, rtol=1e-5, atol=1e-6)
    assert aside.stored_B.any()

    # Saved, loaded by PEFT and by this package, merged, and switched off.
    model.eval()
    logits = model(**batch)["logits"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(TwoTowers(), str(tmp_path / "saved"))
    assert torch.equal(loaded(**batch)["logits"], logits)
    torch.testing.assert_close(loaded.merge_and_unload()(**batch)["logits"], logits, rtol=1e-5, atol=1e-6)
    again = load_adapter(TwoTowers(), tmp_path / "saved")
    assert torch.equal(again(**batch)["logits"], logits)
    assert [layer.is_anchored for layer in find_adapted_layers(again)] == [INITS[init].anchored] * 2
    with model.disable_adapter():
        assert torch.equal(model(**batch)["logits"], TwoTowers()(**batch)["logits"])


def test_a_loss_that_reaches_no_layer_is_an_error(tmp_path: Any) -> None:
    model = tiny.with_lora(TwoTowers(), target_modules=["aside"])
    model.base_model.head.weight.requires_grad_(True)  # or plain training would fail, too
    trainer = made(tmp_path, model)
    with pytest.raises(ValueError, match=r"reaches none of the 1 adapted layers \(aside.*training would change noth"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_whoever_wants_an_error_gets_one(tmp_path: Any) -> None:
    model = tiny.with_lora(TwoTowers(), target_modules=TARGETS)
    trainer = made(tmp_path, model, lora_ga={"allow_unreached": False})
    with pytest.raises(ValueError, match=r"never reaches 1 adapted layers: aside.*allow_unreached=True"):
        trainer.train()


class Attention(nn.Module):
    """`nn.MultiheadAttention` never calls its `out_proj`: it hands the weight to a fused function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.embed(x)[:, None]
        h = h + self.attention(h, h, h)[0]
        return {"loss": nn.functional.cross_entropy(self.head(h[:, 0]), labels)}


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2, "vocab_size": tiny.VOCABULARY}
    return MambaForCausalLM(MambaConfig(**sizes))


@pytest.mark.parametrize("family", ["mamba", "attention"])
@pytest.mark.parametrize("correction", ["none", "lora_pro"])
def test_models_with_fused_layers_train_as_with_plain_lora(family: str, correction: str, tmp_path: Any) -> None:
    base = mamba() if family == "mamba" else Attention()
    targets = ["in_proj", "x_proj", "dt_proj"] if family == "mamba" else ["embed", "head", "out_proj"]
    model = tiny.with_lora(base, target_modules=targets)
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path, max_steps=2),
        train_dataset=tiny.causal_rows(8) if family == "mamba" else rows(8, images=False),
        lora_ga_config=LoRAGAConfig(num_samples=8, correction=correction),
    )
    trainer.train()
    plain = {layer.name for layer in trainer.lora_ga_report.layers if layer.action is Action.UNREACHED}
    assert plain
    assert all(name.endswith(("dt_proj", "out_proj")) for name in plain)
    assert trainer.lora_ga_report.metrics()["lora_ga/layers_initialised"] >= 2


def test_a_run_with_a_frozen_layer_resumes(tmp_path: Any) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> dict[str, Tensor]:
        model = tiny.with_lora(TwoTowers(), target_modules=TARGETS)
        model.base_model.aside.requires_grad_(False)
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        trainer = LoRAGATrainer(
            model,
            tiny.arguments(tmp_path / folder, **settings),
            train_dataset=rows(16, images=True),
            lora_ga_config=LoRAGAConfig(num_samples=8),
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}

    whole = run("whole", 4)
    halfway = run("halves", 2)
    resumed = run("halves", 4, resume=True)
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
    assert any(not torch.equal(halfway[name], value) for name, value in resumed.items())
