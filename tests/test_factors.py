"""Laws of the LoRA-GA and LoRA-One starts, in fp64 unless a test says otherwise. `m = min(out, in)`."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    best_rank,
    lora_ga_offset_training,
    lora_ga_reference,
    lora_ga_scale_reference,
    lora_one_reference,
    lora_pro_reference,
    own_directions,
    projection_A,
    projection_B,
)

from lora_ga_trainer.maths.factors import fix_signs, lora_ga_factors, lora_ga_scale, lora_one_factors


# name: (out, in, r, rank of G or None for full)
CASES = {
    "tall": (12, 7, 2, None),
    "wide": (7, 12, 2, None),
    "square": (9, 9, 3, None),
    "2r = min": (10, 6, 3, None),
    "2r = min + 1": (9, 7, 4, None),
    "2r > min, wide": (7, 11, 5, None),
    "r = min": (8, 5, 5, None),
    "r > min, tall": (9, 4, 7, None),
    "r > min, wide": (4, 9, 6, None),
    "one output": (1, 6, 2, None),
    "rank of G < 2r": (10, 8, 3, 4),
    "rank of G < r": (10, 8, 3, 1),
    "rank of G < r > min": (5, 6, 7, 2),
}
DISJOINT = [name for name, (out, in_, r, _) in CASES.items() if 2 * r <= min(out, in_)]
OVERLAPPING = [name for name, (out, in_, r, _) in CASES.items() if r <= min(out, in_) < 2 * r]
FULL_RANK = [name for name, (_, _, _, rank) in CASES.items() if rank is None]
RANDOM_ROWS = [name for name, (out, in_, r, _) in CASES.items() if r > min(out, in_)]
DIRECTIONS = ["ArB2r", "A2rBr", "ArBr", "random"]
SCALES = ["stable", "unit", "gd", "matched", "weight_svd"]
S_LORA = 1.7  # the LoRA scaling s wherever a test does not vary it: no power of two, not 1


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def make_gradient(out, in_, rank=None, seed=0):
    """Return G (out, in) with singular values 3, 1.5, .75, ...: gaps that no rounding closes."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(out, in_) if rank is None else rank
    spectrum = 3.0 * 0.5 ** torch.arange(rank, dtype=torch.float64)
    return orthonormal(out, rank, generator) @ spectrum.diag() @ orthonormal(in_, rank, generator).T


def make_case(name, seed=0):
    out, in_, r, rank = CASES[name]
    return make_gradient(out, in_, rank, seed), r


