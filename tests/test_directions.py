"""Starts of directions alone, whitened gradients, and directions that half of the samples support."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import reference
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_ga_trainer import GradientEstimate, LoRAGAConfig, LoRAGATrainer, find_adapted_layers
from lora_ga_trainer.gradients.accumulator import ExactGradient
from lora_ga_trainer.gradients.sketch import sketch_columns
from lora_ga_trainer.maths import whitening
from lora_ga_trainer.maths.directions import turned_rows
from lora_ga_trainer.maths.factors import lora_one_factors
from lora_ga_trainer.maths.recovery import TopSVD
from lora_ga_trainer.maths.whitening import energy_left_out, scale_features, whiten, whiteners
from lora_ga_trainer.starts.directions import find_directions
from lora_ga_trainer.starts.report import Action


COUNT = 9
EXPONENTS = (0.0, 0.25, 0.5)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def svd(G, k=None):
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    return TopSVD(U[:, :k], S[:k], Vt[:k], S.square().sum().item())


def moments(rows):
    return rows.square().mean(dim=0)


def tokens(outliers=(1.0, 30.0), N=200, shape=(14, 11)):
    """`x (N, in)` and `dy (N, out)`, related, with features of very different size."""
    x, mixing = drawn(N, shape[1], seed=1), drawn(shape[1], shape[0], seed=2)
    dy = x @ mixing + drawn(N, shape[0], seed=3)
    spread = lambda n: torch.linspace(math.log(outliers[0]), math.log(outliers[1]), n, dtype=torch.float64).exp()
    return x * spread(shape[1]), dy * spread(shape[0]).flip(0)


def same_directions(rows, others, atol=1e-5):
    """Equal up to the sign of each row."""
    cosines = nn.functional.cosine_similarity(rows.double(), others.double(), dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=atol)


# --- the maths


@pytest.mark.parametrize("w", EXPONENTS)
def test_whiteners_are_those_of_the_formula(w):
    x, dy = tokens()
    by = whiteners(moments(dy), moments(x), w)
    for side, diagonal in zip(by, reference.whiteners_reference(x, dy, w), strict=True):
        torch.testing.assert_close(side.double(), diagonal.diagonal(), rtol=1e-6, atol=0)
    D_P, D_Q = reference.whiteners_reference(x, dy, w)
    G = dy.T @ x
    torch.testing.assert_close(whiten(G, by), D_P @ G @ D_Q, rtol=1e-6, atol=1e-6)
    # Neither the unit of the loss nor that of all inputs counts.
    for side, scaled in zip(by, whiteners(moments(dy * 1e-9), moments(x * 1e6), w), strict=True):
        torch.testing.assert_close(side, scaled, rtol=1e-5, atol=0)


def test_a_layer_that_saw_nothing_is_not_divided_by_it():
    left, right = whiteners(torch.zeros(3), torch.zeros(2), 0.5)
    assert left.tolist() == [1, 1, 1]
    assert right.tolist() == [1, 1]


def test_the_unit_of_a_feature_changes_no_whitened_direction_at_one_half(monkeypatch):
    """
    `x_j -> c x_j`, `W[:, j] -> W[:, j] / c`, and `y_i -> y_i / c` with row `i` likewise: `dy_i -> c dy_i`.

    With l = 0 and w = 1/2 the directions are the same for any c; with l > 0 or w < 1/2 they are not.
    """
    x, dy = tokens()
    units_in, units_out = (drawn(n, seed=5).mul(2).exp() for n in (x.shape[1], dy.shape[1]))

    def rows(w, damping, units):
        monkeypatch.setattr(whitening, "DAMPING", damping)
        (own_x, own_dy) = (x * units_in, dy * units_out) if units else (x, dy)
        by = whiteners(moments(own_dy), moments(own_x), w)
        return svd(whiten(own_dy.T @ own_x, by)).Vt[:4]

    cosines = lambda w, damping: nn.functional.cosine_similarity(rows(w, damping, True), rows(w, damping, False)).abs()
    assert cosines(0.5, 0.0).min() > 1 - 1e-9
    assert cosines(0.25, 0.0).min() < 0.99
    assert cosines(0.5, 0.01).min() < 1 - 1e-5
    # The smaller l, the nearer.
    assert cosines(0.5, 1e-4).min() < cosines(0.5, 1e-8).min()
    assert cosines(0.5, 1e-8).min() > 1 - 1e-4


@pytest.mark.parametrize("shape", [(14, 11), (6, 11), (11, 3)])
def test_rows_are_turned_and_keep_their_lengths(shape):
    G, plain = drawn(*shape), drawn(4, shape[1], seed=1).float()
    top = svd(G)
    rows = turned_rows(top.S, top.Vt, plain)
    count = min(4, *shape)
    twin = reference.turned_rows_reference(G, plain[:count])
    same_directions(rows[:count], twin)
    torch.testing.assert_close(rows.norm(dim=1), plain.norm(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(rows[count:], plain[count:])


def test_rows_without_a_direction_stay_to_the_bit():
    """A gradient of rank 2, and then one of whose directions the second and the fourth are supported."""
    plain = drawn(4, 11, seed=1).float()
    low = svd(drawn(14, 2) @ drawn(2, 11, seed=4))
    rows = turned_rows(low.S, low.Vt, plain)
    same_directions(rows[:2], low.Vt[:2])
    assert torch.equal(rows[2:], plain[2:])
    top = svd(drawn(14, 11))
    rows = turned_rows(top.S, top.Vt, plain, torch.tensor([False, True, False, True]))
    same_directions(rows[:2], top.Vt[[1, 3]])
    assert torch.equal(rows[2:], plain[2:])


@pytest.mark.parametrize("w", [0.25, 0.5])
@pytest.mark.parametrize("r", [1, 3])
def test_lora_one_takes_the_best_whitened_step(w, r):
    """`s B0 A0` is along the minimiser of `<G, X> + ||D_P^-1 X D_Q^-1||^2 / 2` over rank r, and balanced."""
    x, dy = tokens()
    G, (D_P, D_Q) = dy.T @ x, reference.whiteners_reference(x, dy, w)
    by = whiteners(moments(dy), moments(x), w)
    top = scale_features(svd(whiten(G, by), r), by)
    best = -D_P @ reference.best_rank(D_P @ G @ D_Q, r) @ D_Q
    torch.testing.assert_close(-top.U * top.S @ top.Vt, best, rtol=0, atol=1e-6 * best.abs().max().item())
    value = lambda X: ((G * X).sum() + (torch.inverse(D_P) @ X @ torch.inverse(D_Q)).square().sum() / 2).item()
    # No scaling, no turned factor and none of the other choices is lower.
    others = [1.01 * best, 0.99 * best, -reference.best_rank(G, r), -D_P @ D_P @ reference.best_rank(G, r) @ D_Q @ D_Q]
    others += [-reference.best_rank(D_P @ D_P @ G @ D_Q @ D_Q, r)]
    U, S, V = torch.linalg.svd(best)
    for seed in range(20):
        left, right = U[:, :r] * S[:r], V[:r]
        others.append((left + 1e-2 * S[0] * drawn(14, r, seed=seed)) @ (right + 1e-2 * drawn(r, 11, seed=seed + 50)))
    assert all(value(best) < value(other) for other in others)
    B, A = lora_one_factors(top.U, top.S, top.Vt, r, gamma=7.0)
    product = best / torch.linalg.matrix_norm(best, 2) / 7.0
    torch.testing.assert_close(B @ A, product, rtol=0, atol=1e-6)
    torch.testing.assert_close(B.T @ B, A @ A.T, rtol=0, atol=1e-6)


def test_the_energy_that_a_sketch_leaves_out_is_estimated_after_whitening():
    """Entries with the size of their row times that of their column: what the estimate assumes."""
    rows, columns = (drawn(n, seed=n).exp() for n in (300, 200))
    rest = rows[:, None] * drawn(300, 200) * columns
    strong = 1e3 * drawn(300, 4, seed=8) @ drawn(4, 200, seed=9)
    top = svd(strong, 4)
    by = 1 / rows.float(), 1 / columns.float()
    found = []
    for seed in range(20):
        w, z = drawn(200, 16, seed=100 + seed), drawn(300, 16, seed=200 + seed)
        G = strong + rest
        found.append(energy_left_out(top, by, (w, G @ w), (z, G.T @ z)))
    true = whiten(rest, by).square().sum().item()
    assert sum(found) / len(found) == pytest.approx(true, rel=0.1)
    assert energy_left_out(top, by, (w, strong @ w), (z, strong.T @ z)) < 1e-12 * true


# --- what the other half supports


def halves(G1, G2, r=8, w=0.0, found=None):
    """Return the directions of one layer from the gradients of two halves."""
    layer = SimpleNamespace(name="layer", matrices=["layer"], rank=r, shape=tuple(G1.shape))
    estimates = []
    for G in (G1, G2):
        accumulator = ExactGradient((0, 0))
        accumulator.G = G.float()
        estimates.append(GradientEstimate({"layer": accumulator}, moments={} if found is None else {"layer": found}))
    config = LoRAGAConfig(init="gradient_directions", supported_only=True, estimator="exact", whitening=w)
    return find_directions(config, [layer], *estimates)["layer"]


def test_of_pure_noise_the_nominal_share_is_supported():
    """Beyond two standard errors lie 2.3% of a normal distribution: 36 of 1,600, give or take 6."""
    supported = sum(
        halves(drawn(48, 32, seed=seed), drawn(48, 32, seed=seed + 1000)).supported.sum().item() for seed in range(200)
    )
    assert 18 <= supported <= 54


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_of_five_planted_directions_five_are_supported_and_the_other_rows_are_plain(scale):
    """The rest of the eight are noise, of which one in 44 passes."""
    passed = 0
    for seed in range(10):
        U, V = (torch.linalg.qr(drawn(n, 5, seed=seed + n))[0] for n in (48, 32))
        signal = 60 * U @ V.T
        G1, G2 = (scale * (signal + drawn(48, 32, seed=seed + k)) for k in (300, 600))
        found = halves(G1, G2)
        assert found.supported[:5].all()
        passed += int(found.supported.sum()) - 5
        plain = drawn(8, 32, seed=1).float()
        rows = turned_rows(found.top.S, found.top.Vt, plain, found.supported)
        count = int(found.supported.sum())
        assert torch.equal(rows[count:], plain[count:])
        # The first five span what was planted.
        basis = torch.linalg.qr(rows[:5].double().T)[0]
        assert (V.T @ basis).square().sum() > 4.8
    assert passed <= 3


def test_a_weight_with_one_row_supports_nothing_since_nothing_tells_its_error():
    assert not halves(drawn(1, 32), drawn(1, 32)).supported.any()


def test_no_gradient_supports_nothing():
    assert not halves(torch.zeros(6, 5), torch.zeros(6, 5), r=2).supported.any()
    assert not halves(drawn(6, 5), torch.zeros(6, 5), r=2).supported.any()


# --- training


def make(folder, model=None, lora=None, rows=None, **config):
    model = tiny.llama() if model is None else model
    return LoRAGATrainer(
        tiny.with_lora(model, **(lora or {})),
        tiny.arguments(folder, max_steps=1, learning_rate=0.0, per_device_train_batch_size=4),
        train_dataset=tiny.causal_rows(COUNT) if rows is None else rows,
        lora_ga_config=LoRAGAConfig(**({"num_samples": COUNT, "init": "gradient_directions"} | config)),
    )


def plain_rows(trainer):
    return {layer.name: layer.stored_A.detach().clone() for layer in find_adapted_layers(trainer.model)}


def truth(names, count=COUNT):
    """Return `x`, `dy` and `G` of every layer in fp64, of one pass of the summed loss."""
    model, rows = tiny.llama().double().eval(), tiny.causal_rows(count)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def summed():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

    found = reference.layer_inputs_and_output_gradients(model, names, summed)
    return {name: (x, dy, dy.T @ x) for name, (x, dy) in found.items()}


def whitened_truth(name, seen, w):
    x, dy, G = seen[name]
    D_P, D_Q = reference.whiteners_reference(x, dy, w)
    return D_P @ G @ D_Q


@pytest.mark.parametrize("w", EXPONENTS)
def test_a_start_is_that_of_the_twin_and_begins_at_the_base(w, tmp_path):
    batch = {key: torch.stack([row[key] for row in tiny.causal_rows(4)]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        base = tiny.llama().eval()(**batch).logits
    trainer = make(tmp_path, whitening=w, estimator="exact")
    plain = plain_rows(trainer)
    trainer.train()
    report = trainer.lora_ga_report
    seen = truth(list(plain))
    for layer, said in zip(find_adapted_layers(trainer.model), report.layers, strict=True):
        M = whitened_truth(layer.name, seen, w)
        rows = layer.stored_A.detach()
        # Where two singular values lie close, fp32 turns their vectors into each other.
        same_directions(rows, reference.turned_rows_reference(M, plain[layer.name]), atol=1e-4)
        torch.testing.assert_close(rows.norm(dim=1), plain[layer.name].norm(dim=1), rtol=1e-6, atol=0)
        assert not layer.stored_B.any()
        assert (layer.stored_rank, layer.is_anchored, said.action) == (4, False, Action.INITIALISED)
        S = torch.linalg.svdvals(M)
        assert said.energy_share_r == pytest.approx((S[:4].square().sum() / S.square().sum()).item(), rel=1e-4)
    assert ("whitened (w = " in report.summary()) == (w > 0)
    assert report.loss_after == report.loss_before
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**batch).logits, base)
        trainer.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter", is_trainable=True).eval()
        assert torch.equal(loaded(**batch).logits, base)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    for one, other in zip(find_adapted_layers(loaded), find_adapted_layers(trainer.model), strict=True):
        assert torch.equal(one.stored_A, other.stored_A)


@pytest.mark.parametrize("w", [0.25, 0.5])
def test_whitened_lora_ga_follows_the_best_2r_directions_of_the_whitened_gradient(w, tmp_path):
    """`B0 B0^T M + M A0^T A0 = c^2 [M]_2r` for `M = D_P G D_Q`, with the lengths that it has without whitening."""
    trainer = make(tmp_path, init="lora_ga", whitening=w, estimator="exact")
    trainer.train()
    layers = find_adapted_layers(trainer.model)
    seen = truth([layer.name for layer in layers])
    for layer in layers:
        M, r = whitened_truth(layer.name, seen, w), layer.rank
        A, B = layer.stored_A[:r].detach().double(), layer.stored_B[:, r:].detach().double()
        c = layer.shape[0] ** 0.25 / 4
        target = c**2 * reference.best_rank(M, 2 * r)
        assert (B @ B.T @ M + M @ A.T @ A - target).norm() < 1e-4 * target.norm(), layer.name
        torch.testing.assert_close(A @ A.T, c**2 * torch.eye(r).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(B.T @ B, c**2 * torch.eye(r).double(), rtol=0, atol=1e-5)


def test_whitened_lora_one_starts_at_the_best_whitened_step(tmp_path):
    trainer = make(tmp_path, init="lora_one", whitening=0.25, estimator="exact")
    trainer.train()
    layers = find_adapted_layers(trainer.model)
    seen = truth([layer.name for layer in layers])
    for layer in layers:
        x, dy, G = seen[layer.name]
        D_P, D_Q = reference.whiteners_reference(x, dy, 0.25)
        step = -D_P @ reference.best_rank(D_P @ G @ D_Q, layer.rank) @ D_Q
        found = (layer.stored_B @ layer.stored_A).detach().double()
        expected = step / torch.linalg.matrix_norm(step, 2) / 128
        assert (found - expected).norm() < 1e-4 * expected.norm(), layer.name


@pytest.mark.parametrize("init", ["gradient_directions", "lora_ga", "lora_one"])
def test_a_sketch_as_wide_as_the_gradients_rank_gives_the_whitened_start_of_the_whole_one(init, tmp_path):
    """Two rows of five tokens make gradients of rank 8 at most."""
    rows, lora = tiny.causal_rows(2, length=5, ragged=False), {"r": 1}
    found = {}
    for estimator in ("exact", "sketch"):
        model = tiny.llama(hidden_size=128, intermediate_size=160)
        trainer = make(
            tmp_path, model, lora, rows, init=init, whitening=0.5, estimator=estimator, sketch_size=10, num_samples=2
        )
        trainer.train()
        found[estimator] = find_adapted_layers(trainer.model), trainer.lora_ga_report
    (exact, of_exact), (sketch, of_sketch) = found["exact"], found["sketch"]
    compared = 0
    for one, other, said, other_said in zip(exact, sketch, of_exact.layers, of_sketch.layers, strict=True):
        if not other_said.sketched:
            continue
        compared += 1
        assert one.name == other.name
        same_directions(one.stored_A[:1].detach(), other.stored_A[:1].detach(), atol=1e-4)
        product = lambda it: (it.stored_B @ it.stored_A).detach()
        torch.testing.assert_close(product(one), product(other), rtol=0, atol=5e-3 * product(one).abs().max() + 1e-12)
        assert said.energy_share_r == pytest.approx(other_said.energy_share_r, rel=1e-3)
    assert compared >= 8


def test_a_file_serves_a_whitened_start_if_it_was_written_for_one(tmp_path):
    file = str(tmp_path / "probe.safetensors")
    starts = []
    for _ in range(2):
        trainer = make(tmp_path, whitening=0.25, probe_file=file)
        trainer.train()
        starts.append([layer.stored_A.detach() for layer in find_adapted_layers(trainer.model)])
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))
    make(tmp_path, probe_file=file).train()
    plain = str(tmp_path / "plain.safetensors")
    make(tmp_path, probe_file=plain).train()
    with pytest.raises(ValueError, match=r"does not hold the second_moments of layer .*whitening=0\.25.*Delete it"):
        make(tmp_path, whitening=0.25, probe_file=plain).train()


def test_a_sketch_keeps_twice_as_many_columns_for_whitening():
    for init, pairs in (("gradient_directions", 1), ("lora_one", 1), ("lora_ga", 2)):
        assert sketch_columns(LoRAGAConfig(init=init), 8) == 32 * pairs
        assert sketch_columns(LoRAGAConfig(init=init, whitening=0.25), 8) == 64 * pairs


@pytest.mark.parametrize("w", [0.0, 0.25])
def test_only_supported_directions_are_taken_and_the_report_says_how_many(w, tmp_path):
    rows = tiny.causal_rows(16)
    trainer = make(tmp_path, rows=rows, supported_only=True, estimator="exact", num_samples=16, whitening=w)
    plain = plain_rows(trainer)
    trainer.train()
    report, layers = trainer.lora_ga_report, find_adapted_layers(trainer.model)
    assert (report.samples, report.tokens) == (16, 16 * 12)
    for layer, said in zip(layers, report.layers, strict=True):
        rows, before = layer.stored_A.detach(), plain[layer.name]
        count = said.directions_supported
        assert 0 <= count <= said.directions_asked == 4
        assert torch.equal(rows[count:], before[count:])
        assert not (rows[:count] == before[:count]).all(dim=1).any()
        torch.testing.assert_close(rows.norm(dim=1), before.norm(dim=1), rtol=1e-6, atol=0)
        assert (said.action is Action.UNSUPPORTED) == (count == 0)
        assert not layer.stored_B.any()
    supported = sum(said.directions_supported for said in report.layers)
    assert 0 < supported < 4 * len(layers)
    assert f"16 samples support {supported} of {4 * len(layers)} directions" in report.summary()
    assert report.metrics()["lora_ga/directions_supported"] == supported
    content = json.loads((tmp_path / "lora_ga_report.json").read_text())
    assert [it["directions_supported"] for it in content["layers"]] == [
        it.directions_supported for it in report.layers
    ]


def test_experts_are_turned_one_by_one_and_refused_by_name_where_they_are_whitened(tmp_path):
    lora = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "r": 2}
    trainer = make(tmp_path, tiny.qwen3_moe(), lora)
    plain = plain_rows(trainer)
    trainer.train()
    experts = 0
    for layer in find_adapted_layers(trainer.model):
        rows, before = layer.stored_A.detach(), plain[layer.name]
        torch.testing.assert_close(rows.norm(dim=1), before.norm(dim=1), rtol=1e-6, atol=0)
        assert not layer.stored_B.any()
        experts += layer.experts if layer.experts > 1 else 0
        for own in rows.unflatten(0, (layer.experts, -1)):
            unit = nn.functional.normalize(own, dim=1)
            if not torch.equal(rows, before):
                torch.testing.assert_close(unit @ unit.T, torch.eye(2), rtol=0, atol=1e-4)
    assert experts == 8
    whitened = make(tmp_path, tiny.qwen3_moe(), lora, whitening=0.25)
    with pytest.raises(ValueError, match=r"whitening=0\.25 needs second_moments .*experts\.down_proj.*another whiten"):
        whitened.train()


def test_an_embedding_has_no_rows_to_turn(tmp_path):
    with pytest.raises(ValueError, match=r"Layer model\.embed_tokens: .*those of an embedding are zero"):
        make(tmp_path, lora={"target_modules": ["embed_tokens", "q_proj"]})


class Picture(nn.Module):
    """A convolution and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.head(self.patches(x).tanh().flatten(2).mean(2)), labels)}


