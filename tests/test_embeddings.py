"""Embeddings start, anchor, save and merge by the laws of linear layers, of one-hot inputs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import reference
import tiny
import torch
from peft import PeftModel
from test_probe import assert_equal_gradients, causal_loss, exact, in_order, probe
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from lora_ga_trainer import (
    LoRAGAConfig,
    LoRAGATrainer,
    estimate_gradients,
    export_adapter,
    find_adapted_layers,
    load_adapter,
)
from lora_ga_trainer.adapters.layer import AdaptedLayer
from lora_ga_trainer.adapters.storage import anchored_parameter_names, counted_norm
from lora_ga_trainer.gradients.accumulator import ExactGradient
from lora_ga_trainer.gradients.moments import MomentSums
from lora_ga_trainer.gradients.rows import OneHot
from lora_ga_trainer.gradients.sketch import SketchedGradient, turn
from lora_ga_trainer.maths.inits import INITS, Init
from lora_ga_trainer.starts.prepare import prepare_adapter


# PEFT saves an adapted embedding's base weight beside the adapter, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")

IDS, WIDTH, PADDING = 13, 6, 2
EMBEDDINGS: dict[str, Any] = {
    "plain": lambda: nn.Embedding(IDS, WIDTH),
    "padding": lambda: nn.Embedding(IDS, WIDTH, padding_idx=PADDING - IDS),
    "scaled": lambda: Gemma3TextScaledWordEmbedding(IDS, WIDTH, padding_idx=PADDING, embed_scale=2.5),
    "scaled by a number": lambda: BartScaledWordEmbedding(IDS, WIDTH, padding_idx=PADDING, embed_scale=0.3),
}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = EMBEDDINGS[kind]()
        self.hidden, self.head = nn.Linear(WIDTH, 7), nn.Linear(7, 4)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.hidden(self.embed(ids))).mean(1))
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def rows(count: int = 9) -> list[dict[str, Any]]:
    """Every row has an id twice, and some the one that pads."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(count):
        ids = torch.randint(0, IDS, (5,), generator=generator)
        ids[3] = ids[0]
        if i % 2:
            ids[4] = PADDING
        found.append({"ids": ids, "labels": i % 4})
    return found


def inputs() -> Tensor:
    return torch.stack([row["ids"] for row in rows()])


def with_lora(model: nn.Module, **changes: Any) -> PeftModel:
    return tiny.with_lora(model, **({"r": 2, "target_modules": ["embed", "hidden"]} | changes))


def embedding_of(model: nn.Module) -> AdaptedLayer:
    return next(layer for layer in find_adapted_layers(model) if layer.name.startswith("embed"))


