"""
Adapters without a `PeftModel` on top: native ones of transformers, injected ones, mixed ones, and ones further inside.

Each is held to what holds for a `PeftModel`: the same start, the same training, files that stock PEFT reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import native
import pytest
import reference
import tiny
import torch
from clients.runs import Undo
from native import WAYS, WITHOUT_WRAPPER, adapted, by_peft, logits
from peft import IA3Config, LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from test_probe import causal_loss, exact, in_order, probe
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from lora_ga_trainer import (
    LoRAGACallback,
    LoRAGAConfig,
    LoRAGATrainer,
    export_adapter,
    find_adapted_layers,
    load_adapter,
)
from lora_ga_trainer.adapters.find import saved_modules
from lora_ga_trainer.adapters.host import find_host, require_adapter
from lora_ga_trainer.saving.record import read_record, record_of_model


ROWS = tiny.causal_rows(16)
every_way = pytest.mark.parametrize("way", WITHOUT_WRAPPER)
# The Trainer saves the first as an adapter and the second as a whole state.
both_kinds = pytest.mark.parametrize("way", ["native", "inner_wrapped"])


@pytest.fixture(autouse=True)
def takes_this_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    native.let_transformers_take_this_peft(monkeypatch)


def trainer_of(model: nn.Module, folder: Any, callback: bool = False, rows: Any = None, **changes: Any) -> Trainer:
    """A trainer with the start, by the mixin or by the callback alone; fields of `LoRAGAConfig` go to it."""
    fields = {key: changes.pop(key) for key in list(changes) if key in LoRAGAConfig.__dataclass_fields__}
    config = LoRAGAConfig(**({"num_samples": 8} | fields))
    # The forward of a tuner of PEFT does not name the columns that it takes.
    arguments = tiny.arguments(folder, remove_unused_columns=False, **changes)
    data = {"train_dataset": ROWS if rows is None else rows, "eval_dataset": ROWS[:4]}
    if not callback:
        return LoRAGATrainer(model, arguments, **data, lora_ga_config=config)
    trainer = Trainer(model, arguments, **data)
    trainer.add_callback(LoRAGACallback(trainer, config))
    return trainer


def trained(model: nn.Module, folder: Any, **changes: Any) -> Trainer:
    trainer = trainer_of(model, folder, **changes)
    trainer.train()
    return trainer


def plain(model: nn.Module, folder: Any) -> Trainer:
    return Trainer(model, tiny.arguments(folder, remove_unused_columns=False), train_dataset=ROWS)


def factors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for layer in find_adapted_layers(model):
        named[f"{layer.name}.A"] = layer.stored_A.detach().clone()
        named[f"{layer.name}.B"] = layer.stored_B.detach().clone()
    return named


def assert_bitwise(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert left
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@every_way
def test_the_gradient_is_that_of_autograd(way: str, tmp_path: Path) -> None:
    """`G` of every layer equals `dL/dW` of the unwrapped model on the same rows, micro-batches of 4, 4 and 1."""
    found = probe(in_order(ROWS[:9], tmp_path, adapted(way), remove_unused_columns=False), exact())
    base = tiny.llama()
    causal_loss(base, ROWS[:9]).backward()
    assert len(found) == 4
    for name, G in found.items():
        expected = base.get_submodule(name).weight.grad.double()
        assert torch.linalg.norm(G - expected) <= 1e-6 * torch.linalg.norm(expected), name


@every_way
def test_the_start_is_that_of_the_paper_and_leaves_the_output(way: str, tmp_path: Path) -> None:
    """A run at rate 0 ends where it started: `A0`, `B0` of the gradient's singular vectors, the output untouched."""
    settings = {"learning_rate": 0.0, "max_steps": 1, "num_samples": 16, "estimator": "exact"}
    model = adapted(way)
    trained(model, tmp_path, **settings)
    base = tiny.llama()
    causal_loss(base, ROWS).backward()
    for layer in find_adapted_layers(model):
        B0, A0 = reference.lora_ga_reference(base.get_submodule(layer.name).weight.grad, layer.rank)
        A, B = layer.stored_A[: layer.rank].double(), layer.stored_B[:, layer.rank :].double()
        torch.testing.assert_close(A.T @ A, A0.T @ A0, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(B @ B.T, B0 @ B0.T, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), logits(tiny.llama()))