def test_a_convolution_is_turned_as_the_linear_layer_of_its_patches(tmp_path):
    generator = torch.Generator().manual_seed(3)
    rows = [{"x": torch.randn(3, 6, 6, generator=generator), "labels": i % 3} for i in range(8)]
    model = get_peft_model(Picture(), LoraConfig(r=2, target_modules=["patches"]))
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=rows,
        lora_ga_config=LoRAGAConfig(init="gradient_directions", whitening=0.25, num_samples=8),
    )
    (layer,) = find_adapted_layers(model)
    before = layer.stored_A.detach().clone()
    trainer.train()
    x = nn.functional.unfold(torch.stack([row["x"] for row in rows]).double(), 3, padding=1).mT.flatten(0, 1)
    plain = Picture().double()
    y = plain.patches(torch.stack([row["x"] for row in rows]).double())
    y.retain_grad()
    labels = torch.tensor([row["labels"] for row in rows])
    nn.functional.cross_entropy(plain.head(y.tanh().flatten(2).mean(2)), labels, reduction="sum").backward()
    dy = y.grad.flatten(2).mT.flatten(0, 1)
    D_P, D_Q = reference.whiteners_reference(x, dy, 0.25)
    twin = reference.turned_rows_reference(D_P @ dy.T @ x @ D_Q, before.flatten(1))
    same_directions(layer.stored_A.detach().flatten(1), twin, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_written_in_the_dtype_of_the_adapter(dtype, tmp_path):
    model = tiny.with_lora(tiny.llama()).to(dtype)
    trainer = LoRAGATrainer(
        model,
        tiny.arguments(tmp_path, max_steps=1, learning_rate=0.0),
        train_dataset=tiny.causal_rows(16),
        lora_ga_config=LoRAGAConfig(
            init="gradient_directions", supported_only=True, estimator="exact", num_samples=16
        ),
    )
    plain = plain_rows(trainer)
    trainer.train()
    for layer, said in zip(find_adapted_layers(model), trainer.lora_ga_report.layers, strict=True):
        assert layer.stored_A.dtype is dtype
        kept = said.directions_supported
        assert torch.equal(layer.stored_A.detach()[kept:], plain[layer.name][kept:])


# --- the config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "gradient_directions", "gamma": 16.0}, r"gamma=16\.0 would do nothing"),
        ({"init": "gradient_directions", "whitening": 0.6}, r"whitening=0\.6 must be a number from 0 to 0\.5"),
        ({"init": "gradient_directions", "whitening": "0.25"}, r"whitening='0\.25' must be a number"),
        ({"init": "gradient_directions", "whitening": -0.1}, r"whitening=-0\.1 must be a number"),
        ({"init": "none", "whitening": 0.25}, r"whitening=0\.25 would do nothing with init='none'"),
        ({"init": "lora_ga", "supported_only": True, "estimator": "exact"}, "supported_only=True would do nothing"),
        (
            {"init": "gradient_directions", "supported_only": True},
            "estimator='sketch'.*Set estimator='exact'.*8 bytes",
        ),
        (
            {"init": "gradient_directions", "supported_only": True, "estimator": "exact", "probe_file": "p"},
            "supported_only=True asks two halves.*probe_file holds one gradient",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRAGAConfig(**settings)
