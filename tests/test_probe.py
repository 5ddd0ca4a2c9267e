"""The probe gives the gradient of the whole sample, whatever the batching, and leaves no trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import tiny
import torch
from peft import PeftModel
from spy import Spy
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from lora_ga_trainer import LoRAGAConfig, estimate_gradients
from lora_ga_trainer.adapters.find import find_adapted_layers
from lora_ga_trainer.engines.devices import preserved_rng
from lora_ga_trainer.gradients.estimate import NonFiniteGradient


def exact(**changes: Any) -> LoRAGAConfig:
    return LoRAGAConfig(**({"estimator": "exact", "num_samples": 9, "probe_order": "train"} | changes))


def in_order(rows: list[dict[str, Any]], folder: Any, model: nn.Module, **changes: Any) -> Trainer:
    """A trainer that visits `rows` from first to last, prepared as `train` would prepare it."""
    settings = {"train_sampling_strategy": "sequential"} | changes
    collator = settings.pop("data_collator", None)
    loss = settings.pop("compute_loss_func", None)
    trainer = Trainer(
        model,
        tiny.arguments(folder, **settings),
        train_dataset=rows,
        data_collator=collator,
        compute_loss_func=loss,
    )
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def probe(trainer: Trainer, config: LoRAGAConfig, **changes: Any) -> dict[str, Tensor]:
    estimate = estimate_gradients(trainer, config, **changes)
    return {name: estimator.state()["G"].double() for name, estimator in estimate.estimators.items()}


def stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def causal_loss(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """The mean over all label tokens, written out: position i predicts token i + 1."""
    batch = stack(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def class_loss(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    batch = stack(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits, batch["labels"])


def assert_equal_gradients(found: dict[str, Tensor], true: dict[str, Tensor], rtol: float = 2e-6) -> None:
    assert found.keys() == true.keys()
    for name, G in true.items():
        error = (found[name] - G).norm() / G.norm()
        assert error < rtol, f"{name}: relative error {error:.2e}"


FAMILIES = {
    "llama": (tiny.llama, tiny.causal_rows, causal_loss, {}),
    "gpt2": (tiny.gpt2, tiny.causal_rows, causal_loss, {"fan_in_fan_out": True}),
    # Accepts `num_items_in_batch` and ignores it: only the probe's own weighting makes micro-batches add up.
    "bert": (tiny.bert, tiny.class_rows, class_loss, {"task_type": "SEQ_CLS"}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [9, 5, 4, 2, 1])
def test_equals_one_gradient_of_the_whole_sample(family: str, batch_size: int, tmp_path: Any) -> None:
    make, rows, loss, lora = FAMILIES[family]
    rows = rows(9)
    plain, adapted = make().eval(), tiny.with_lora(make(), **lora)
    if family == "bert":  # the trained copy of the head, not the original, is what the probe runs
        plain.classifier.load_state_dict(adapted.classifier.modules_to_save["default"].state_dict())
    trainer = in_order(rows, tmp_path, adapted, per_device_train_batch_size=batch_size)
    found = probe(trainer, exact())
    true = reference.whole_sample_gradient(plain, list(found), lambda: loss(plain, rows))
    assert_equal_gradients(found, true)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_ragged_micro_batches_are_weighted_by_their_items(family: str, tmp_path: Any) -> None:
    """Micro-batches of 3, 5 and 1 samples with label counts that differ."""
    make, rows, loss, lora = FAMILIES[family]
    rows = rows(9)
    plain, adapted = make().eval(), tiny.with_lora(make(), **lora)
    if family == "bert":
        plain.classifier.load_state_dict(adapted.classifier.modules_to_save["default"].state_dict())
    trainer = in_order(rows, tmp_path, adapted)

    class Ragged:
        def __iter__(self) -> Any:
            return iter([stack(rows[:3]), stack(rows[3:8]), stack(rows[8:])])

    trainer.get_train_dataloader = Ragged
    found = probe(trainer, exact())
    assert_equal_gradients(found, reference.whole_sample_gradient(plain, list(found), lambda: loss(plain, rows)))


def test_a_module_used_three_times_sums(tmp_path: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(6, 6)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            y = x
            for _ in range(3):
                y = torch.tanh(self.step(y))
            return {"loss": nn.functional.mse_loss(y, labels)}

    torch.manual_seed(0)
    plain = Recurrent()
    rows = [{"x": torch.randn(6), "labels": torch.randn(6)} for _ in range(8)]
    trainer = in_order(rows, tmp_path, tiny.with_lora(copy.deepcopy(plain), target_modules=["step"]))
    found = probe(trainer, exact(num_samples=8))
    batch = stack(rows)
    true = reference.whole_sample_gradient(plain, ["step"], lambda: plain(batch["x"], batch["labels"])["loss"])
    assert_equal_gradients(found, true)


def test_seq2seq_reaches_encoder_and_decoder(tmp_path: Any) -> None:
    rows = tiny.causal_rows(8)
    plain = tiny.t5().eval()
    trainer = in_order(rows, tmp_path, tiny.with_lora(tiny.t5(), target_modules=["q", "k", "v", "o", "wi", "wo"]))
    found = probe(trainer, exact(num_samples=8))
    assert any("decoder" in name for name in found)
    batch = stack(rows)

    def loss() -> Tensor:
        logits = plain(**batch).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    assert_equal_gradients(found, reference.whole_sample_gradient(plain, list(found), loss))


def test_label_smoothing_and_custom_losses_count(tmp_path: Any) -> None:
    rows = tiny.causal_rows(8)
    plain = tiny.llama().eval()
    smooth = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()), label_smoothing_factor=0.2)
    found = probe(smooth, exact(num_samples=8))

    def smoothed() -> Tensor:
        batch = stack(rows)
        logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)

    assert_equal_gradients(found, reference.whole_sample_gradient(plain, list(found), smoothed))

    def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return 2 * nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    custom = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()), compute_loss_func=doubled)
    twice = reference.whole_sample_gradient(plain, list(found), lambda: 2 * causal_loss(plain, rows))
    assert_equal_gradients(probe(custom, exact(num_samples=8)), twice)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, tmp_path: Any) -> None:
    rows = tiny.causal_rows(8)
    plain = tiny.llama().eval()
    adapted = tiny.with_lora(tiny.llama())
    tiny.checkpoint_activations(adapted, use_reentrant=reentrant)
    if reentrant:
        adapted.enable_input_require_grads()
    found = probe(in_order(rows, tmp_path, adapted), exact(num_samples=8))
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows))
    assert_equal_gradients(found, true)


@pytest.mark.parametrize("reference_first", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_that_switches_the_adapter_off_and_on_leaves_no_gradients(
    checkpointing: bool, reference_first: bool, tmp_path: Any
) -> None:
    """PEFT then lets the adapter's parameters require grad again, before or after the forward of the policy."""

    class Distant(Trainer):
        def reference(self, inputs: Any) -> Tensor:
            with torch.no_grad(), self.model.disable_adapter():
                return self.model(**inputs).logits

        def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
            held = self.reference(inputs) if reference_first else None
            outputs = model(**inputs)
            held = held if reference_first else self.reference(inputs)
            return outputs.loss + (outputs.logits - held).square().sum()

    rows = tiny.causal_rows(8, ragged=False)
    plain, adapted = tiny.llama().eval(), tiny.with_lora(tiny.llama())
    if checkpointing:
        tiny.checkpoint_activations(adapted, use_reentrant=False)
    trainer = Distant(
        adapted,
        tiny.arguments(tmp_path, train_sampling_strategy="sequential", per_device_train_batch_size=2),
        train_dataset=rows,
    )
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    before = Spy(trainer)
    found = probe(trainer, exact(num_samples=8))
    before.assert_same(Spy(trainer))
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows))
    assert_equal_gradients(found, true)