def trained(folder: Any, kind: str = "padding", lora: dict[str, Any] | None = None, **changes: Any) -> LoRAGATrainer:
    config = LoRAGAConfig(num_samples=8, estimator="exact", init=changes.pop("init", "lora_ga"))
    trainer = LoRAGATrainer(
        with_lora(Net(kind), **(lora or {})),
        tiny.arguments(folder, **({"learning_rate": 1e-2} | changes)),
        train_dataset=rows(16),
        lora_ga_config=config,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model.eval()(inputs())["logits"]


# ---- The gradient


@pytest.mark.parametrize("batch_size", [9, 4, 1])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_the_gradient_is_that_of_autograd(kind: str, batch_size: int, tmp_path: Any) -> None:
    model = Net(kind).double()
    lora = {"use_dora": batch_size == 4}  # which starts at factors of 1
    trainer = in_order(
        rows(), tmp_path, with_lora(copy.deepcopy(model), **lora), per_device_train_batch_size=batch_size
    )
    found = probe(trainer, exact(), layers=find_adapted_layers(trainer.model))
    labels = torch.tensor([row["labels"] for row in rows()])
    loss = model(inputs(), labels)["loss"]
    of_embed, of_hidden = torch.autograd.grad(loss, [model.embed.weight, model.hidden.weight])
    assert_equal_gradients(found, {"embed": of_embed.T, "hidden": of_hidden}, rtol=1e-6)
    if kind != "plain":
        assert not found["embed"][:, PADDING].any()
        assert (inputs() == PADDING).any()


class Penalised(Net):
    """Adds the square of the loss's gradient at what the embedding gives."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        embedded = self.embed(ids)
        logits = self.head(torch.tanh(self.hidden(embedded)).mean(1))
        loss = nn.functional.cross_entropy(logits, labels)
        (inner,) = torch.autograd.grad(loss, embedded, create_graph=True)
        return {"loss": loss + 3 * inner.square().sum()}


@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_a_gradient_penalty_counts_to_the_second_order(kind: str, tmp_path: Any) -> None:
    model = Penalised(kind).double()
    trainer = in_order(rows(), tmp_path, with_lora(copy.deepcopy(model)), per_device_train_batch_size=9)
    found = probe(trainer, exact(), layers=find_adapted_layers(trainer.model))
    loss = model(inputs(), torch.tensor([row["labels"] for row in rows()]))["loss"]
    of_embed, of_hidden = torch.autograd.grad(loss, [model.embed.weight, model.hidden.weight])
    assert_equal_gradients(found, {"embed": of_embed.T, "hidden": of_hidden}, rtol=1e-6)


def test_an_init_sees_how_often_each_id_stood(tmp_path: Any, monkeypatch: Any) -> None:
    needs = frozenset({"second_moments"})
    init = Init("of this test", 1.0, anchored=False, pairs=1, factors=lambda gradient: None, needs=needs)
    monkeypatch.setitem(INITS, "counting", init)
    trainer = in_order(rows(), tmp_path, with_lora(Net("padding")), per_device_train_batch_size=4)
    moments = estimate_gradients(trainer, exact(init="counting", num_samples=9)).moments["embed"]
    kept = inputs()[inputs() != PADDING]
    assert moments.tokens == len(kept)
    torch.testing.assert_close(moments.input_second_moments, torch.bincount(kept, minlength=IDS) / len(kept))


def one_hot_data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids `(N,)`, the same as a matrix `(N, in)`, and `dy (N, out)`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (400,), generator=generator)
    return ids, nn.functional.one_hot(ids, 90).float(), torch.randn(400, 50, generator=generator)


@pytest.mark.parametrize("make", [lambda: ExactGradient((50, 90)), lambda: SketchedGradient((50, 90), 12)])
def test_ids_add_up_as_their_one_hot_rows_do(make: Any) -> None:
    of_ids, of_matrix = make(), make()
    for seed in range(2):
        ids, x, dy = one_hot_data(seed)
        of_ids.add(OneHot(ids), dy, 0.7)
        of_matrix.add(x, dy, 0.7)
        if of_ids.sketched:
            turn([of_ids])
            turn([of_matrix])
    for one, other in zip(of_ids.svd(4), of_matrix.svd(4), strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-3, atol=1e-4)
    for one, other in zip(of_ids.sums(), of_matrix.sums(), strict=True):
        torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-4, atol=1e-3)


def test_second_moments_of_ids_are_those_of_their_one_hot_rows() -> None:
    needs = frozenset({"second_moments", "covariance_directions"})
    of_ids, of_matrix = (MomentSums((50, 90), needs, 3, 0) for _ in range(2))
    ids, x, dy = one_hot_data()
    of_ids.add(OneHot(ids), dy, 2.0, 0.5)
    of_matrix.add(x, dy, 2.0, 0.5)
    for one, other in zip(of_ids.sums(), of_matrix.sums(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    counts = torch.bincount(ids, minlength=90) / len(ids)
    torch.testing.assert_close(of_ids.finish().input_second_moments, counts)


def test_bf16_gradients_are_summed_in_fp32() -> None:
    ids, total = torch.zeros(1000, dtype=torch.long), ExactGradient((1, 2))
    total.add(OneHot(ids), torch.ones(1000, 1, dtype=torch.bfloat16), 1.0)
    assert total.G[0, 0] == 1000  # in bf16 the sum stops at 256


# ---- Anchoring


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_the_output_starts_at_the_base(kind: str, tmp_path: Any) -> None:
    model = trained(tmp_path, kind, max_steps=1, learning_rate=0.0).model
    assert torch.equal(output(model), output(Net(kind)))
    assert all(
        layer.is_anchored and layer.stored_A.any() and layer.stored_B.any() for layer in find_adapted_layers(model)
    )


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_halves_stay_tied_and_b0_and_the_base_fixed(kind: str, tmp_path: Any) -> None:
    before = embedding_of(trained(tmp_path, kind, max_steps=1, learning_rate=0.0).model)
    model = trained(tmp_path, kind, weight_decay=0.1, max_grad_norm=0.01).model
    layer, r = embedding_of(model), before.rank
    moved = layer.stored_A.detach() - before.stored_A.detach()
    assert moved.any()
    torch.testing.assert_close(moved[:r], moved[r:], rtol=0, atol=1e-6)
    assert torch.equal(layer.stored_B[:, r:], before.stored_B[:, r:])
    assert not torch.equal(layer.stored_B[:, :r], before.stored_B[:, :r])
    assert torch.equal(layer.weight, Net(kind).embed.weight)


def started(kind: str, pads: float = 0.0) -> tuple[nn.Module, AdaptedLayer, Tensor, Tensor]:
    """
    A net in fp64 whose embedding alone is adapted, with a random start `B0 (6, 2)`, `A0 (2, 13)`.

    `pads` is the column of the id that pads; it is 0 in a start from `G`, whose column is.
    """
    model = with_lora(Net(kind), target_modules=["embed"]).double()
    prepare_adapter(model, LoRAGAConfig())
    layer = embedding_of(model)
    generator = torch.Generator().manual_seed(3)
    B0 = torch.randn(WIDTH, 2, generator=generator, dtype=torch.float64)
    A0 = torch.randn(2, IDS, generator=generator, dtype=torch.float64)
    if Net(kind).embed.padding_idx is not None:
        A0[:, PADDING] = pads
    tiny.write_start(layer, B0, A0)
    return model, layer, B0, A0


@pytest.mark.parametrize("steps", [1, 100])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_equals_lora_ga_on_a_changed_base(kind: str, steps: int) -> None:
    model, layer, B0, A0 = started(kind)
    plain = Net(kind).double()
    target = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def loss(weight: Tensor) -> Tensor:  # (out, in)
        net = {"embed.weight": weight.T}
        return (torch.func.functional_call(plain, net, (inputs(),))["logits"] - target).square().sum()

    optimizer = torch.optim.AdamW([layer.stored_A, layer.stored_B], lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        (model(inputs())["logits"] - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    W = plain.embed.weight.detach().T
    net = layer.s * (layer.stored_B @ layer.stored_A).detach()
    theirs = reference.lora_ga_offset_training(W, B0, A0, layer.s, loss, steps, lr=1e-2) - W
    if steps == 100:
        assert net.norm() > 0.1 * W.norm(), "the test must move the weight"
    assert (net - theirs).norm() < 1e-12 * W.norm()


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_equals_plain_peft_on_a_changed_base_whatever_the_column_that_pads(kind: str) -> None:
    """PEFT gives `B` a gradient from ids that pad, and `A` none."""
    model, _, B0, A0 = started(kind, pads=0.7)
    plain = with_lora(Net(kind), target_modules=["embed"]).double()
    twin = embedding_of(plain)
    tiny.write_start(twin, B0, A0)
    with torch.no_grad():
        twin.weight.sub_(twin.s * (B0 @ A0).T)
    for one in (model, plain):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for _ in range(20):
            one(inputs())["logits"].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = output(plain) - output(Net(kind).double())
    assert moved.norm() > 0.1
    torch.testing.assert_close(output(model), output(plain), rtol=1e-11, atol=1e-11)


def test_the_norm_counts_the_gradient_of_a_once() -> None:
    model, layer, _, _ = started("plain")
    model(inputs())["logits"].square().sum().backward()
    A, B = layer.stored_A.grad, layer.stored_B.grad
    assert torch.equal(A[:2], A[2:])
    assert not B[:, 2:].any()
    true = math.sqrt(A[:2].square().sum().item() + B[:, :2].square().sum().item())
    assert counted_norm(model).item() == pytest.approx(true, rel=1e-12)


def test_parameters_are_the_leaves_that_are_named() -> None:
    model, layer, _, _ = started("plain")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert anchored_parameter_names(model) == names
    for copied in (model, copy.deepcopy(model)):
        for name, parameter in copied.named_parameters():
            assert copied.get_parameter(name) is parameter
            assert copied.state_dict(keep_vars=True)[name] is parameter
    factors = layer.module.lora_embedding_A
    assert factors["default"] is factors.default is layer.stored_A
    assert dict(factors.items())["default"] is layer.stored_A


def test_compiles_to_one_graph() -> None:
    _, layer, _, _ = started("plain")
    explained = torch._dynamo.explain(layer.module)(inputs())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_what_is_not_started_trains_as_plain_lora(tmp_path: Any) -> None:
    """PEFT starts an embedding at A = 0 with a random B. In delta form this is `[0; 0]`, `[0, B]`."""
    plain = with_lora(Net("plain"), target_modules=["embed"]).double()
    anchored = copy.deepcopy(plain)
    prepare_adapter(anchored, LoRAGAConfig())
    for model in (plain, anchored):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for _ in range(20):
            model(inputs())["logits"].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.allclose(output(plain), output(Net("plain").double()), rtol=1e-2)
    torch.testing.assert_close(output(anchored), output(plain), rtol=1e-12, atol=1e-12)


# ---- Adapters


@pytest.mark.parametrize("init", ["lora_ga", "lora_one"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"embed": 3}}])
@pytest.mark.parametrize("kind", ["padding", "scaled"])
def test_saved_adapters_load_here_and_in_plain_peft_and_merge(
    kind: str, lora: dict[str, Any], init: str, tmp_path: Any
) -> None:
    model = trained(tmp_path / "run", kind, lora, init=init).model
    expected = output(model)
    assert not torch.allclose(expected, output(Net(kind)), atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(output(model), output(Net(kind)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(PeftModel.from_pretrained(Net(kind), tmp_path / "saved")), expected)
    again = load_adapter(Net(kind), tmp_path / "saved")
    assert torch.equal(output(again), expected)
    assert all(layer.is_anchored == (init == "lora_ga") for layer in find_adapted_layers(again))
    export_adapter(model, tmp_path / "exported", 4)
    exported = PeftModel.from_pretrained(Net(kind), tmp_path / "exported")
    torch.testing.assert_close(output(exported), expected, rtol=1e-5, atol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_lora_one_starts_by_a_step_against_the_gradient(kind: str, tmp_path: Any) -> None:
    """`s B0 A0` is the best rank-r part of `-G`, of the size that `gamma` says; DoRA's magnitude follows."""
    for lora in ({}, {"use_dora": True}):
        model = trained(tmp_path, kind, lora, init="lora_one", max_steps=1, learning_rate=0.0).model
        layer, found = embedding_of(model), {}
        W = Net(kind).embed.weight.detach().T
        moved = W + layer.s * (layer.stored_B @ layer.stored_A).detach()
        found["embed.weight"] = moved.T
        with torch.no_grad():
            hidden = find_adapted_layers(model)[1]
            found["hidden.weight"] = hidden.weight + hidden.s * hidden.stored_B @ hidden.stored_A
            expected = torch.func.functional_call(Net(kind), found, (inputs(),))["logits"]
        torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)