def make_weight(G, seed=1):
    return torch.randn(G.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def svd(G):
    return torch.linalg.svd(G, full_matrices=False)


def ga(G, r, seed=0, *, weight=None, **options):
    """Run the package on G's own SVD, signs fixed. `weight_svd` gets the singular values of `make_weight(G)`."""
    U, S, Vt = svd(G)
    U, Vt = fix_signs(U, Vt)
    if options.get("scale") == "weight_svd":
        options["weight_singular_values"] = torch.linalg.svdvals(make_weight(G)).to(G.dtype)
    return lora_ga_factors(U, S, Vt, r, generator=torch.Generator().manual_seed(seed), **options)


def one(G, r, seed=0, **options):
    """Run the package's LoRA-One on G's own SVD, signs fixed."""
    U, S, Vt = svd(G)
    U, Vt = fix_signs(U, Vt)
    return lora_one_factors(U, S, Vt, r, generator=torch.Generator().manual_seed(seed), **options)


def assert_near(actual, expected, size, tol=1e-12):
    """Assert that two matrices agree to `tol` times `size`, in the Frobenius norm."""
    distance = torch.linalg.norm(actual.double() - expected.double()).item()
    assert distance <= tol * float(size), f"off by {distance:.3e}, allowed {tol * float(size):.3e}"


def expected_first_step(G, A, r, c):
    """Return what `B0 B0^T G + G A0^T A0` must be: c^2 [G]_2r, and what A's random rows (past m) add of their own."""
    random_rows = A.double()[min(G.shape) :]
    return c**2 * best_rank(G, 2 * r) + G.double() @ random_rows.T @ random_rows


def assert_first_step_law(G, B, A, r, c, tol=1e-12):
    B64, A64, G64 = B.double(), A.double(), G.double()
    size = (c**2 + A64[min(G.shape) :].square().sum()) * torch.linalg.norm(G64)
    assert_near(B64 @ B64.T @ G64 + G64 @ A64.T @ A64, expected_first_step(G, A, r, c), size, tol)


# ---- LoRA-GA: where the first step goes


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CASES)
def test_first_step_is_the_best_rank_2r_gradient(name, direction):
    """B0 B0^T G + G A0^T A0 = c^2 [G]_2r for every scale; from 2r > m on that is c^2 G."""
    G, r = make_case(name)
    for scale in SCALES:
        B, A = ga(G, r, direction=direction, scale=scale, gamma=9.0, s=S_LORA)
        c = lora_ga_scale_reference(G.shape[0], r, 9.0, scale, S_LORA, make_weight(G))
        assert B.shape == (G.shape[0], r)
        assert A.shape == (r, G.shape[1])
        assert_first_step_law(G, B, A, r, c)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 9),
    in_=st.integers(1, 9),
    r=st.integers(1, 11),
    rank=st.integers(1, 9),
    direction=st.sampled_from(DIRECTIONS),
    gamma=st.floats(0.25, 256.0),
    seed=st.integers(0, 2**16),
)
def test_first_step_law_holds_for_every_shape(out, in_, r, rank, direction, gamma, seed):
    G = make_gradient(out, in_, min(rank, out, in_), seed)
    B, A = ga(G, r, seed, direction=direction, gamma=gamma)
    assert_first_step_law(G, B, A, r, out**0.25 / gamma**0.5)


@pytest.mark.parametrize(("direction", "scale"), [*zip(DIRECTIONS, SCALES, strict=False), ("ArB2r", "weight_svd")])
@pytest.mark.parametrize("name", FULL_RANK)
def test_an_sgd_step_moves_the_weight_along_the_best_rank_2r_gradient(name, direction, scale):
    """A real SGD step from net zero moves W by -lr s^2 c^2 [G]_2r; what is left over is of second order in lr."""
    out, in_, r, _ = CASES[name]
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(out, in_, generator=generator, dtype=torch.float64)
    x = torch.randn(20, in_, generator=generator, dtype=torch.float64)
    y = torch.randn(20, out, generator=generator, dtype=torch.float64)

    def loss(weight):
        return (x @ weight.T - y).square().mean()

    leaf = W.clone().requires_grad_(True)
    (G,) = torch.autograd.grad(loss(leaf), leaf)
    B0, A0 = ga(G, r, direction=direction, scale=scale, s=S_LORA)
    c = lora_ga_scale_reference(out, r, 16.0, scale, S_LORA, make_weight(G))

    def left_over(lr):
        B, A = torch.nn.Parameter(B0.clone()), torch.nn.Parameter(A0.clone())
        loss(W + S_LORA * (B @ A - B0 @ A0)).backward()
        torch.optim.SGD([B, A], lr=lr).step()
        moved = S_LORA * (B @ A - B0 @ A0).detach()
        return torch.linalg.norm(moved + lr * S_LORA**2 * expected_first_step(G, A0, r, c)).item() / lr

    # What is left over, per lr, is of order lr itself: small, and halved with it. A part that stays is a wrong step.
    at_lr, at_half = left_over(1e-4), left_over(5e-5)
    assert at_lr < 1e-2 * S_LORA**2 * c**2 * torch.linalg.norm(G)
    assert at_lr == pytest.approx(2 * at_half, rel=1e-6, abs=1e-9)


def test_gd_scale_takes_the_very_step_of_full_fine_tuning():
    """With c = 1/s and 2r >= rank(G) the first step is the full fine-tuning step: s^2 (B0 B0^T G + G A0^T A0) = G."""
    G = make_gradient(8, 6, rank=4)
    B, A = ga(G, 2, scale="gd", s=S_LORA)
    assert_near(S_LORA**2 * (B @ B.T @ G + G @ A.T @ A), G, torch.linalg.norm(G))


