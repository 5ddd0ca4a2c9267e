"""The corrected gradients obey the theorem they come from, for every shape, scale and degeneracy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    lora_pro_correction_reference,
    lora_pro_damped_reference,
    lora_pro_reference,
    projection_A,
    projection_B,
    shortest_length,
)

from lora_ga_trainer import correct_gradients
from lora_ga_trainer.maths.factors import lora_ga_factors, lora_one_factors


CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def case(out, in_, r, s=1.0, seed=0, scale_A=1.0, scale_B=1.0, scale_G=1.0):
    """Factors, a gradient of the weight, and the gradients of the factors that autograd would give."""
    generator = torch.Generator().manual_seed(seed)
    A = scale_A * torch.randn(r, in_, generator=generator, dtype=torch.float64)
    B = scale_B * torch.randn(out, r, generator=generator, dtype=torch.float64)
    G = scale_G * torch.randn(out, in_, generator=generator, dtype=torch.float64)
    return A, B, G, s * B.T @ G, s * G @ A.T


def reaching(A, B):
    """`B` with no direction shorter than `A` at its shortest: there the theorem holds as it stands."""
    U, lengths, Vt = torch.linalg.svd(B, full_matrices=False)
    return U @ torch.diag(lengths.clamp(min=1.001 * shortest_length(A))) @ Vt


def reaching_case(out, in_, r, s=1.0, seed=0):
    A, B, G, _, gB = case(out, in_, r, s, seed)
    B = reaching(A, B)
    return A, B, G, s * B.T @ G, gB


def equivalent(A, B, dA, dB, s):
    return s * (B @ dA + dB @ A)


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6))
scalings = st.floats(1 / 32, 32)
seeds = st.integers(0, 2**31)
lengths = st.sampled_from([1e-12, 1e-6, 1e-3, 0.1, 0.5, 1.0, 30.0])


@settings(deadline=None, max_examples=60)
@given(shapes, scalings, seeds)
def test_the_step_is_the_nearest_to_the_full_gradient(shape, s, seed):
    """`s (B dA + dB A) = P_B G + (I - P_B) G P_A`, and it solves the least-squares problem of the theorem.

    By default where `B` is as long as `A`, with `floor=0` always.
    """
    for made, floor in ((reaching_case, {}), (case, {"floor": 0.0})):
        A, B, G, gA, gB = made(*shape, s=s, seed=seed)
        ours = equivalent(A, B, *correct_gradients(A, B, gA, gB, s, **floor), s)
        P_B, P_A = projection_B(B), projection_A(A)
        torch.testing.assert_close(ours, P_B @ G + (G - P_B @ G) @ P_A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, lora_pro_reference(A, B, G, s), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(shapes, scalings, seeds, lengths)
def test_where_B_is_short_its_projection_is_soft(shape, s, seed, scale_B):
    """`s (B dA + dB A) = H G + (I - H) G P_A`, whatever the length of `B`."""
    A, B, G, gA, gB = case(*shape, s=s, seed=seed, scale_B=scale_B)
    ours = equivalent(A, B, *correct_gradients(A, B, gA, gB, s), s)
    torch.testing.assert_close(ours, lora_pro_damped_reference(A, B, G), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(scalings, seeds, lengths)
def test_both_corrected_gradients_are_those_of_the_slow_twin(s, seed, scale_B):
    A, B, _, gA, gB = case(9, 7, 3, s=s, seed=seed, scale_B=scale_B)
    twin = lora_pro_correction_reference(A, B, gA, gB, s)
    size = torch.cat([change.flatten() for change in twin]).norm().item()
    for ours, theirs in zip(correct_gradients(A, B, gA, gB, s), twin, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * size)


@settings(deadline=None, max_examples=40)
@given(shapes, scalings, seeds, lengths)
def test_they_are_never_much_longer_than_the_plain_gradients(shape, s, seed, scale_B):
    """`|(dA, dB)| <= (2 + 1 / (s a)^2) |(gA, gB)|`, `a` the length of `A` at its shortest: no `1 / |B|` in it."""
    A, B, _, gA, gB = case(*shape, s=s, seed=seed, scale_B=scale_B)
    dA, dB = correct_gradients(A, B, gA, gB, s)
    bound = (2 + (s * shortest_length(A)) ** -2) * (gA.square().sum() + gB.square().sum()).sqrt()
    assert (dA.square().sum() + dB.square().sum()).sqrt() <= 1.0001 * bound


def test_they_tend_to_those_of_plain_loras_start():
    """As `B` goes to 0 in proportion to `t`, `dA` goes to 0 and `dB` to `G A^T (A A^T)^-1 / s`, both as `t` does."""
    A, B, G, _, gB = case(6, 8, 3, s=2.0)
    limit = G @ A.T @ torch.linalg.inv(A @ A.T) / 2.0
    found = []
    for t in (1e-3, 1e-6):
        dA, dB = correct_gradients(A, t * B, 2.0 * t * B.T @ G, gB, 2.0)
        found.append((dA / t, (dB - limit) / t))
    for near, nearer in zip(*found, strict=True):
        assert 0 < near.norm() < 10
        torch.testing.assert_close(near, nearer, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("start", ["lora_ga", "lora_one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_starts_from_a_gradient_are_not_damped(start, dtype):
    """Their factors are equally long, so the floor changes nothing but rounding."""
    _, _, G, _, _ = case(24, 16, 1)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    factors = lora_ga_factors(U, S, Vt, 4) if start == "lora_ga" else lora_one_factors(U, S, Vt, 4)
    B, A = (factor.to(dtype) for factor in factors)
    new = case(24, 16, 1, seed=1)[2].to(dtype)
    given_gradients = A, B, 2.0 * B.T @ new, 2.0 * new @ A.T, 2.0
    damped, bare = correct_gradients(*given_gradients), correct_gradients(*given_gradients, floor=0.0)
    for ours, theorems in zip(damped, bare, strict=True):
        assert (ours - theorems).norm() <= 8 * torch.finfo(dtype).eps * theorems.norm()


@pytest.mark.parametrize("k", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("s", [0.1, 1.0, 10.0])
def test_the_step_does_not_depend_on_units(k, s):
    """Both factors `k` times as long, or another scaling: the same step, also where `B` is short."""
    A, B, G, gA, gB = case(8, 6, 3, scale_B=0.3)
    first = equivalent(A, B, *correct_gradients(A, B, gA, gB, 1.0), 1.0)
    A, B = k * A, k * B
    second = equivalent(A, B, *correct_gradients(A, B, s * B.T @ G, s * G @ A.T, s), s)
    torch.testing.assert_close(first, second, **CLOSE)


@settings(deadline=None, max_examples=30)
@given(scalings, seeds)
def test_X_is_the_one_nearest_to_the_plain_gradients(s, seed):
    """Theorem 2.3: among all X, `|dA - gA|^2 + |dB - gB|^2` is least, so no change of X lowers it."""
    A, B, _, gA, gB = case(9, 7, 3, s=s, seed=seed)
    dA, dB = correct_gradients(A, B, gA, gB, s)
    slope = (dA - gA) @ A.T - B.T @ (dB - gB)  # the derivative in X of half the distance
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-7 * (gA.norm() * A.norm()).item())


@settings(deadline=None, max_examples=60)
@given(shapes, scalings, seeds, lengths)
def test_the_loss_decreases_to_first_order(shape, s, seed, scale_B):
    """`<gA, dA> + <gB, dB> >= |s (B dA + dB A)|^2`, equal where `B` is long: the slope of the loss is minus that."""
    for reach in (False, True):
        A, B, G, gA, gB = case(*shape, s=s, seed=seed, scale_B=scale_B)
        if reach:
            B = reaching(A, B)
            gA = s * B.T @ G
        dA, dB = correct_gradients(A, B, gA, gB, s)
        slope = (gA * dA).sum() + (gB * dB).sum()
        square = equivalent(A, B, dA, dB, s).square().sum()
        assert slope >= square * (1 - 1e-5) - 1e-8
        if reach:
            torch.testing.assert_close(slope, square, rtol=1e-5, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_the_step_does_not_depend_on_how_the_product_is_split(seed):
    """As long as neither split makes `B` shorter than `A`."""
    A, B, G, gA, gB = reaching_case(8, 6, 3, s=2.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    U, _, Vt = torch.linalg.svd(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    R = U @ torch.diag(torch.tensor([90.0, 3.0, 1.0], dtype=torch.float64)) @ Vt
    A2, B2 = torch.linalg.inv(R) @ A, B @ R
    first = equivalent(A, B, *correct_gradients(A, B, gA, gB, 2.0), 2.0)
    second = equivalent(A2, B2, *correct_gradients(A2, B2, 2.0 * B2.T @ G, 2.0 * G @ A2.T, 2.0), 2.0)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("out", "in_"), [(4, 7), (7, 4), (4, 4)])
def test_full_rank_gives_back_the_gradient(out, in_):
    A, B, G, gA, gB = reaching_case(out, in_, 4, s=0.5)
    torch.testing.assert_close(equivalent(A, B, *correct_gradients(A, B, gA, gB, 0.5), 0.5), G, **CLOSE)


def test_the_plain_lora_start_needs_no_branch():
    """`B = 0`: `dA = 0` and `dB = gB (A A^T)^-1 / s^2`, so the step is `G P_A`."""
    A, _, G, _, _ = case(6, 8, 3)
    B = torch.zeros(6, 3, dtype=torch.float64)
    dA, dB = correct_gradients(A, B, torch.zeros_like(A), 2.0 * G @ A.T, 2.0)
    assert not dA.any()
    torch.testing.assert_close(dB, 2.0 * G @ A.T @ torch.linalg.inv(A @ A.T) / 4.0, **CLOSE)
    torch.testing.assert_close(equivalent(A, B, dA, dB, 2.0), G @ projection_A(A), **CLOSE)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(0, 3), st.integers(0, 3), scalings)
def test_rank_deficient_factors_project_on_what_they_reach(seed, rank_A, rank_B, s):
    A, B, G, _, _ = case(8, 7, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    mix = lambda k: torch.randn(4, k, generator=generator, dtype=torch.float64)
    A, B = mix(rank_A) @ A[:rank_A], B[:, :rank_B] @ mix(rank_B).T
    dA, dB = correct_gradients(A, B, s * B.T @ G, s * G @ A.T, s)
    torch.testing.assert_close(equivalent(A, B, dA, dB, s), lora_pro_damped_reference(A, B, G), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale_A", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("scale_B", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("scale_G", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_scales(scale_A, scale_B, scale_G, dtype, tolerance):
    """Factors and gradients of any size; of `A` and `B` only the relative size matters."""
    A, B, G, gA, gB = case(7, 9, 3, s=0.25, scale_A=scale_A, scale_B=scale_B, scale_G=scale_G)
    dA, dB = correct_gradients(*(tensor.to(dtype) for tensor in (A, B, gA, gB)), 0.25)
    ours = equivalent(A, B, dA.double(), dB.double(), 0.25)
    target = lora_pro_damped_reference(A, B, G)
    assert (ours - target).norm() <= tolerance * target.norm()


@pytest.mark.parametrize("scaling", ["one", "each"])
def test_a_batch_is_its_members(scaling):
    members = [case(6, 5, 3, s=s, seed=i) for i, s in enumerate((0.5, 1.0, 4.0, 0.125))]
    s = torch.tensor([0.5, 1.0, 4.0, 0.125], dtype=torch.float64) if scaling == "each" else 0.5
    A, B, _, gA, gB = (torch.stack(list(t)).unflatten(0, (2, 2)) for t in zip(*members, strict=True))
    together = correct_gradients(A, B, gA, gB, s.unflatten(0, (2, 2)) if scaling == "each" else s)
    for i, (a, b, _, ga, gb) in enumerate(members):
        alone = correct_gradients(a, b, ga, gb, s[i].item() if scaling == "each" else s)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours.flatten(0, 1)[i], theirs, **CLOSE)


def test_clipping_before_is_clipping_after():
    """The correction is linear in the gradients, so a common factor may be applied on either side."""
    A, B, _, gA, gB = case(6, 5, 3, s=2.0)
    clipped = correct_gradients(A, B, 0.1 * gA, 0.1 * gB, 2.0)
    for ours, theirs in zip(clipped, correct_gradients(A, B, gA, gB, 2.0), strict=True):
        torch.testing.assert_close(ours, 0.1 * theirs, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_at_least_fp32_inside_and_the_gradients_dtype_outside(dtype, autocast):
    """bf16 loses only what rounding its inputs and outputs loses: the same as computing from them in fp64."""
    A, B, _, gA, gB = (tensor.to(dtype) for tensor in case(64, 48, 4, s=2.0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        rounded = correct_gradients(A, B, gA, gB, 2.0)
    exact = correct_gradients(*(tensor.double() for tensor in (A, B, gA, gB)), 2.0)
    eps = max(torch.finfo(dtype).eps, 1e-12)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= 8 * eps * theirs.norm()


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_broken_layer_does_not_break_the_batch(place, value):
    """Non-finite input gives non-finite output for that layer alone, and no exception."""
    members = [case(6, 5, 3, seed=i) for i in range(3)]
    A, B, _, gA, gB = (torch.stack(list(t)) for t in zip(*members, strict=True))
    tensors = (A, B, gA, gB)
    tensors[place][1, 0, 0] = value
    dA, dB = correct_gradients(*tensors, 1.0)
    for i in (0, 2):
        alone = correct_gradients(*(tensor[i] for tensor in tensors), 1.0)
        for ours, theirs in zip((dA[i], dB[i]), alone, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    assert not (dA[1].isfinite().all() and dB[1].isfinite().all())