def test_resuming_gives_the_same_run(tmp_path: Any) -> None:
    whole = trained(tmp_path, save_strategy="steps", save_steps=2).model
    again = LoRAGATrainer(
        with_lora(Net("padding")),
        tiny.arguments(tmp_path, learning_rate=1e-2),
        train_dataset=rows(16),
        lora_ga_config=LoRAGAConfig(num_samples=8, estimator="exact"),
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name


def test_only_the_active_adapter_is_anchored_and_a_deleted_one_forgotten() -> None:
    model = with_lora(Net("plain"))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    prepare_adapter(model, LoRAGAConfig())
    names = anchored_parameter_names(model)
    assert len(names) == 4
    assert all("default" in name for name in names)
    embed = model.base_model.model.embed
    other = embed.lora_embedding_A["other"]
    model.set_adapter("other")
    assert not any(layer.is_anchored for layer in find_adapted_layers(model))
    with torch.no_grad():
        other.normal_()
    model(inputs())["logits"].sum().backward()
    assert not torch.equal(other.grad[:1], other.grad[1:]), "its rows are no halves"
    model.delete_adapter("default")
    assert anchored_parameter_names(model) == set()
    model.add_adapter("default", copy.deepcopy(model.peft_config["other"]))
    assert anchored_parameter_names(model) == set()


def test_an_adapter_made_of_the_config_of_an_anchored_one_starts_too(tmp_path: Any) -> None:
    model = trained(tmp_path / "one").model
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    arguments = tiny.arguments(tmp_path / "two", max_steps=1, learning_rate=0.0)
    LoRAGATrainer(model, arguments, train_dataset=rows(16), lora_ga_config=LoRAGAConfig(num_samples=8)).train()
    layer = embedding_of(model)
    assert (layer.rank, layer.stored_rank, layer.is_anchored) == (2, 4, True)
    assert torch.equal(output(model), output(Net("padding")))


def test_weighted_sums_of_anchored_adapters_are_plain(tmp_path: Any) -> None:
    model = trained(tmp_path).model
    expected = output(model)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)
    assert not embedding_of(model).is_anchored


