"""
A thousand random layers go through the real estimators and the real factor functions: whatever their shape, spectrum,
size and dtype, the factors are finite and obey their laws, and no more is asked of them than rounding allows.

`u` is the rounding unit of fp32, 2^-24. An SVD in fp32 is that of `G + E` with `||E|| <= 100 u ||G||` (measured: at
most 12 u), so what the factors of the best rank-k approximation leave over is that of `G` itself to `2 ||E||`. The
matrix `[G]_k` turns with `E` over the gap: by at most `(2 + 4 S[k-1] / (S[k-1] - S[k])) ||E||` (Wedin).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import reference
import torch
from test_sketch import run
from torch import Tensor

from lora_ga_trainer import LoRAGAConfig
from lora_ga_trainer.gradients.accumulator import ExactGradient
from lora_ga_trainer.gradients.sketch import SketchedGradient, make_accumulators
from lora_ga_trainer.maths.factors import lora_ga_scale
from lora_ga_trainer.maths.inits import INITS, LayerGradient
from lora_ga_trainer.maths.recovery import TopSVD


U = 2.0**-24
SVD_ERROR = 100 * U
KINDS = ("noise", "low rank", "one dominant", "flat", "decaying")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT, SKETCHED = 700, 300


@dataclass
class Layer:
    """One random layer: micro-batches `(x (n, in), dy (n, out))`, and `G = sum dy^T x` of them in fp64."""

    r: int
    kind: str
    dtype: torch.dtype
    data: list[tuple[Tensor, Tensor]]
    G: Tensor

    @property
    def size(self) -> float:
        """`|| sum |dy|^T |x| ||`, what rounding errors of the sum are relative to."""
        return sum(dy.double().abs().T @ x.double().abs() for x, dy in self.data).norm().item()


def spectrum(kind: str, rank: int, generator: torch.Generator) -> Tensor:
    rest = torch.rand(rank, generator=generator).sort(descending=True).values
    if kind == "one dominant":
        return torch.cat([torch.ones(1), 1e-3 * rest[1:]])
    return {"low rank": 0.2 + rest, "flat": torch.ones(rank), "decaying": 1 / torch.arange(1, rank + 1.0)}[kind]


def make_layer(seed: int, smallest: int, ranks: tuple[int, ...]) -> Layer:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    out_features, in_features = (round(smallest * (512 / smallest) ** rng.random()) for _ in range(2))
    r, kind, dtype, tokens = rng.choice(ranks), rng.choice(KINDS), rng.choice(DTYPES), rng.randint(16, 96)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    if kind == "noise":
        x, dy = draw(tokens, in_features), draw(tokens, out_features)
    else:
        rank = min(tokens, out_features, in_features)
        rank = rng.randint(1, min(rank, 6 * r)) if kind == "low rank" else rank
        basis = lambda rows: torch.linalg.qr(draw(rows, rank)).Q
        mix = basis(tokens)
        dy, x = (mix * spectrum(kind, rank, generator)) @ basis(out_features).T, mix @ basis(in_features).T
    for side in (x, dy):  # features that no token has, and tokens that count for nothing
        side[:, torch.rand(side.shape[1], generator=generator) < rng.choice([0, 0, 0.3])] = 0
        side[torch.rand(tokens, generator=generator) < rng.choice([0, 0, 0.3])] = 0
    # The least normal number of fp16 is 6e-5, the largest 65504; entries are up to about 5 before scaling.
    least, most = (-2, 3) if dtype is torch.float16 else (-15, 15)
    x, dy = (10 ** rng.uniform(least, most) * side for side in (x, dy))
    x, dy = x.to(dtype), dy.to(dtype)
    return Layer(r, kind, dtype, list(zip(x.chunk(16), dy.chunk(16), strict=True)), dy.double().T @ x.double())


def norm(matrix: Tensor) -> float:
    return matrix.norm().item()


def turned_by(S: Tensor, k: int) -> float:
    """How much more than `E` the best rank-k approximation moves when `G` becomes `G + E`; infinite without a gap."""
    if k >= len(S):
        return 2.0
    return 2 + 4 * S[k - 1].item() / max((S[k - 1] - S[k]).item(), 1e-300)


def assert_best(G: Tensor, S: Tensor, X: Tensor, k: int, error: float) -> None:
    """`X`, of rank at most `k`, is a best approximation of `G (out, in)`, and the only one where there is a gap."""
    tail = S[k:].norm().item()
    assert norm(G - X) <= tail + 2 * error * norm(G)
    allowed = turned_by(S, k) * error * norm(G)
    if allowed < norm(G):
        assert norm(X - reference.best_rank(G, k)) <= allowed


def svd_error(S: Tensor, k: int) -> float:
    """
    Return the error of the top `k` triplets of an exact estimator, relative to `|| G ||`.

    A matrix of more than `6 k` rows and columns is known by subspace iteration with `6 k` columns, whose 13 products
    leave `(S[6k] / S[k-1])^13` of what they should suppress: below `u` at a ratio of 0.25. At a ratio near 1 that is
    no small number, but then it hardly matters which of these directions are taken (measured: at most 4e-4).
    """
    iterated = 6 * k < len(S) and S[6 * k] > 0.25 * S[k - 1]
    return 1e-3 if iterated else SVD_ERROR


def gradient_of(name: str, top: TopSVD, r: int) -> LayerGradient:
    config = LoRAGAConfig(init=name)
    settings = {"gamma": config.gamma, "direction": config.direction, "scale": config.scale}
    plain = torch.ones(r, top.Vt.shape[1])
    return LayerGradient(top, r, 2.0, **settings, generator=torch.Generator().manual_seed(0), plain_rows=plain)


def start(name: str, estimator: ExactGradient | SketchedGradient, layer: Layer) -> tuple[Tensor, Tensor]:
    """Return `B0 (out, r)`, `A0 (r, in)` as a training run computes them, in fp64; rows drawn at random left out."""
    out_features, in_features = layer.G.shape
    top = estimator.svd(min(2 * layer.r, out_features, in_features))
    B, A = INITS[name].factors(gradient_of(name, top, layer.r))
    assert B.shape == (out_features, layer.r)
    assert A.shape == (layer.r, in_features)
    assert torch.isfinite(B).all()
    assert torch.isfinite(A).all()
    assert A.any(dim=1).all() or not layer.G.any()
    return B.double(), A.double()


def check_exact(layer: Layer) -> None:
    (estimator,) = make_accumulators([("layer", layer.G.shape)], LoRAGAConfig(estimator="exact"), layer.r).values()
    run(estimator, layer.data)
    # fp32: each of at most 96 products and sums rounds once. bf16: each of 16 products is rounded to 8 bits as well.
    rounding = 100 * U + (2.0**-8 if layer.dtype is torch.bfloat16 else 0)
    assert norm(estimator.G.double() - layer.G) <= rounding * layer.size
    G, r = estimator.G.double(), layer.r  # from here on in fp32: the laws are those of the sum
    S, c, m = torch.linalg.svdvals(G), lora_ga_scale(tuple(G.shape), r), min(G.shape)
    error = svd_error(S, min(2 * r, m))
    B, A = start("lora_ga", estimator, layer)
    A = A[:m]  # B is zero where A's rows are random, and such rows are no part of the law
    assert_best(G, S, (B @ (B.T @ G) + (G @ A.T) @ A) / c**2, 2 * r, error)
    B, A = start("lora_one", estimator, layer)
    # B0 A0 = -[G]_r / (gamma S[0]); pairs below 2 u S[0] are not pairs of G any more, and left out.
    assert_best(G, S, -128.0 * S[0] * (B @ A), r, error + 2 * U * math.sqrt(r))


def shares(G: Tensor, U: Tensor, V: Tensor) -> float:
    """Energy that `k` directions hold, relative to the best `k`: the worse side."""
    best = torch.linalg.svdvals(G)[: U.shape[1]].square().sum()
    return (min(norm(U.T @ G) ** 2, norm(G @ V) ** 2) / best).item()


def check_sketched(layer: Layer) -> tuple[float, float]:
    """Return the energy that was missed and the one that was reported missed."""
    (estimator,) = make_accumulators([("layer", layer.G.shape)], LoRAGAConfig(), layer.r).values()
    assert estimator.sketched
    run(estimator, layer.data)
    top, r = estimator.svd(2 * layer.r), layer.r
    assert torch.isfinite(top.S).all()
    assert 0 < top.kept(0, len(top.S)) <= 1
    eye = torch.eye(2 * r, dtype=torch.float64)
    for basis in (top.U.double(), top.Vt.double().T):
        assert norm(basis.T @ basis - eye) <= SVD_ERROR * math.sqrt(2 * r)
    B, A = start("lora_ga", estimator, layer)
    c = lora_ga_scale(tuple(layer.G.shape), r)
    for gram in (B.T @ B, A @ A.T):  # orthogonal directions, all of the one length
        assert norm(gram / c**2 - eye[:r, :r]) <= SVD_ERROR * math.sqrt(r)
    B, A = start("lora_one", estimator, layer)
    live = B.any(dim=0)  # beyond the rank of G, A's rows are random and B is zero
    assert norm((B.T @ B - A @ A.T)[live][:, live]) <= SVD_ERROR * norm(A @ A.T)
    # What is found is there: no singular value stands much above the largest of G.
    largest = torch.linalg.matrix_norm(layer.G, 2).item()
    assert top.S[0].item() <= 2 * largest
    rank = torch.linalg.matrix_rank(layer.G, rtol=1e-6).item()
    if rank <= estimator.k // 2:
        # Blind sketches of fp32 products lose u times their condition; what falls below 1e-4 S[0] is taken for noise.
        error = 2.0**-6 if layer.dtype is torch.bfloat16 else 2e-4
        X = top.U.double() @ torch.diag(top.S.double()) @ top.Vt.double()
        assert norm(layer.G - X) <= norm(layer.G - reference.best_rank(layer.G, 2 * r)) + error * norm(layer.G)
    return 1 - shares(layer.G, top.U.double(), top.Vt.double().T), 1 - top.kept(0, len(top.S))


def test_exact_gradients_of_any_layer() -> None:
    zero = 0
    for seed in range(EXACT):
        layer = make_layer(seed, 1, tuple(range(1, 17)))
        if layer.G.any():
            check_exact(layer)
        else:
            zero += 1
    assert zero < EXACT // 10


def test_sketched_gradients_of_any_layer() -> None:
    """
    What a sketch missed is within a factor of what it says it missed, in all but one of a hundred: 16 columns measure
    that energy, with a standard deviation of a third, and the best directions, which it is relative to, are not known.
    (2 of 300 were outside, .072 against .008 the worse, with 8 and 16 columns on flat spectra.)
    """
    missed = [check_sketched(make_layer(10_000 + seed, 200, (1, 2))) for seed in range(SKETCHED)]
    outside = [(true, reported) for true, reported in missed if true > 0.02 + 2.5 * reported]
    assert len(outside) <= SKETCHED // 100, outside
    assert all(true <= 0.1 + 2.5 * reported for true, reported in outside), outside


# --- at the ends of fp32 ---------------------------------------------------------------------------------------------


def layer_of_size(exponent: int, sketched: bool) -> ExactGradient | SketchedGradient:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(32, n, generator=generator) for n in (120, 140))
    estimator = SketchedGradient((140, 120), k=24) if sketched else ExactGradient((140, 120))
    half = 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
    run(estimator, [(a * half[0], b * half[1]) for a, b in zip(x.chunk(4), dy.chunk(4), strict=True)])
    return estimator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-90, -50, 50])
def test_what_a_sketch_keeps_does_not_depend_on_the_unit_of_the_loss(exponent: int, dtype: torch.dtype) -> None:
    """A factor of a power of two rounds nothing, in bf16 neither, whose squares go under in fp32 from 2^-75 on."""
    kept = []
    for power in (0, exponent):
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(32, n, generator=generator).to(dtype) for n in (120, 140))
        estimator = SketchedGradient((140, 120), k=24)
        run(estimator, list(zip(x.chunk(4), (dy * 2.0**power).chunk(4), strict=True)))
        top = estimator.svd(4)
        kept.append((top.kept(0, 2), top.kept(2, 4), top.total / 4.0**power))
    assert kept[1] == pytest.approx(kept[0], rel=1e-5)
    assert kept[0][0] < 0.999


@pytest.mark.parametrize("sketched", [False, True])
@pytest.mark.parametrize("exponent", [-160, -151, -149, -146, -140, -132, -126, -110, 110])
def test_a_gradient_that_goes_under_in_fp32_is_zero_or_a_start(exponent: int, sketched: bool) -> None:
    """
    Below 2^-126 numbers of fp32 lose bits one by one until, below 2^-149, nothing is left. Then `S[0]` is zero, which
    starts the layer as plain LoRA; before that the factors are finite and of the length that they always have.
    """
    estimator = layer_of_size(exponent, sketched)
    top = estimator.svd(4)
    assert torch.isfinite(top.S).all()
    assert 0 <= top.kept(0, len(top.S)) <= 1
    if not top.S[0] > 0:
        assert exponent < -140
        return
    for name, init in INITS.items():
        B, A = init.factors(gradient_of(name, top, 2))
        assert torch.isfinite(B).all()
        assert torch.isfinite(A).all()
        longest = {"lora_ga": 140**0.25 / 4, "lora_one": 128**-0.5, "gradient_directions": A.shape[1] ** 0.5}[name]
        assert A.norm(dim=1).max().item() == pytest.approx(longest, rel=1e-4)
    if exponent >= -110:  # no number that counts is below 2^-126
        plain = layer_of_size(0, sketched).svd(4)
        torch.testing.assert_close(top.U @ top.U.T, plain.U @ plain.U.T, atol=1e-3, rtol=0)
        assert top.kept(0, len(top.S)) == pytest.approx(plain.kept(0, len(plain.S)), abs=1e-3)
        assert top.S[0].item() / 2.0**exponent == pytest.approx(plain.S[0].item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(8, 8), (32, 40)])
def test_a_number_near_the_end_of_fp32_overflows_in_no_product(shape: tuple[int, int]) -> None:
    """Sketches of such a gradient are infinite, which the probe refuses by name; a whole one is still in range."""
    estimator = ExactGradient(shape)
    estimator.G[1, 2], estimator.G[3, 4] = 3e38, 1e38
    top = estimator.svd(2)
    torch.testing.assert_close(top.S / 1e38, torch.tensor([3.0, 1.0]))
    assert top.U[1, 0].abs().item() == pytest.approx(1.0)