def test_accumulation_does_not_matter(tmp_path: Any) -> None:
    rows = tiny.causal_rows(16)
    once = probe(in_order(rows, tmp_path, tiny.with_lora(tiny.llama())), exact(num_samples=16))
    trainer = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()), gradient_accumulation_steps=3)
    assert_equal_gradients(probe(trainer, exact(num_samples=16)), once)


def test_compiled_model_is_probed_eagerly(tmp_path: Any) -> None:
    rows = tiny.causal_rows(8)
    plain = tiny.llama().eval()
    adapted = tiny.with_lora(tiny.llama())
    adapted.compile(backend="aot_eager")
    found = probe(in_order(rows, tmp_path, adapted), exact(num_samples=8))
    assert_equal_gradients(
        found, reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows))
    )


def test_bf16_is_as_close_to_the_truth_as_the_weight_gradient(tmp_path: Any) -> None:
    """The fp32 gradient is the truth; summing micro-batches in fp32 must not be worse than autograd's bf16 `.grad`."""
    rows = tiny.causal_rows(16)
    plain = tiny.llama().eval()
    adapted = tiny.with_lora(tiny.llama()).to(torch.bfloat16)
    found = probe(in_order(rows, tmp_path, adapted, bf16=True), exact(num_samples=16))
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows))
    half = tiny.llama().to(torch.bfloat16).eval()
    theirs = reference.whole_sample_gradient(half, list(found), lambda: causal_loss(half, rows))
    ours_off = torch.stack([(found[n] - true[n]).norm() / true[n].norm() for n in true])
    theirs_off = torch.stack([(theirs[n] - true[n]).norm() / true[n].norm() for n in true])
    assert ours_off.mean() < 1.05 * theirs_off.mean()
    assert ours_off.max() < 0.05