@every_way
def test_training_is_that_of_a_wrapped_model_to_the_bit(way: str, tmp_path: Path) -> None:
    ours, peft = adapted(way), adapted("wrapped")
    losses = []
    for model, name in ((ours, "a"), (peft, "b")):
        logs = trained(model, tmp_path / name, weight_decay=0.1).state.log_history
        losses.append([log["loss"] for log in logs if "loss" in log])
    assert losses[0] == losses[1]
    assert_bitwise(factors(ours), factors(peft))


@both_kinds
def test_the_callback_trains_it_as_it_trains_a_wrapped_model(way: str, tmp_path: Path) -> None:
    ours, peft = adapted(way), adapted("wrapped")
    for model, name in ((ours, "a"), (peft, "b")):
        trained(model, tmp_path / name, weight_decay=0.1, callback=True)
    assert_bitwise(factors(ours), factors(peft))


@every_way
def test_a_start_that_is_undone_leaves_the_plain_run_to_the_bit(way: str, tmp_path: Path) -> None:
    """LoRA-One stores rank r as plain LoRA does; dropout and the order of rows must be what they would have been."""
    ours, twin = (adapted(way, tiny.llama(attention_dropout=0.1), lora_dropout=0.1) for _ in range(2))
    undone = trainer_of(ours, tmp_path / "a", init="lora_one")
    undone.add_callback(Undo(undone))
    undone.train()
    plain(twin, tmp_path / "b").train()
    assert_bitwise(dict(ours.state_dict()), dict(twin.state_dict()))


