"""The sketch finds the gradient's strongest directions, says how well, and is linear in the data."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_ga_trainer import LoRAGAConfig
from lora_ga_trainer.recovery import TopSVD
from lora_ga_trainer.sketch import (
    ExactGradient,
    SketchedGradient,
    is_sketched,
    make_estimators,
    restore_estimator,
    sketch_columns,
)


CPU = torch.device("cpu")
SHAPE = (1024, 1280)


def pairs(spectrum: Tensor, tokens: int = 512, seed: int = 0, shape: tuple[int, int] = SHAPE) -> list[tuple]:
    """Make four micro-batches `(x, dy)` whose `sum dy^T x` has exactly the singular values `spectrum`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, k: torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
    rank = spectrum.shape[0]
    U, V, mix = draw(shape[0], rank), draw(shape[1], rank), draw(tokens, rank)
    dy, x = (mix * spectrum.float()) @ U.T, mix @ V.T
    return list(zip(x.chunk(4), dy.chunk(4), strict=True))


def run(estimator: SketchedGradient | ExactGradient, data: list[tuple], weight: float = 1.0) -> None:
    for x, dy in data:
        estimator.add(x, dy, weight)
    if estimator.sketched:
        estimator.turn()
        for x, dy in data:
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
    (estimator,) = make_estimators([("layer", SHAPE)], LoRAGAConfig(probe_seed=seed), r).values()
    assert estimator.sketched
    run(estimator, data)
    top, G = estimator.svd(2 * r), gradient(data)
    for low, high in ((0, r), (r, 2 * r), (0, 2 * r)):
        assert energy_kept(G, top, S, low, high) > 0.99, (low, high)
    assert top.kept == pytest.approx(energy_kept(G, top, S, 0, 2 * r), abs=0.02)
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
    assert top.kept < 0.97


def test_equals_the_exact_estimator_when_k_reaches_the_rank() -> None:
    data = pairs(torch.linspace(2.0, 1.0, 24))
    sketch, exact = SketchedGradient(SHAPE, k=48), ExactGradient(SHAPE)
    run(sketch, data)
    run(exact, data)
    found = sketch.svd(24)
    torch.testing.assert_close(found.S, torch.linspace(2.0, 1.0, 24), rtol=2e-5, atol=0)
    # fp32 sums over 512 tokens: relative error of a few 1e-6.
    assert ((found.U * found.S) @ found.Vt - exact.G).norm() < 2e-5 * exact.G.norm()
    assert found.kept == pytest.approx(1.0, abs=1e-6)


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
    for estimator, half in ((left, data[:2]), (right, data[2:])):
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
    assert b.kept == pytest.approx(a.kept, abs=1e-4)
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
    assert estimator.T.dtype is torch.bfloat16
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
    assert not torch.equal(first.T, other.T)
    assert first.T.data_ptr() != again.T.data_ptr()


def test_layers_choose_the_cheaper_form_by_themselves() -> None:
    layers = [("small", (576, 576)), ("large", (2048, 2048))]
    chosen = make_estimators(layers, LoRAGAConfig(), rank=8)
    assert [estimator.sketched for estimator in chosen.values()] == [False, True]
    exact = make_estimators(layers, LoRAGAConfig(estimator="exact"), rank=8)
    assert not any(estimator.sketched for estimator in exact.values())
    assert sketch_columns(LoRAGAConfig(), 16) == 192
    # A sketch is smaller than what it replaces wherever it is chosen: 2 (k + 16) (in + out) numbers against in * out.
    for shape in ((1024, 1024), (2048, 5632), (4096, 128), (128256, 4096)):
        for k in (24, 96, 192):
            if is_sketched(shape, k):
                assert 2 * (k + 16) * sum(shape) < shape[0] * shape[1]


def test_a_sketch_too_small_for_the_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sketch_size=16 can't hold the 2r = 32 directions that layer up needs"):
        make_estimators([("up", (2048, 2048))], LoRAGAConfig(sketch_size=16), rank=16)


@pytest.mark.parametrize("kind", ["exact", "sketch"])
def test_a_restored_estimator_gives_bitwise_the_same(kind: str) -> None:
    data = pairs(SPECTRA["decaying"]()[:128], shape=(256, 320))
    estimator = ExactGradient((256, 320)) if kind == "exact" else SketchedGradient((256, 320), k=32)
    run(estimator, data)
    estimator.divide(3.0)
    again = restore_estimator({key: value.clone() for key, value in estimator.state().items()}, (256, 320))
    assert again.sketched == (kind == "sketch")
    for a, b in zip(estimator.svd(8)[:3], again.svd(8)[:3], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(KeyError, match="shape"):
        restore_estimator(estimator.state(), (320, 256))


def test_the_second_pass_computes_in_the_dtype_of_the_first() -> None:
    """Bases in bf16 from the start: nothing is cast, and so nothing kept twice, layer by layer."""
    data = [(x.bfloat16(), dy.bfloat16()) for x, dy in pairs(torch.tensor([3.0, 2.0, 1.0]))]
    estimator = SketchedGradient(SHAPE, k=32)
    for x, dy in data:
        estimator.add(x, dy, 1.0)
    estimator.turn()
    assert estimator.T.dtype is estimator.L.dtype is torch.bfloat16
    before = estimator.T
    estimator.add(*data[0], 1.0)
    assert estimator.T is before