def test_fp16_scales_the_loss_so_that_small_gradients_survive(tmp_path: Any, monkeypatch: Any) -> None:
    """Output-gradients of order 1e-8 vanish in unscaled fp16, whose smallest positive number is 6e-8."""
    rows = tiny.causal_rows(8)

    def small(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return 1e-5 * nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    plain = tiny.llama().eval()
    adapted = tiny.with_lora(tiny.llama()).to(torch.float16)
    trainer = in_order(rows, tmp_path, adapted, compute_loss_func=small)
    found = probe(trainer, exact(num_samples=8))
    true = reference.whole_sample_gradient(plain, list(found), lambda: 1e-5 * causal_loss(plain, rows))
    # Forward and backward in fp16 round by 2^-11 at each of some tens of operations.
    assert_equal_gradients(found, true, rtol=0.02)
    monkeypatch.setattr("lora_ga_trainer.gradients.probe.FP16_LOSS_SCALES", (1.0,))
    unscaled = probe(trainer, exact(num_samples=8))
    name = "model.layers.0.self_attn.q_proj"
    assert (unscaled[name] - true[name]).norm() > 0.2 * true[name].norm()


def test_fp16_overflow_lowers_the_loss_scale(tmp_path: Any) -> None:
    """A loss a thousand times the usual overflows fp16 at scale 2^16; the probe finds a smaller scale by itself."""
    rows = tiny.causal_rows(8)

    def large(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return 1e3 * nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    plain = tiny.llama().eval()
    adapted = tiny.with_lora(tiny.llama()).to(torch.float16)
    found = probe(in_order(rows, tmp_path, adapted, compute_loss_func=large), exact(num_samples=8))
    true = reference.whole_sample_gradient(plain, list(found), lambda: 1e3 * causal_loss(plain, rows))
    assert_equal_gradients(found, true, rtol=0.02)


def test_num_samples_is_reached_at_the_end_of_a_batch(tmp_path: Any) -> None:
    rows = tiny.causal_rows(16)
    plain = tiny.llama().eval()
    trainer = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()), per_device_train_batch_size=4)
    estimate = estimate_gradients(trainer, exact(num_samples=6), find_adapted_layers(trainer.model))
    found = {name: estimator.state()["G"].double() for name, estimator in estimate.estimators.items()}
    assert estimate.samples == 8
    assert estimate.items == sum(int(row["labels"][1:].ne(-100).sum()) for row in rows[:8])
    assert_equal_gradients(
        found, reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows[:8]))
    )