# ---- Whole models


@pytest.mark.parametrize("tie", [False, True])
def test_a_language_model_with_its_embedding_adapted_trains(tie: bool, tmp_path: Any, caplog: Any) -> None:
    plain = tiny.llama(tie_word_embeddings=tie, pad_token_id=0)
    lora = {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}
    adapted = tiny.with_lora(copy.deepcopy(plain), **lora)
    found = probe(in_order(tiny.causal_rows(9), tmp_path, adapted), exact(), layers=find_adapted_layers(adapted))
    # Through the lookup alone: what ties the head to the weight is cut.
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    true = reference.whole_sample_gradient(plain.eval(), list(found), lambda: causal_loss(plain, tiny.causal_rows(9)))
    true["model.embed_tokens"] = true["model.embed_tokens"].T
    assert_equal_gradients(found, true)
    trainer = LoRAGATrainer(
        tiny.with_lora(tiny.llama(tie_word_embeddings=tie, pad_token_id=0), **lora),
        tiny.arguments(tmp_path, weight_decay=0.1, max_grad_norm=0.1, gradient_accumulation_steps=2),
        train_dataset=tiny.causal_rows(24),
        lora_ga_config=LoRAGAConfig(num_samples=8),
    )
    trainer.train()
    report = trainer.lora_ga_report
    assert all(not layer.action.is_plain for layer in report.layers)
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-6)
    named = [layer.name for layer in report.layers if layer.shares_weight]
    assert named == (["model.embed_tokens"] if tie else [])
    assert ("have other uses" in caplog.text) == tie


