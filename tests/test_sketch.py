"""The sketch finds the gradient's strongest directions, says how well, and is linear in the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor

from lora_ga_trainer import LoRAGAConfig
from lora_ga_trainer.gradients import sketch as sketch_module
from lora_ga_trainer.gradients import sketched as sketched_module
from lora_ga_trainer.gradients.accumulator import ExactGradient
from lora_ga_trainer.gradients.restore import restore_accumulator
from lora_ga_trainer.gradients.sketch import (
    SketchedGradient,
    is_sketched,
    make_accumulators,
    sketch_columns,
    top_svds,
    turn,
    turning_points,
)
from lora_ga_trainer.maths.recovery import TopSVD, merge, recover


CPU = torch.device("cpu")
SHAPE = (1024, 1280)


def pairs(spectrum: Tensor, tokens: int = 2048, seed: int = 0, shape: tuple[int, int] = SHAPE) -> list[tuple]:
    """Make 16 micro-batches `(x, dy)` whose `sum dy^T x` has exactly the singular values `spectrum`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, k: torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    rank = spectrum.shape[0]
    U, V, mix = draw(shape[0], rank), draw(shape[1], rank), draw(tokens, rank)
    dy, x = (mix * spectrum.float()) @ U.T, mix @ V.T
    return list(zip(x.chunk(16), dy.chunk(16), strict=True))


def run(estimator: SketchedGradient | ExactGradient, data: list[tuple], weight: float = 1.0) -> None:
    """Add the micro-batches one by one, as the probe does."""
    for number, (x, dy) in enumerate(data):
        if estimator.sketched and number in turning_points(len(data)):
            turn([estimator])
        estimator.add(x, dy, weight)


def gradient(data: list[tuple]) -> Tensor:
    return sum(dy.float().T @ x.float() for x, dy in data)


def energy_kept(G: Tensor, top: TopSVD, spectrum: Tensor, low: int, high: int) -> float:
    """Share of the energy of directions `low` to `high` of `G` that the estimated ones hold: the worse side."""
    best = spectrum[low:high].square().sum()
    of_u = (top.U[:, low:high].T @ G).square().sum() / best
    of_v = (G @ top.Vt[low:high].T).square().sum() / best
    return min(of_u.item(), of_v.item())