def test_a_short_dataset_is_used_whole_and_said_so(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = tiny.causal_rows(7)
    trainer = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()))
    with caplog.at_level("WARNING", logger="lora_ga_trainer"):
        estimate = estimate_gradients(trainer, exact(num_samples=64), find_adapted_layers(trainer.model))
    assert estimate.samples == 7
    assert "7 of the 64" in caplog.text


def test_probe_dataset_stands_in_for_the_train_dataset(tmp_path: Any) -> None:
    rows, others = tiny.causal_rows(8), tiny.causal_rows(8, seed=9)
    plain = tiny.llama().eval()
    trainer = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()))
    found = probe(trainer, exact(num_samples=8), probe_dataset=others)
    assert trainer.train_dataset is rows
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, others))
    assert_equal_gradients(found, true)


@pytest.mark.parametrize("fails", [False, True])
def test_gives_everything_back(fails: bool, tmp_path: Any) -> None:
    adapted = tiny.with_lora(
        tiny.bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1), lora_dropout=0.3, task_type="SEQ_CLS"
    )
    adapted.eval()
    trainer = in_order(tiny.class_rows(16), tmp_path, adapted, dataloader_num_workers=0)
    next(adapted.parameters()).grad = torch.ones_like(next(adapted.parameters()))
    if fails:
        compute, calls = trainer.compute_loss, []

        def failing(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return compute(*args, **kwargs)

        trainer.compute_loss = failing
    before = Spy(trainer)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            probe(trainer, exact())
    else:
        probe(trainer, exact())
    before.assert_same(Spy(trainer))


def test_neftune_adds_no_noise_to_the_probe(tmp_path: Any) -> None:
    """The noise of one draw is not the sample's; it is back for training."""
    rows, plain, found = tiny.causal_rows(8), tiny.llama().eval(), {}

    class AtBegin(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            embedding, ids = trainer.model.get_input_embeddings().train(), rows[0]["input_ids"][None]
            assert not torch.equal(embedding(ids), embedding(ids))
            found.update(probe(trainer, exact(num_samples=8)))
            assert not torch.equal(embedding(ids), embedding(ids))

    trainer = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()), neftune_noise_alpha=5, max_steps=1)
    trainer.add_callback(AtBegin())
    trainer.train()
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows))
    assert found
    assert_equal_gradients(found, true)


def test_a_device_with_one_generator_gets_it_back(monkeypatch: Any) -> None:
    """torch.mps has `get_rng_state` and no `get_rng_state_all`."""
    state = [torch.zeros(3)]
    device = SimpleNamespace(get_rng_state=lambda: state[0].clone(), set_rng_state=lambda new: state.append(new))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: device)
    with preserved_rng():
        state[0].fill_(1.0)
    assert torch.equal(state[1], torch.zeros(3))


def test_batch_norm_statistics_do_not_move(tmp_path: Any) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.mse_loss(self.linear(self.norm(x)), labels)}

    rows = [{"x": torch.randn(6), "labels": torch.randn(3)} for _ in range(8)]
    trainer = in_order(rows, tmp_path, tiny.with_lora(Normed(), target_modules=["linear"]))
    before = [buffer.clone() for buffer in trainer.model.buffers()]
    probe(trainer, exact(num_samples=8))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.buffers(), strict=True))


class Rows(IterableDataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_a_stream_that_starts_over_is_probed(tmp_path: Any) -> None:
    rows = tiny.causal_rows(16)
    plain = tiny.llama().eval()
    trainer = in_order(Rows(rows), tmp_path, tiny.with_lora(tiny.llama()))
    found = probe(trainer, exact(num_samples=8))
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows[:8]))
    assert_equal_gradients(found, true)