# ---- LoRA-GA: which directions each factor takes


def shares(G, B, A):
    """Return how much of each singular direction is in A and in B, (m,) each: diag(V^T A^T A V), diag(U^T B B^T U)."""
    U, _, Vt = svd(G)
    spectral_A = A[: min(G.shape)]
    of_A, of_B = Vt @ spectral_A.T @ spectral_A @ Vt.T, U.T @ B @ B.T @ U
    for gram in (of_A, of_B):
        assert_near(gram, gram.diag().diag(), 1.0)  # each row of A, each column of B, is one singular vector
    return of_A.diag(), of_B.diag()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", [name for name in DISJOINT if name in FULL_RANK])
def test_halves_are_disjoint_and_of_size_r(name, direction):
    G, r = make_case(name)
    in_A, in_B = shares(G, *ga(G, r, direction=direction, scale="unit"))
    I_A, I_B = set(in_A.round().nonzero().ravel().tolist()), set(in_B.round().nonzero().ravel().tolist())
    assert_near(in_A, in_A.round(), 1.0)
    assert_near(in_B, in_B.round(), 1.0)
    assert len(I_A) == len(I_B) == r
    assert sorted(I_A | I_B) == list(range(2 * r))
    if direction != "random":
        own_A, own_B = own_directions(direction, r, min(G.shape))
        assert sorted(I_A) == own_A
        assert sorted(I_B) == own_B


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", OVERLAPPING)
def test_overlapping_halves_share_exactly_what_is_missing(name, direction):
    """r <= m < 2r: r directions in each factor, 2r - m of them in both at half the energy, none left out."""
    G, r = make_case(name)
    m = min(G.shape)
    in_A, in_B = shares(G, *ga(G, r, direction=direction, scale="unit"))
    assert_near(in_A + in_B, torch.ones(m), 1.0)
    assert sorted((2 * in_A).round().tolist()) == [0.0] * (m - r) + [1.0] * (2 * r - m) + [2.0] * (m - r)
    assert_near(2 * in_A, (2 * in_A).round(), 1.0)
    if direction != "random":  # what is A's own by the direction's rule may be shared with B, but never lost to it
        own_A, own_B = own_directions(direction, r, m)
        assert (in_A[own_A] > 0.4).all()
        assert (in_B[own_B] > 0.4).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", RANDOM_ROWS)
def test_rank_above_min_fills_a_with_the_usual_start_and_b_with_zeros(name, direction):
    G, r = make_case(name)
    m, in_ = min(G.shape), G.shape[1]
    B, A = ga(G, r, direction=direction, scale="unit")
    in_A, in_B = shares(G, B, A)
    assert_near(in_A, torch.full((m,), 0.5), 1.0)
    assert_near(in_B, torch.full((m,), 0.5), 1.0)
    assert not B[:, m:].any()
    assert (A[m:].abs() > 0).all()  # zero rows against zero columns would never learn
    assert (A[m:].abs() <= in_**-0.5).all()


def test_random_rows_are_kaiming_uniform():
    """U(-1/sqrt in, 1/sqrt in): mean 0, variance 1/(3 in), the whole interval used; 4e5 draws, 3 standard errors."""
    in_ = 100
    _, A = ga(make_gradient(1, in_), 4001)
    drawn = A[1:] * math.sqrt(in_)
    assert drawn.mean().abs() < 3 * (1 / 3 / drawn.numel()) ** 0.5
    assert abs(drawn.square().mean() - 1 / 3) < 3 * (4 / 45 / drawn.numel()) ** 0.5
    assert drawn.max() > 0.999
    assert drawn.min() < -0.999