@every_way
def test_a_saved_folder_is_an_adapter_that_stock_peft_reads(way: str, tmp_path: Path) -> None:
    model = adapted(way)
    trainer = trained(model, tmp_path, init="lora_ga")
    trainer.save_model(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["r"], config["peft_type"]) == (8, "LORA")  # rank 4, anchored
    assert read_record(tmp_path / "saved") == record_of_model(model)
    assert torch.equal(logits(by_peft(tmp_path / "saved")), logits(model))
    names = set(load_file(tmp_path / "saved" / "adapter_model.safetensors"))
    trained(peft := adapted("wrapped"), tmp_path)
    peft.save_pretrained(tmp_path / "peft")
    assert names == set(load_file(tmp_path / "peft" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("way", "changes"),
    [
        *((way, {}) for way in WITHOUT_WRAPPER),
        *((way, {"callback": True}) for way in ("native", "inner_wrapped")),
        *((way, {"init": "lora_one"}) for way in ("native", "inner_wrapped")),
    ],
)
def test_a_resumed_run_ends_where_the_whole_run_does(way: str, changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2} | changes
    whole = adapted(way)
    first = trained(whole, tmp_path, **settings)
    resumed = adapted(way)
    again = trainer_of(resumed, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == first.state.global_step == 4
    assert_bitwise(dict(resumed.state_dict()), dict(whole.state_dict()))


@both_kinds
def test_a_checkpoint_without_its_record_is_not_resumed(way: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(adapted(way), tmp_path, **settings)
    (tmp_path / "checkpoint-2" / "lora_ga.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2.*no lora_ga\.json"):
        trainer_of(adapted(way), tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@both_kinds
def test_a_checkpoint_whose_adapter_was_lost_is_passed_over(way: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    trained(adapted(way), tmp_path, **settings)
    (tmp_path / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"")
    again = trainer_of(adapted(way), tmp_path, **(settings | {"max_steps": 3}))
    again.train(resume_from_checkpoint=True)
    assert again.state.log_history[-1]["step"] == 3  # from 2, not from 4


class Worsens(TrainerCallback):
    """Makes every evaluation worse than the one before it, so that the first checkpoint is the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        metrics["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize(
    ("way", "callback"), [*((way, False) for way in WITHOUT_WRAPPER), ("native", True), ("mixed", True)]
)
def test_the_best_checkpoint_is_loaded_at_the_end(way: str, callback: bool, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    model = adapted(way)
    trainer = trainer_of(model, tmp_path, callback=callback, load_best_model_at_end=True, **settings)
    trainer.add_callback(Worsens())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert torch.equal(logits(model), logits(by_peft(tmp_path / "checkpoint-2")))
    assert not torch.equal(logits(model), logits(by_peft(tmp_path / "checkpoint-4")))


@every_way
def test_an_exported_copy_changes_the_base_alike(way: str, tmp_path: Path) -> None:
    model = adapted(way)
    trained(model, tmp_path, learning_rate=1e-2)
    assert export_adapter(model, tmp_path / "whole", 8)["total"] < 1e-6
    torch.testing.assert_close(logits(by_peft(tmp_path / "whole")), logits(model), rtol=0, atol=1e-5)
    errors = export_adapter(model, tmp_path / "cut", 2)
    for layer in find_adapted_layers(model):
        delta = layer.s * layer.stored_B.detach().double() @ layer.stored_A.detach().double()
        lost = torch.linalg.norm(delta - reference.best_rank(delta, 2)) / torch.linalg.norm(delta)
        assert errors[layer.name] == pytest.approx(lost.item(), rel=1e-5)


@every_way
def test_the_base_is_there_with_the_adapter_off_or_merged_into_it(way: str, tmp_path: Path) -> None:
    model = adapted(way)
    trained(model, tmp_path, learning_rate=1e-2)
    after = logits(model)
    assert not torch.equal(after, logits(tiny.llama()))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(logits(model), logits(tiny.llama()))
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    torch.testing.assert_close(logits(model), after, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="merged into the base weight"):
        find_adapted_layers(model)
    for layer in layers:
        layer.unmerge()
    torch.testing.assert_close(logits(model), after, rtol=0, atol=1e-5)


def test_transformers_own_switches_work_on_an_anchored_adapter(tmp_path: Path) -> None:
    model = adapted("native")
    trained(model, tmp_path, learning_rate=1e-2)
    after = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny.llama()))
    model.enable_adapters()
    assert torch.equal(logits(model), after)
    model.save_pretrained(tmp_path / "own")
    assert read_record(tmp_path / "own") is not None
    assert torch.equal(logits(by_peft(tmp_path / "own")), after)
    other = tiny.llama()
    other.load_adapter(str(tmp_path / "own"))
    assert torch.equal(logits(other), after)
    model.delete_adapter("default")
    assert find_host(model) is None
    assert torch.equal(logits(model), logits(tiny.llama()))


class TestContinuing:
    """`load_adapter` on a model that has read the adapter already."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        tiny.llama().save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def saved(self, base: Path, folder: Path, **changes: Any) -> nn.Module:
        model = adapted("native", LlamaForCausalLM.from_pretrained(base))
        trained(model, folder, **changes).save_model(folder / "saved")
        return model

    def test_from_pretrained_of_transformers_continues_as_a_peft_model_would(self, base: Path, tmp_path: Path) -> None:
        before = self.saved(base, tmp_path)
        ours = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="no trainable LoRA layer"):
            find_adapted_layers(ours)
        assert load_adapter(ours, tmp_path / "saved") is ours
        assert torch.equal(logits(ours), logits(before))
        assert all(layer.is_anchored for layer in find_adapted_layers(ours))
        peft = load_adapter(LlamaForCausalLM.from_pretrained(base), tmp_path / "saved")
        for model, name in ((ours, "a"), (peft, "b")):
            assert trained(model, tmp_path / name).lora_ga_report is None
        assert_bitwise(factors(ours), factors(peft))
        for layer in find_adapted_layers(ours):
            old = next(one for one in find_adapted_layers(before) if one.name == layer.name)
            assert torch.equal(layer.stored_B[:, layer.rank :], old.stored_B[:, layer.rank :])  # B0

    def test_an_adapter_without_a_record_continues_as_plain(
        self, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = self.saved(base, tmp_path, init="none")
        ours = load_adapter(LlamaForCausalLM.from_pretrained(tmp_path / "saved"), tmp_path / "saved")
        assert "no lora_ga.json" in caplog.text
        assert record_of_model(ours) is None
        assert torch.equal(logits(ours), logits(before))
        assert len(find_adapted_layers(ours)) == 4

    def test_another_base_is_refused(self, base: Path, tmp_path: Path) -> None:
        self.saved(base, tmp_path)
        other = tiny.llama(seed=9)
        other.load_adapter(str(tmp_path / "saved"), is_trainable=True)
        with pytest.raises(ValueError, match=r"fingerprint"):
            load_adapter(other, tmp_path / "saved")

    def test_another_adapter_in_place_is_refused(self, base: Path, tmp_path: Path) -> None:
        self.saved(base, tmp_path)
        with pytest.raises(ValueError, match=r"rank=4.*does not fit the stored rank 4"):
            load_adapter(adapted("native"), tmp_path / "saved")
        fewer = adapted("native", r=8, lora_alpha=16, target_modules=["q_proj"])
        with pytest.raises(ValueError, match=r"fingerprint"):
            load_adapter(fewer, tmp_path / "saved")

    def test_a_started_adapter_is_not_overwritten(self, base: Path, tmp_path: Path) -> None:
        model = self.saved(base, tmp_path)
        with pytest.raises(ValueError, match=r"has a start of this package already.*new model"):
            load_adapter(model, tmp_path / "saved")


class TestHeads:
    """`modules_to_save` and other trained wrappers of PEFT."""

    @both_kinds
    def test_a_head_is_warmed_up_saved_and_resumed(self, way: str, tmp_path: Path) -> None:
        settings = {"head_warmup_steps": 3, "save_strategy": "steps", "save_steps": 2, "rows": tiny.class_rows(16)}
        lora = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
        ours, peft, again = (adapted(kind, tiny.bert(), **lora) for kind in (way, "wrapped", way))
        trainer = trained(ours, tmp_path / "a", **settings)
        trained(peft, tmp_path / "b", **settings)
        assert_bitwise(factors(ours), factors(peft))
        for left, right in zip(saved_modules(ours), saved_modules(peft), strict=True):
            assert_bitwise(dict(left.state_dict()), dict(right.state_dict()))
        trainer_of(again, tmp_path / "a", **settings).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2")
        )
        assert_bitwise(dict(again.state_dict()), dict(ours.state_dict()))
        trainer.save_model(tmp_path / "saved")
        assert torch.equal(logits(by_peft(tmp_path / "saved", tiny.bert())), logits(ours))

    @both_kinds
    def test_trained_tokens_are_saved_and_resumed(self, way: str, tmp_path: Path) -> None:
        changes = {"trainable_token_indices": {"embed_tokens": [3, 5]}}
        settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        ours, again = (adapted(way, **changes) for _ in range(2))
        trainer = trained(ours, tmp_path, **settings)
        trainer_of(again, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_bitwise(dict(again.state_dict()), dict(ours.state_dict()))
        trainer.save_model(tmp_path / "saved")
        assert torch.equal(logits(by_peft(tmp_path / "saved")), logits(ours))


@pytest.mark.parametrize(
    "fields",
    [
        {"correction": "lora_pro"},
        {"correction": "lora_pro_adamw"},
        {"loraplus_lr_ratio": 4.0},
        {"riemannian_reg": 1e-2, "init": "lora_one"},
        {"init": "none", "correction": "lora_pro"},
    ],
)
@both_kinds
def test_the_optimizers_step_as_on_a_wrapped_model(way: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours, peft = adapted(way), adapted("wrapped")
    for model, name in ((ours, "a"), (peft, "b")):
        trained(model, tmp_path / name, **fields)
    assert_bitwise(factors(ours), factors(peft))


@every_way
def test_without_a_start_the_trainer_is_transformers_own(way: str, tmp_path: Path) -> None:
    ours, twin = adapted(way), adapted(way)
    trained(ours, tmp_path / "a", init="none")
    plain(twin, tmp_path / "b").train()
    assert_bitwise(dict(ours.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("way", ["native", "injected", "inner_native"])
def test_fused_experts_start_and_load(way: str, tmp_path: Path) -> None:
    changes = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    ours, peft, again = (adapted(kind, tiny.qwen3_moe(), **changes) for kind in (way, "wrapped", way))
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer = trained(ours, tmp_path / "a", **settings)
    trained(peft, tmp_path / "b")
    assert_bitwise(factors(ours), factors(peft))
    trainer_of(again, tmp_path / "a", **settings).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_bitwise(dict(again.state_dict()), dict(ours.state_dict()))
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(logits(by_peft(tmp_path / "saved", tiny.qwen3_moe())), logits(ours))


def test_the_second_native_adapter_gets_a_start_of_its_own(tmp_path: Path) -> None:
    model = adapted("native")
    trained(model, tmp_path / "first")
    first = factors(model)
    model.add_adapter(model.peft_config["default"], "two")
    assert record_of_model(model) is None
    trained(model, tmp_path / "second")
    assert all(layer.is_anchored and layer.rank == 4 for layer in find_adapted_layers(model))
    model.save_pretrained(tmp_path / "saved")  # transformers writes the active one, without a folder of its own
    assert read_record(tmp_path / "saved") == record_of_model(model)
    assert torch.equal(logits(by_peft(tmp_path / "saved")), logits(model))
    model.set_adapter("default")
    assert_bitwise(factors(model), first)


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_of_another_name_is_saved_and_resumed(way: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    ours, again = (adapted(way, name="mine") for _ in range(2))
    trained(ours, tmp_path, **settings)
    place = require_adapter(ours).place(tmp_path / "checkpoint-4")
    assert torch.equal(logits(by_peft(place)), logits(ours))
    trainer_of(again, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_bitwise(dict(again.state_dict()), dict(ours.state_dict()))


def test_a_model_init_may_make_native_adapters(tmp_path: Path) -> None:
    trainers = [
        LoRAGATrainer(
            args=tiny.arguments(tmp_path),
            train_dataset=ROWS,
            model_init=model_init,
            lora_ga_config=LoRAGAConfig(num_samples=8),
        )
        for model_init in (lambda: adapted("native"), lambda: adapted("wrapped"))
    ]
    for trainer in trainers:
        trainer.train()
    assert_bitwise(factors(trainers[0].model), factors(trainers[1].model))


class Towers(nn.Module):
    """Two models side by side, each with an adapter of its own."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        for tower in (self.left, self.right):
            out = tower(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return out


class TestRefusals:
    def test_two_active_adapters(self, tmp_path: Path) -> None:
        model = adapted("native")
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "two")
        model.set_adapter(["default", "two"])
        with pytest.raises(ValueError, match=r"\['default', 'two'\] are active at once.*set_adapter"):
            trainer_of(model, tmp_path)

    def test_two_active_adapters_of_a_mixed_model(self, tmp_path: Path) -> None:
        model = adapted("mixed")
        model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter(["default", "two"])
        with pytest.raises(ValueError, match=r"active at once.*set_adapter"):
            trainer_of(model, tmp_path)

    def test_adapters_in_two_places(self, tmp_path: Path) -> None:
        model = Towers(adapted("wrapped"), adapted("native"))
        with pytest.raises(ValueError, match=r"Towers holds adapters in 2 separate modules \('left' and 'right'\)"):
            trainer_of(model, tmp_path)
        trained(model, tmp_path, init="none")

    def test_of_two_places_one_may_be_frozen(self, tmp_path: Path) -> None:
        model = Towers(adapted("wrapped").requires_grad_(False), adapted("native"))
        trainer = trained(model, tmp_path)
        assert trainer.lora_ga_report.metrics()["lora_ga/layers_initialised"] == 4
        assert find_host(model).name == "right"

    @pytest.mark.parametrize("way", ["native", "injected"])
    def test_another_kind_of_adapter(self, way: str, tmp_path: Path) -> None:
        model = WAYS[way](tiny.llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
        with pytest.raises(ValueError, match=r"'default' is of type .*IA3, not LoRA.*init='none'"):
            trainer_of(model, tmp_path)

    def test_a_mixed_model_whose_active_adapter_is_another(self, tmp_path: Path) -> None:
        from peft import LoHaConfig

        model = adapted("mixed")
        model.add_adapter("other", LoHaConfig(r=2, target_modules=["k_proj"]))
        model.set_adapter("other")
        with pytest.raises(ValueError, match=r"'other' is of type .*LOHA, not LoRA"):
            trainer_of(model, tmp_path)

    @both_kinds
    def test_a_config_beside_an_adapter(self, way: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"peft_config.*has an adapter already.*one of the two"):
            LoRAGATrainer(
                adapted(way),
                tiny.arguments(tmp_path),
                train_dataset=ROWS,
                peft_config=LoraConfig(target_modules=["q_proj"]),
            )

    @both_kinds
    def test_a_trained_adapter(self, way: str, tmp_path: Path) -> None:
        model = adapted(way)
        plain(model, tmp_path).train()
        with pytest.raises(ValueError, match=r"'default' is already trained"):
            trainer_of(model, tmp_path)

    def test_a_disabled_adapter(self, tmp_path: Path) -> None:
        model = adapted("native")
        model.disable_adapters()
        with pytest.raises(ValueError, match=r"no trainable LoRA layer"):
            trainer_of(model, tmp_path)

    def test_a_module_that_hands_attributes_through_is_not_taken_for_the_host(self) -> None:
        class Transparent(native.Outer):
            def __getattr__(self, name: str) -> Any:
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(self.inner, name)

        for way in ("wrapped", "native"):
            model = Transparent(adapted(way))
            assert model.peft_config
            assert require_adapter(model).name == "inner"


def test_peft_is_what_is_on_top_where_it_is(tmp_path: Path) -> None:
    """The base inside a `PeftModel` holds the configs too; the names must be those of the whole."""
    model = adapted("wrapped")
    assert (require_adapter(model).name, require_adapter(model).owner) == ("", model)
    assert isinstance(model, PeftModel)