def test_a_stream_that_is_used_up_is_refused(tmp_path: Any) -> None:
    stream = iter(tiny.causal_rows(32))

    class Once(IterableDataset):
        def __iter__(self) -> Any:
            yield from stream

    trainer = in_order(Once(), tmp_path, tiny.with_lora(tiny.llama()))
    with pytest.raises(ValueError, match=r"does not start over.*probe_dataset"):
        probe(trainer, exact(num_samples=8))
    found = probe(trainer, exact(num_samples=8), probe_dataset=tiny.causal_rows(8))
    assert all(G.norm() > 0 for G in found.values())


def test_an_unreached_layer_is_named(tmp_path: Any) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": nn.functional.mse_loss(self.used(x), labels)}

    rows = [{"x": torch.randn(6), "labels": torch.randn(3)} for _ in range(8)]
    trainer = in_order(rows, tmp_path, tiny.with_lora(Half(), target_modules=["used", "unused"]))
    with pytest.raises(ValueError, match=r"never reaches 1 adapted layers: unused.*allow_unreached=True"):
        probe(trainer, exact(num_samples=8, allow_unreached=False))
    estimate = estimate_gradients(trainer, exact(num_samples=8), find_adapted_layers(trainer.model))
    assert estimate.unreached == ["unused"]


def poison(model: PeftModel, call: int) -> str:
    """Make the `call`-th forward of the second layer's gate give one NaN gradient; return the layer's name."""
    name = "model.layers.1.mlp.gate_proj"
    module = model.get_base_model().get_submodule(name)
    calls = []

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            output.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("nan")))
        return output

    module.register_forward_hook(hook)
    return name


def test_a_non_finite_gradient_names_batch_and_layer(tmp_path: Any) -> None:
    trainer = in_order(tiny.causal_rows(16), tmp_path, tiny.with_lora(tiny.llama()))
    name = poison(trainer.model, call=3)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(NonFiniteGradient, match=f"Probe batch 2.*{name}"):
        probe(trainer, exact(num_samples=16))
    assert all(torch.equal(value, trainer.model.state_dict()[key]) for key, value in before.items())


def test_a_non_finite_loss_names_the_batch(tmp_path: Any) -> None:
    def poisoned(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        bad = (labels == -1).any()
        return outputs.logits.square().mean() * (float("inf") if bad else 1.0)

    rows = tiny.causal_rows(12)
    rows[9]["labels"][-1] = -1
    trainer = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()), compute_loss_func=poisoned)
    with pytest.raises(NonFiniteGradient, match=r"Probe batch 2: the loss is inf"):
        probe(trainer, exact(num_samples=12))


def test_only_ignored_labels_is_an_error(tmp_path: Any) -> None:
    rows = tiny.causal_rows(8)
    for row in rows:
        row["labels"].fill_(-100)
    trainer = in_order(rows, tmp_path, tiny.with_lora(tiny.llama()))
    with pytest.raises(ValueError, match="hold no label"):
        probe(trainer, exact(num_samples=8))


def test_a_batch_of_ignored_labels_weighs_nothing(tmp_path: Any) -> None:
    rows = tiny.causal_rows(12)
    for row in rows[4:8]:
        row["labels"].fill_(-100)
    plain = tiny.llama().eval()
    found = probe(in_order(rows, tmp_path, tiny.with_lora(tiny.llama())), exact(num_samples=12))
    true = reference.whole_sample_gradient(plain, list(found), lambda: causal_loss(plain, rows))
    assert_equal_gradients(found, true)


def test_no_test_matrix_outlives_the_probe(tmp_path: Any) -> None:
    from lora_ga_trainer.gradients import accumulator as sketch

    trainer = in_order(tiny.causal_rows(8), tmp_path, tiny.with_lora(tiny.llama(), r=1))
    estimate = estimate_gradients(trainer, LoRAGAConfig(num_samples=8, sketch_size=2, min_energy_kept=None))
    assert any(estimator.sketched for estimator in estimate.estimators.values())
    assert sketch.gaussian.cache_info().currsize == 0
    assert sketch.cast.cache_info().currsize == 0