def test_only_the_top_2r_triplets_are_used():
    G = make_gradient(12, 9)
    U, S, Vt = svd(G)
    for direction in DIRECTIONS:
        whole = lora_ga_factors(U, S, Vt, 3, direction=direction, generator=torch.Generator().manual_seed(0))
        top = lora_ga_factors(
            U[:, :6], S[:6], Vt[:6], 3, direction=direction, generator=torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(whole, top, rtol=0, atol=0)
    torch.testing.assert_close(
        lora_one_factors(U, S, Vt, 3), lora_one_factors(U[:, :3], S[:3], Vt[:3], 3), rtol=0, atol=0
    )


# ---- LoRA-GA: how long the vectors are


@pytest.mark.parametrize(
    ("scale", "options", "c"),
    [
        ("stable", {"out_features": 256, "r": 8, "gamma": 16.0}, 1.0),
        ("stable", {"out_features": 4096, "r": 8, "gamma": 16.0}, 2.0),
        ("stable", {"out_features": 4096, "r": 64, "gamma": 64.0, "s": 5.0}, 1.0),
        ("stable", {"out_features": 81, "r": 1, "gamma": 1.0}, 3.0),
        ("unit", {"out_features": 81, "r": 2, "gamma": 4.0, "s": 3.0}, 1.0),
        ("gd", {"out_features": 81, "r": 2, "gamma": 4.0, "s": 4.0}, 0.25),
        ("gd", {"out_features": 81, "r": 2, "gamma": 4.0, "s": 0.5}, 2.0),
        ("matched", {"out_features": 64, "r": 2, "gamma": 4.0, "in_features": 64, "s": 5.0}, 6**-0.5),
        ("matched", {"out_features": 50, "r": 8, "gamma": 4.0, "in_features": 100}, 1 / 3),
        ("weight_svd", {"out_features": 3, "r": 2, "gamma": 4.0, "spectrum": [9.0, 4.0, 1.0]}, 2.5),
        ("weight_svd", {"out_features": 3, "r": 3, "gamma": 4.0, "spectrum": [9.0, 4.0, 1.0]}, 2.0),
        ("weight_svd", {"out_features": 3, "r": 2, "gamma": 4.0, "spectrum": [9.0, 4.0, 1.0], "s": 4.0}, 1.25),
    ],
)
def test_scale_formulas(scale, options, c):
    spectrum = options.get("spectrum")
    got = lora_ga_scale(
        (options["out_features"], options.get("in_features", 7)),
        options["r"],
        gamma=options["gamma"],
        scale=scale,
        s=options.get("s", 1.0),
        weight_singular_values=None if spectrum is None else torch.tensor(spectrum, dtype=torch.float64),
    )
    assert isinstance(got, float)
    assert got == pytest.approx(c, rel=1e-14)


@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_a_and_columns_of_b_have_length_c(scale):
    G, r = make_case("tall")
    B, A = ga(G, r, scale=scale, gamma=9.0, s=S_LORA)
    c = lora_ga_scale_reference(G.shape[0], r, 9.0, scale, S_LORA, make_weight(G))
    identity = torch.eye(r, dtype=torch.float64)
    assert_near(A @ A.T, c**2 * identity, c**2)
    assert_near(B.T @ B, c**2 * identity, c**2)


@pytest.mark.parametrize(("out", "in_", "r"), [(96, 64, 4), (40, 200, 8), (128, 128, 1)])
def test_with_matched_scale_a_first_sign_step_is_as_long_as_from_plain_lora(out, in_, r):
    """The law that the scale is made for, in a simulation: PEFT's own draw of A, gradients of random signs."""
    generator = torch.Generator().manual_seed(0)
    sign = lambda *shape: torch.randint(0, 2, shape, generator=generator, dtype=torch.float64) * 2 - 1
    plain, ours = [], []
    for _ in range(40):
        G = torch.randn(out, in_, generator=generator, dtype=torch.float64)
        B, A = ga(G, r, scale="matched")
        ours.append((sign(out, r) @ A + B @ sign(r, in_)).square().mean())
        kaiming = (torch.rand(r, in_, generator=generator, dtype=torch.float64) * 2 - 1) / in_**0.5
        plain.append((sign(out, r) @ kaiming).square().mean())
    # 40 draws of r * in squares of a uniform number, whose spread is .9 of their mean: 1.8% for the least r.
    bound = 4 * 0.9 / (40 * r * in_) ** 0.5 + 0.01
    mean = lambda values: torch.stack(values).mean().item()
    assert mean(ours) == pytest.approx(mean(plain), rel=bound)


# ---- LoRA-GA: agreement with the twin, invariances


@pytest.mark.parametrize(
    ("direction", "scale"), [("ArB2r", "stable"), ("A2rBr", "unit"), ("ArBr", "gd"), ("ArB2r", "weight_svd")]
)
@pytest.mark.parametrize("name", FULL_RANK)
def test_agrees_with_the_reference(name, direction, scale):
    """Signs are fixed on both sides, so even B0 A0 agrees. A's random rows, met by zero columns of B, stay out."""
    G, r = make_case(name)
    m = min(G.shape)
    B, A = ga(G, r, direction=direction, scale=scale, gamma=9.0, s=S_LORA)
    B_slow, A_slow = lora_ga_reference(G, r, 9.0, direction, scale, S_LORA, make_weight(G))
    c = lora_ga_scale_reference(G.shape[0], r, 9.0, scale, S_LORA, make_weight(G))
    assert_near(B, B_slow, c, 1e-11)
    assert_near(A[:m], A_slow[:m], c, 1e-11)


@pytest.mark.parametrize("k", [1e-8, 1e-3, 1e6, -1.0])
@pytest.mark.parametrize("name", ["tall", "wide", "2r = min", "2r = min + 1", "r > min, wide"])
def test_the_length_of_the_gradient_does_not_matter(name, k):
    G, r = make_case(name)
    B, A = ga(G, r)
    B_k, A_k = ga(k * G, r)
    assert_near(B_k @ B_k.T, B @ B.T, torch.linalg.norm(B) ** 2, 1e-11)
    assert_near(A_k.T @ A_k, A.T @ A, torch.linalg.norm(A) ** 2, 1e-11)
    B, A = one(G, r)
    B_k, A_k = one(k * G, r)
    m = min(G.shape)
    assert_near(B_k @ A_k, math.copysign(1, k) * B @ A, torch.linalg.norm(B @ A), 1e-11)
    assert_near(B_k @ B_k.T, B @ B.T, torch.linalg.norm(B @ B.T), 1e-11)
    assert_near(A_k[:m].T @ A_k[:m], A[:m].T @ A[:m], torch.linalg.norm(A[:m].T @ A[:m]), 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_signs_of_singular_pairs_do_not_matter(name):
    """Flips leave A^T A and B B^T; after `fix_signs` they leave A and B themselves, so B0 A0 agrees on all ranks."""
    G, r = make_case(name)
    U, S, Vt = svd(G)
    flips = torch.tensor([-1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[: len(S)]
    makers = [lora_one_factors, *(partial(lora_ga_factors, direction=direction) for direction in DIRECTIONS)]
    for make in makers:

        def run(U, Vt, make=make):
            return make(U, S, Vt, r, generator=torch.Generator().manual_seed(0))

        (B, A), (B_flipped, A_flipped) = run(U, Vt), run(U * flips, flips[:, None] * Vt)
        torch.testing.assert_close(A_flipped.T @ A_flipped, A.T @ A)
        torch.testing.assert_close(B_flipped @ B_flipped.T, B @ B.T)
        fixed, fixed_flipped = run(*fix_signs(U, Vt)), run(*fix_signs(U * flips, flips[:, None] * Vt))
        torch.testing.assert_close(fixed_flipped, fixed, rtol=0, atol=0)


def test_fix_signs_makes_the_largest_entry_of_each_u_positive_and_keeps_the_product():
    for name in CASES:
        G, _ = make_case(name)
        U, S, Vt = svd(-G)
        U_before, Vt_before = U.clone(), Vt.clone()
        U_fixed, Vt_fixed = fix_signs(U, Vt)
        rows = U_fixed.abs().argmax(dim=0)
        assert (U_fixed[rows, range(len(S))] > 0).all()
        torch.testing.assert_close(U_fixed.abs(), U.abs(), rtol=0, atol=0)
        torch.testing.assert_close(U_fixed * S @ Vt_fixed, U * S @ Vt, rtol=0, atol=1e-14)
        torch.testing.assert_close(fix_signs(U_fixed, Vt_fixed), (U_fixed, Vt_fixed), rtol=0, atol=0)
        torch.testing.assert_close((U, Vt), (U_before, Vt_before), rtol=0, atol=0)  # pure: its input is not written


def test_fix_signs_keeps_the_row_of_a_zero_column():
    """A u that is all zero has no sign; its v must come through, not be multiplied by sign(0)."""
    U = torch.tensor([[0.6, 0.0], [-0.8, 0.0]], dtype=torch.float64)
    Vt = torch.eye(2, 3, dtype=torch.float64)
    U_fixed, Vt_fixed = fix_signs(U, Vt)
    torch.testing.assert_close(U_fixed[:, 0], torch.tensor([-0.6, 0.8], dtype=torch.float64))
    torch.testing.assert_close(Vt_fixed.abs(), Vt)


# ---- chance


def test_random_split_follows_its_generator_and_nothing_else():
    G = make_gradient(30, 24)
    before = torch.random.get_rng_state()
    first, again = ga(G, 6, seed=5, direction="random"), ga(G, 6, seed=5, direction="random")
    others = [ga(G, 6, seed=seed, direction="random") for seed in range(6, 12)]
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert all(torch.linalg.norm(A.T @ A - first[1].T @ first[1]) > 0.1 for _, A in others)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_random_split_gives_every_direction_to_either_factor():
    """Over 200 seeds each of the 2r directions is A's about half of the time; the bound is four standard errors."""
    G = make_gradient(8, 8)
    counts = sum(shares(G, *ga(G, 2, seed=seed, direction="random", scale="unit"))[0].round() for seed in range(200))
    assert ((counts[:4] - 100).abs() < 4 * 200**0.5 / 2).all()
    assert not counts[4:].any()


def test_random_rows_follow_their_generator_and_nothing_else():
    G, r = make_case("r > min, wide")
    m = min(G.shape)
    before = torch.random.get_rng_state()
    for make in (ga, one):
        (B, A), (B_again, A_again), (B_other, A_other) = make(G, r, seed=1), make(G, r, seed=1), make(G, r, seed=2)
        torch.testing.assert_close((B_again, A_again), (B, A), rtol=0, atol=0)
        torch.testing.assert_close((B_other, A_other[:m]), (B, A[:m]), rtol=0, atol=0)
        assert (A_other[m:] != A[m:]).all()
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- LoRA-One


@pytest.mark.parametrize("gamma", [1.0, 128.0])
@pytest.mark.parametrize("name", CASES)
def test_lora_one_starts_at_one_normalised_gradient_step(name, gamma):
    """
    B A = -[G]_r / (gamma S[0]), spread evenly: B^T B = A A^T = diag(S / S[0]) / gamma.

    Beyond the rank of G the rule gives zeros in both factors, which would never learn: there A starts at random.
    """
    G, r = make_case(name)
    B, A = one(G, r, gamma=gamma)
    S = torch.linalg.svdvals(G)
    m = min(r, int(torch.linalg.matrix_rank(G)))
    assert B.shape == (G.shape[0], r)
    assert A.shape == (r, G.shape[1])
    assert_near(B @ A, -best_rank(G, r) / (gamma * S[0]), 1 / gamma)
    energy = (S[:m] / S[0] / gamma).diag()
    assert_near(A[:m] @ A[:m].T, energy, 1 / gamma)
    assert_near(B[:, :m].T @ B[:, :m], energy, 1 / gamma)
    B_slow, A_slow = lora_one_reference(G, r, gamma)
    assert_near(B @ A, B_slow @ A_slow, 1 / gamma)
    assert not B[:, m:].any()
    assert (A[m:].abs() > 0).all()
    assert (A[m:].abs() <= G.shape[1] ** -0.5).all()


def test_lora_one_defaults_to_the_papers_gamma():
    G, r = make_case("tall")
    B, A = one(G, r)
    assert torch.linalg.matrix_norm(B @ A, 2).item() == pytest.approx(1 / 128, rel=1e-12)


@pytest.mark.parametrize("r", [1, 3, 6])
def test_lora_one_start_is_a_descent_step(r):
    """With s / (gamma S[0]) = 1/L on an L-smooth loss, the start is below the base by |[G]_r|^2 / 2L at least."""
    generator = torch.Generator().manual_seed(4)
    W, x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n, d in ((6, 8), (30, 8), (30, 6)))

    def loss(weight):
        return (x @ weight.T - y).square().sum() / 60

    leaf = W.clone().requires_grad_(True)
    (G,) = torch.autograd.grad(loss(leaf), leaf)
    smoothness = torch.linalg.eigvalsh(x.T @ x / 30)[-1].item()
    S = torch.linalg.svdvals(G)
    B, A = one(G, r, gamma=S_LORA * smoothness / S[0].item())
    promised = S[:r].square().sum() / (2 * smoothness)
    assert loss(W) - loss(W + S_LORA * B @ A) >= promised * (1 - 1e-12)


# ---- number formats


@pytest.mark.parametrize("name", CASES)
def test_fp32_obeys_the_same_laws(name):
    """fp32 in, fp32 out. Tolerance 64 eps = 8e-6: an SVD errs by a few eps and the gaps are factors of two."""
    G, r = make_case(name)
    tol = 64 * torch.finfo(torch.float32).eps
    G = G.float()
    for direction in DIRECTIONS:
        B, A = ga(G, r, direction=direction, s=S_LORA)
        assert B.dtype == A.dtype == torch.float32
        assert_first_step_law(G, B, A, r, G.shape[0] ** 0.25 / 4.0, tol)
    B, A = one(G, r)
    assert B.dtype == A.dtype == torch.float32
    expected = -best_rank(G, r) / (128 * torch.linalg.matrix_norm(G.double(), 2))
    assert_near(B.double() @ A.double(), expected, 1 / 128, tol)


@pytest.mark.parametrize("make", [lora_ga_factors, lora_one_factors])
def test_factors_come_in_the_dtype_of_u_and_leave_their_input_alone(make):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        triplet = [t.to(dtype) for t in svd(make_gradient(5, 4))]
        before = [t.clone() for t in triplet]
        B, A = make(*triplet, 6, generator=torch.Generator().manual_seed(0))
        assert B.dtype == A.dtype == dtype
        torch.testing.assert_close(triplet, before, rtol=0, atol=0)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"direction": "ArB3r"}, "ArB3r"),
        ({"scale": "stabel"}, "stabel"),
        ({"gamma": 0.0}, r"\b0"),
        ({"gamma": -2.5}, r"-2\.5"),
        ({"r": 0}, r"\b0\b"),
        ({"r": -3}, r"-3"),
        ({"r": 4}, r"\b7\b.*\b8\b|\b8\b.*\b7\b"),  # k = 7 triplets, 2r = 8 needed
        ({"scale": "weight_svd"}, "weight_singular_values"),
    ],
)
def test_lora_ga_names_what_it_refuses(options, named):
    U, S, Vt = svd(make_gradient(12, 9))
    with pytest.raises(ValueError, match=named):
        lora_ga_factors(U[:, :7], S[:7], Vt[:7], **{"r": 3, **options})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gamma": 0.0}, r"\b0"),
        ({"gamma": -2.5}, r"-2\.5"),
        ({"r": 0}, r"\b0\b"),
        ({"r": 8}, r"\b7\b.*\b8\b|\b8\b.*\b7\b"),
    ],
)
def test_lora_one_names_what_it_refuses(options, named):
    U, S, Vt = svd(make_gradient(12, 9))
    with pytest.raises(ValueError, match=named):
        lora_one_factors(U[:, :7], S[:7], Vt[:7], **{"r": 3, **options})