SPECTRA: dict[str, Callable[[], Tensor]] = {
    # What real gradients look like: eight directions hold nine tenths of the energy, then a slow decay.
    "decaying": lambda: 1.0 / torch.arange(1, 513),
    "two levels": lambda: torch.cat([torch.linspace(3, 2, 16), 0.1 * torch.ones(400)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", [0, 1])
def test_keeps_the_energy_of_the_directions_of_a_and_of_b(spectrum: str, seed: int) -> None:
    r = 8
    S = SPECTRA[spectrum]()
    data = pairs(S, seed=seed)
    (estimator,) = make_accumulators([("layer", SHAPE)], LoRAGAConfig(probe_seed=seed), r).values()
    assert estimator.sketched
    run(estimator, data)
    top, G = estimator.svd(2 * r), gradient(data)
    for low, high in ((0, r), (r, 2 * r), (0, 2 * r)):
        assert energy_kept(G, top, S, low, high) > 0.99, (low, high)
    assert top.kept(0, 2 * r) == pytest.approx(energy_kept(G, top, S, 0, 2 * r), abs=0.02)
    assert top.total == pytest.approx(G.square().sum().item(), rel=0.02)
    assert top.share(r) == pytest.approx((S[:r].square().sum() / S.square().sum()).item(), abs=0.02)


def test_the_estimate_of_the_energy_kept_sees_a_bad_sketch() -> None:
    """With hardly more columns than directions and a flat spectrum a sketch is poor, and must say so."""
    S = torch.linspace(1.0, 0.5, 512)
    data = pairs(S)
    estimator = SketchedGradient(SHAPE, k=24)
    run(estimator, data)
    top = estimator.svd(16)
    true = energy_kept(gradient(data), top, S, 0, 16)
    assert true < 0.9
    assert top.kept(0, 16) < true + 0.05


def test_equals_the_exact_estimator_when_k_reaches_the_rank() -> None:
    data = pairs(torch.linspace(2.0, 1.0, 24))
    sketch, exact = SketchedGradient(SHAPE, k=48), ExactGradient(SHAPE)
    run(sketch, data)
    run(exact, data)
    found = sketch.svd(24)
    torch.testing.assert_close(found.S, torch.linspace(2.0, 1.0, 24), rtol=2e-5, atol=0)
    # fp32 sums over 512 tokens: relative error of a few 1e-6.
    assert ((found.U * found.S) @ found.Vt - exact.G).norm() < 2e-5 * exact.G.norm()
    assert found.kept(0, 24) == pytest.approx(1.0, abs=1e-6)


def test_singular_vectors_are_orthonormal_and_paired() -> None:
    data = pairs(SPECTRA["decaying"]())
    estimator = SketchedGradient(SHAPE, k=96)
    run(estimator, data)
    top, G = estimator.svd(16), gradient(data)
    eye = torch.eye(16)
    torch.testing.assert_close(top.U.T @ top.U, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(top.Vt @ top.Vt.T, eye, atol=1e-5, rtol=0)
    # u_i^T G v_i = s_i with a positive sign: the pairs belong together.
    values = (top.U.T @ G @ top.Vt.T).diagonal()
    torch.testing.assert_close(values, top.S, rtol=1e-2, atol=0)


def test_sketch_of_a_union_is_the_sum_of_sketches() -> None:
    data = pairs(SPECTRA["decaying"]())
    whole, left, right = (SketchedGradient(SHAPE, k=32) for _ in range(3))
    for x, dy in data:
        whole.add(x, dy, 0.5)
    for estimator, half in ((left, data[:6]), (right, data[6:])):
        for x, dy in half:
            estimator.add(x, dy, 0.5)
    for total, a, b in zip(whole.sums(), left.sums(), right.sums(), strict=True):
        torch.testing.assert_close(total, a + b, rtol=1e-4, atol=1e-5 * total.abs().max().item())


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_size_of_the_gradient_does_not_matter(scale: float) -> None:
    data = pairs(SPECTRA["decaying"]())
    plain, scaled = SketchedGradient(SHAPE, k=64), SketchedGradient(SHAPE, k=64)
    run(plain, data)
    run(scaled, data, weight=scale)
    a, b = plain.svd(16), scaled.svd(16)
    torch.testing.assert_close(b.S / scale, a.S, rtol=1e-4, atol=0)
    assert b.kept(0, 16) == pytest.approx(a.kept(0, 16), abs=1e-4)
    projector = lambda top: top.U @ top.U.T
    torch.testing.assert_close(projector(a), projector(b), atol=1e-4, rtol=0)


def test_a_zero_gradient_gives_zero_singular_values() -> None:
    estimator = SketchedGradient(SHAPE, k=32)
    run(estimator, [(torch.randn(8, SHAPE[1]), torch.zeros(8, SHAPE[0]))])
    top = estimator.svd(16)
    assert top.S.count_nonzero() == 0
    assert top.total == 0.0
    assert top.share(8) == 0.0


def test_a_gradient_of_lower_rank_than_asked_for() -> None:
    data = pairs(torch.tensor([3.0, 2.0, 1.0]))
    estimator = SketchedGradient(SHAPE, k=64)
    run(estimator, data)
    top = estimator.svd(16)
    torch.testing.assert_close(top.S[:3], torch.tensor([3.0, 2.0, 1.0]), rtol=1e-4, atol=0)
    assert top.S[3:].max() < 1e-5
    torch.testing.assert_close(top.U.T @ top.U, torch.eye(16), atol=1e-5, rtol=0)
    assert energy_kept(gradient(data), top, torch.tensor([3.0, 2.0, 1.0]), 0, 3) > 0.9999


def test_bf16_pairs_are_summed_in_fp32() -> None:
    """1,024 equal contributions of bf16: a bf16 running sum would stall at 256 of them."""
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    dy = torch.full((1, 4), 2.0**-8, dtype=torch.bfloat16)
    exact = ExactGradient((4, 8))
    for _ in range(1024):
        exact.add(x, dy, 1.0)
    assert exact.G.dtype is torch.float32
    assert exact.G.unique().tolist() == [4.0]


def test_bf16_sketch_is_as_good_as_the_data() -> None:
    data = [(x.bfloat16(), dy.bfloat16()) for x, dy in pairs(SPECTRA["decaying"]())]
    estimator = SketchedGradient(SHAPE, k=96)
    run(estimator, data)
    assert estimator.Omega.dtype is torch.bfloat16
    top = estimator.svd(16)
    for low, high in ((0, 8), (8, 16)):
        assert energy_kept(gradient(data), top, SPECTRA["decaying"](), low, high) > 0.98


def test_fp16_sums_do_not_overflow() -> None:
    """Each token gives 2^7 * 2^7; 64 of them add up to 2^20, beyond the 65504 of fp16."""
    x, dy = torch.full((64, SHAPE[1]), 128.0).half(), torch.full((64, SHAPE[0]), 128.0).half()
    estimator = SketchedGradient(SHAPE, k=32)
    run(estimator, [(x, dy)])
    top = estimator.svd(1)
    assert top.S.item() == pytest.approx(2.0**20 * (SHAPE[0] * SHAPE[1]) ** 0.5, rel=1e-3)


def test_the_same_seed_gives_the_same_sketch_and_another_seed_another() -> None:
    data = pairs(SPECTRA["decaying"]())
    first, again, other = (SketchedGradient(SHAPE, k=32, seed=seed) for seed in (0, 0, 1))
    for estimator in (first, again, other):
        run(estimator, data)
    assert torch.equal(first.Y, again.Y)
    assert not torch.equal(first.Omega, other.Omega)
    assert first.Omega.data_ptr() != again.Omega.data_ptr()


def test_layers_choose_the_cheaper_form_by_themselves() -> None:
    layers = [("small", (384, 384)), ("large", (2048, 2048))]
    chosen = make_accumulators(layers, LoRAGAConfig(), rank=8)
    assert [estimator.sketched for estimator in chosen.values()] == [False, True]
    exact = make_accumulators(layers, LoRAGAConfig(estimator="exact"), rank=8)
    assert not any(estimator.sketched for estimator in exact.values())
    assert sketch_columns(LoRAGAConfig(), 16) == 128
    # A sketch is smaller than what it replaces wherever it is chosen: 2 (k + 16) (in + out) numbers against in * out.
    for shape in ((1024, 1024), (2048, 5632), (4096, 128), (128256, 4096)):
        for k in (24, 96, 192):
            if is_sketched(shape, k):
                assert 2 * (k + 16) * sum(shape) < shape[0] * shape[1]


def test_a_sketch_too_small_for_the_rank_is_refused() -> None:
    layers = [("up", (2048, 2048))]
    with pytest.raises(ValueError, match=r"sketch_size=16 can't hold the 32 directions that init='lora_ga' needs"):
        make_accumulators(layers, LoRAGAConfig(sketch_size=16), rank=16)
    with pytest.raises(ValueError, match=r"Use at least 16; the default is 64"):
        make_accumulators(layers, LoRAGAConfig(init="lora_one", sketch_size=15), rank=16)


def test_an_init_that_uses_fewer_directions_gets_fewer_columns() -> None:
    """LoRA-One uses r of them where LoRA-GA uses 2r; four columns for each, and a narrower layer is sketched."""
    assert sketch_columns(LoRAGAConfig(init="lora_ga"), 8) == 64
    assert sketch_columns(LoRAGAConfig(init="lora_one"), 8) == 32
    layers = [("between", (320, 320))]
    assert make_accumulators(layers, LoRAGAConfig(init="lora_one"), 8)["between"].sketched
    assert not make_accumulators(layers, LoRAGAConfig(init="lora_ga"), 8)["between"].sketched
    S = SPECTRA["decaying"]()
    (accumulator,) = make_accumulators([("layer", SHAPE)], LoRAGAConfig(init="lora_one"), 8).values()
    data = pairs(S)
    run(accumulator, data)
    assert accumulator.directions == 32
    assert energy_kept(gradient(data), accumulator.svd(8), S, 0, 8) > 0.99


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_a_restored_estimator_gives_bitwise_the_same(kind: str) -> None:
    data = pairs(SPECTRA["decaying"]()[:128], shape=(256, 320))
    estimator = ExactGradient((256, 320)) if kind == "exact" else SketchedGradient((256, 320), k=32)
    run(estimator, data)
    estimator.divide(3.0)
    again = restore_accumulator({key: value.clone() for key, value in estimator.state().items()}, (256, 320))
    assert again.sketched == (kind == "sketch")
    for a, b in zip(estimator.svd(8)[:3], again.svd(8)[:3], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(KeyError, match="shape"):
        restore_accumulator(estimator.state(), (320, 256))


def test_turned_matrices_keep_the_dtype_of_the_data() -> None:
    """Bases in bf16 from the start: nothing is cast, and so nothing kept twice, layer by layer."""
    data = [(x.bfloat16(), dy.bfloat16()) for x, dy in pairs(torch.tensor([3.0, 2.0, 1.0]))]
    estimator = SketchedGradient(SHAPE, k=32)
    for x, dy in data:
        estimator.add(x, dy, 1.0)
    turn([estimator])
    assert estimator.Omega.dtype is estimator.Psi.dtype is torch.bfloat16
    before = estimator.held()
    estimator.add(*data[0], 1.0)
    assert all(now is part for now, part in zip(estimator.held(), before, strict=True))


def test_turning_points_are_shares_of_the_samples() -> None:
    assert turning_points(64) == [4, 16, 32, 64]
    assert turning_points(5) == [1, 2, 5]
    assert turning_points(1) == [1]


def sketches_of(G: Tensor, k: int, orthonormal: bool, seed: int = 0) -> tuple[Tensor, ...]:
    """Return `Omega, Psi, Y, Z` of `G` in fp64."""
    generator = torch.Generator().manual_seed(seed)
    Omega, Psi = (torch.randn(n, k, generator=generator, dtype=torch.float64) for n in (G.shape[1], G.shape[0]))
    if orthonormal:
        Omega, Psi = torch.linalg.qr(Omega).Q, torch.linalg.qr(Psi).Q
    return Omega, Psi, G @ Omega, G.T @ Psi


@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("known", [0.0, 0.5])
def test_merging_is_the_completion_of_the_reference(orthonormal: bool, known: float) -> None:
    k = 12
    generator = torch.Generator().manual_seed(1)
    G = torch.randn(70, 90, generator=generator, dtype=torch.float64) / (1 + torch.arange(90.0)).double()
    Omega, Psi, Y, Z = sketches_of(G, k, orthonormal)
    S = known * torch.linspace(3.0, 1.0, k, dtype=torch.float64)
    U, found, V = merge(Omega, Psi, S, Y, Z)
    true = reference.completed_from_sketches(Omega, Psi, Y, Z, k // 2) + Psi @ S.diag() @ Omega.T
    torch.testing.assert_close(U @ found.diag() @ V.T, reference.best_rank(true, k), rtol=0, atol=1e-9)
    torch.testing.assert_close(found, torch.linalg.svdvals(true)[:k], rtol=1e-9, atol=1e-10)
    for basis in (U, V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 6])
def test_merging_loses_nothing_of_a_matrix_of_half_the_rank(rank: int) -> None:
    """Blind sketches of `k` columns hold a `G` of rank `k / 2` whole, and add it to what was known to the last bit."""
    k = 12
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    G = draw(70, rank) @ draw(rank, 90)
    for orthonormal in (True, False):
        Omega, Psi, Y, Z = sketches_of(G, k, orthonormal)
        S = torch.tensor([2.0, 1.0] + [0.0] * (k - 2), dtype=torch.float64)
        U, found, V = merge(Omega, Psi, S, Y, Z)
        torch.testing.assert_close(U @ found.diag() @ V.T, G + Psi @ S.diag() @ Omega.T, rtol=0, atol=1e-10)


def test_a_batch_of_matrices_is_merged_as_each_alone() -> None:
    data = [sketches_of(torch.randn(40, 50, dtype=torch.float64) * scale, 8, True, seed=3) for scale in (1.0, 1e-9, 0)]
    S = torch.zeros(8, dtype=torch.float64)
    Omega, Psi, Y, Z = (torch.stack(part) for part in zip(*data, strict=True))
    together = merge(Omega, Psi, torch.stack([S] * 3), Y, Z)
    for number, (Omega, Psi, Y, Z) in enumerate(data):
        U, found, V = merge(Omega, Psi, S, Y, Z)
        torch.testing.assert_close(together[1][number], found, rtol=1e-12, atol=0)
        product = lambda U, S, V: U @ S.diag() @ V.T
        torch.testing.assert_close(product(*(part[number] for part in together)), product(U, found, V))


def test_two_shapes_turn_in_one_call() -> None:
    """Layers are merged together by shape; each gets its own."""
    shapes = [(1024, 1280), (1024, 1280), (768, 1280)]
    data = [pairs(SPECTRA["decaying"](), seed=seed, shape=shape) for seed, shape in enumerate(shapes)]
    alone, together = ([SketchedGradient(shape, k=32) for shape in shapes] for _ in range(2))
    for estimators in (alone, together):
        for estimator, batches in zip(estimators, data, strict=True):
            estimator.add(*batches[0], 1.0)
    for estimator in alone:
        turn([estimator])
    turn(together)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.S, b.S, rtol=1e-5, atol=0)
        known = [(e.Psi[:, :32] * e.S) @ e.Omega[:, :32].T for e in (a, b)]
        torch.testing.assert_close(*known, rtol=0, atol=1e-5 * a.S[0].item())


@pytest.mark.parametrize("limit", [2**28, 1])
def test_all_layers_at_once_are_each_layer_alone(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketched and exact layers of several shapes, sizes and ranks, one of them never reached, stacked or not."""
    monkeypatch.setattr(sketch_module, "_STACKED_BYTES", limit)
    tall, wide, small = (1024, 1280), (1280, 1024), (96, 64)
    few, many = torch.linspace(1, 0.1, 6), SPECTRA["decaying"]()
    layers = {
        "a": (SketchedGradient, tall, many, 1.0),
        "b": (SketchedGradient, tall, many, 1.0),
        "zero": (SketchedGradient, tall, many, 0.0),
        "tiny": (SketchedGradient, tall, many, 1e-12),
        "low rank": (SketchedGradient, wide, few, 1.0),
        "small": (ExactGradient, small, many[:64], 1.0),
        "small and huge": (ExactGradient, small, few, 1e17),
        "large": (ExactGradient, tall, many, 1.0),
    }
    estimators = {}
    for seed, (name, (kind, shape, spectrum, weight)) in enumerate(layers.items()):
        estimators[name] = kind(shape) if kind is ExactGradient else kind(shape, k=64)
        run(estimators[name], pairs(spectrum, seed=seed, shape=shape), weight)
    wanted = dict.fromkeys(estimators, 16) | {"b": 8}
    calls = []
    monkeypatch.setattr(sketched_module, "recover", lambda *args: calls.append(len(args[0])) or recover(*args))
    together = top_svds(estimators, wanted)
    assert sorted(calls) == ([1, 1, 3] if limit > 1 else [1] * 5)
    assert list(together["zero"].S) == [0.0] * 16
    assert (together["zero"].total, together["zero"].kept(0, 16)) == (0.0, 1.0)
    for name, top in together.items():
        alone = estimators[name].svd(wanted[name])
        torch.testing.assert_close(top.S, alone.S, rtol=1e-5, atol=1e-5 * alone.S[0].item())
        product = lambda found: found.U * found.S @ found.Vt
        torch.testing.assert_close(product(top), product(alone), rtol=0, atol=1e-5 * alone.S[0].item())
        assert (top.total, top.kept(0, 8)) == pytest.approx((alone.total, alone.kept(0, 8)), rel=1e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_gradient_known_whole_needs_no_large_svd(spectrum: str) -> None:
    """Subspace iteration gives the triplets of the full SVD, which a GPU takes seconds a layer for."""
    S = SPECTRA[spectrum]()
    exact = ExactGradient(SHAPE)
    run(exact, pairs(S))
    top = exact.svd(16)
    torch.testing.assert_close(top.S, S[:16], rtol=1e-4, atol=0)
    for low, high in ((0, 8), (8, 16)):
        assert energy_kept(exact.G, top, S, low, high) > 0.99999
    assert top.share(16) == pytest.approx((S[:16].square().sum() / S.square().sum()).item(), abs=1e-5)


def test_no_svd_is_larger_than_the_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda M, **kw: sizes.append(min(M.shape[-2:])) or svd(M, **kw))
    for estimator in (ExactGradient(SHAPE), SketchedGradient(SHAPE, k=96)):
        run(estimator, pairs(SPECTRA["decaying"]()))
        estimator.svd(16)
    assert sizes
    assert max(sizes) <= 2 * 96