# ---- What is refused


class Shifted(nn.Embedding):
    """A forward pass of its own, as embeddings of positions have it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input + 1) % IDS)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Embedding(IDS, WIDTH, max_norm=1.0), "max_norm=1.0"),
        (lambda: nn.Embedding(IDS, WIDTH, scale_grad_by_freq=True), "scale_grad_by_freq=True"),
        (lambda: nn.Embedding(IDS, WIDTH, sparse=True), "sparse=True"),
        (lambda: Shifted(IDS, WIDTH), "a forward pass of its own"),
    ],
)
def test_embeddings_whose_adapter_is_no_product_are_refused(make: Any, said: str) -> None:
    model = tiny.with_lora(nn.Sequential(make()), target_modules=["0"])
    with pytest.raises(ValueError, match=rf"Layer 0: \w+ has {said}.*target_modules"):
        find_adapted_layers(model)


def test_factors_that_share_memory_are_refused() -> None:
    """PEFT's `ensure_weight_tying` makes the factors of the head views of those of the embedding."""
    model = tiny.llama(tie_word_embeddings=True)
    model = tiny.with_lora(model, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"lm_head.*embed_tokens.*ensure_weight_tying=False"):
        prepare_adapter(model, LoRAGAConfig())


@pytest.mark.parametrize("correction", ["lora_pro", "lora_pro_adamw"])
def test_lora_pro_refuses_them_by_name(correction: str, tmp_path: Any) -> None:
    config = LoRAGAConfig(num_samples=4, correction=correction)
    trainer = LoRAGATrainer(
        with_lora(Net("plain")), tiny.arguments(tmp_path), train_dataset=rows(8), lora_ga_config=config
    )
    with pytest.raises(ValueError, match=r"lora_embedding_A.*not a factor of a linear layer"):
        trainer.train()


@pytest.mark.parametrize("init", ["none", "lora_one"])
def test_riemannian_preconditioning_refuses_them_by_name(init: str, tmp_path: Any) -> None:
    """PEFT leaves them without preconditioning, and says nothing."""
    config = LoRAGAConfig(num_samples=4, init=init, riemannian_reg=1e-2)
    trainer = LoRAGATrainer(
        with_lora(Net("plain")), tiny.arguments(tmp_path), train_dataset=rows(8), lora_ga_config=config
    )
    with pytest.raises(ValueError, match=r"riemannian_reg.*: embed is a convolution or an embedding"):
        trainer.train()


def test_data_parallel_is_refused() -> None:
    _, layer, _, _ = started("plain")
    layer.require_whole(1)
    with pytest.raises(ValueError, match=r"embed: nn\.DataParallel.*accelerate launch"):
        layer.require_whole(2)