def test_weight_svd_refuses_a_spectrum_that_is_too_short():
    """A mean over fewer than min(r, out, in) singular values is another number; W never has more than min(out, in)."""
    G, W = make_gradient(12, 4), make_weight(make_gradient(12, 4))
    spectrum = torch.linalg.svdvals(W)
    lora_ga_factors(*svd(G), 3, scale="weight_svd", weight_singular_values=spectrum[:3])
    lora_ga_factors(*svd(G), 6, scale="weight_svd", weight_singular_values=spectrum)
    for r, given_values in ((3, 2), (6, 3)):
        with pytest.raises(ValueError, match=rf"\b{given_values}\b"):
            lora_ga_factors(*svd(G), r, scale="weight_svd", weight_singular_values=spectrum[:given_values])


@pytest.mark.parametrize(("make", "pairs"), [(lora_ga_factors, 2), (lora_one_factors, 1)])
@pytest.mark.parametrize("r", [1, 3, 4, 5, 9, 12])
def test_the_fewest_triplets_give_what_all_of_them_give(make, pairs, r):
    """k = min(2r, out, in) for LoRA-GA, k = min(r, out, in) for LoRA-One, are enough; one fewer is refused."""
    U, S, Vt = svd(make_gradient(12, 9))
    k = min(pairs * r, 9)

    def factors(count):
        return make(U[:, :count], S[:count], Vt[:count], r, generator=torch.Generator().manual_seed(0))

    for fewest, all_of_them in zip(factors(k), factors(9), strict=True):
        torch.testing.assert_close(fewest, all_of_them, rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"\b{k - 1}\b.*\b{k}\b|\b{k}\b.*\b{k - 1}\b"):
        factors(k - 1)


def test_a_zero_gradient_never_becomes_nan():
    """S[0] = 0 has no normalised step. Refused by name or finite, never 0/0 written into a model."""
    U, S, Vt = svd(torch.zeros(6, 5, dtype=torch.float64))
    for make in (lora_ga_factors, lora_one_factors):
        try:
            B, A = make(U, S, Vt, 2)
        except ValueError:
            continue
        assert B.isfinite().all()
        assert A.isfinite().all()


# ---- the twins themselves, against torch and against the theorems' own right-hand sides


@pytest.mark.parametrize("name", CASES)
def test_twin_best_rank_leaves_the_tail_energy(name):
    G, r = make_case(name)
    tail = torch.linalg.svdvals(G)[r:].square().sum()
    assert torch.linalg.norm(G - best_rank(G, r)).square().item() == pytest.approx(tail.item(), abs=1e-13)


def test_twin_adamw_is_torchs_adamw():
    G, r = make_case("tall")
    W = make_weight(G)
    target = make_weight(G, seed=7)
    B0, A0 = lora_ga_reference(G, r, s=S_LORA)

    def loss(weight):
        return (weight - target).pow(4).mean()

    B, A = torch.nn.Parameter(B0.clone()), torch.nn.Parameter(A0.clone())
    optimizer = torch.optim.AdamW([B, A], lr=3e-2, weight_decay=0.0)
    base = W - S_LORA * B0 @ A0
    for _ in range(50):
        optimizer.zero_grad()
        loss(base + S_LORA * B @ A).backward()
        optimizer.step()
    slow = lora_ga_offset_training(W, B0, A0, S_LORA, loss, 50, lr=3e-2)
    assert_near(slow, (base + S_LORA * B @ A).detach(), torch.linalg.norm(W))
    assert torch.linalg.norm(slow - W) > 0.1 * torch.linalg.norm(W)
    torch.testing.assert_close(lora_ga_offset_training(W, B0, A0, S_LORA, loss, 0), W)


@pytest.mark.parametrize("rank_of_B", [0, 1, None])
@pytest.mark.parametrize(("out", "in_", "r"), [(7, 5, 2), (5, 8, 3), (4, 4, 4), (3, 6, 5)])
def test_twin_lora_pro_is_the_projected_gradient(out, in_, r, rank_of_B):
    """The least-squares optimum is P_B G + (I - P_B) G P_A, also for dependent columns of B and for B = 0."""
    generator = torch.Generator().manual_seed(0)
    G, A, B = (torch.randn(shape, generator=generator).double() for shape in ((out, in_), (r, in_), (out, r)))
    B = B if rank_of_B is None else best_rank(B, rank_of_B)
    P_B, P_A = projection_B(B), projection_A(A)
    assert_near(lora_pro_reference(A, B, G, S_LORA), P_B @ G + (G - P_B @ G) @ P_A, torch.linalg.norm(G))
