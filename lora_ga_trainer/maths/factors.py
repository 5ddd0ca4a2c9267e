"""The maths of the two starts: singular vectors of `G = dL/dW` in, LoRA factors out. No modules, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def fix_signs(
    U: Tensor,  # (out, k)
    Vt: Tensor,  # (k, in)
) -> tuple[Tensor, Tensor]:
    """
    Choose the free sign of every singular pair: the largest entry by magnitude of each column of `U` is positive.

    `B0` and `A0` of LoRA-GA come from different pairs, so `B0 A0` depends on the signs; fixed signs make ranks and
    repeated runs agree.
    """
    largest = U.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(U.gather(0, largest).squeeze(0) < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, Vt * sign[:, None]


def lora_ga_scale(
    shape: tuple[int, int],
    r: int,
    *,
    gamma: float = 16.0,
    scale: str = "stable",
    s: float = 1.0,
    weight_singular_values: Tensor | None = None,  # (>= min(r, out, in),), descending
) -> float:
    """
    Compute the common length `c` of the rows of `A0` and the columns of `B0`, for a weight of `shape` `(out, in)`.

    `stable` is section 3.3 of LoRA-GA (arXiv 2407.05000), `out^(1/4) / sqrt(gamma)`; `unit` is 1; `gd` is `1/s`, which
    makes the first SGD step of the adapter that of full fine-tuning on the best rank-2r gradient; `weight_svd` is the
    mean of `sqrt(S_W[:r] / s)`, the size PiSSA would give the factors.

    `matched` is ours: the first step of AdamW moves a weight as far as it does from plain LoRA's start. That step is
    the rate times a sign in every entry, so it moves the weight by `s (sign(gB) A0 + B0 sign(gA))`, of mean square
    `s^2 r c^2 (1/in + 1/out)` where the signs are as good as random. Plain LoRA has `B0 = 0` and entries of variance
    `1 / (3 in)` in `A0`: `s^2 r / (3 in)`. They are equal for `c = sqrt(out / (3 (in + out)))`.

    Raises:
        `ValueError`: on `gamma <= 0`, an unknown `scale`, or `weight_svd` without `weight_singular_values`.
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma!r} must be greater than 0.")
    out_features, in_features = shape
    if scale == "stable":
        return out_features**0.25 / math.sqrt(gamma)
    if scale == "unit":
        return 1.0
    if scale == "matched":
        return math.sqrt(out_features / (3 * (in_features + out_features)))
    if scale in ("gd", "weight_svd") and not s > 0:
        raise ValueError(f"scale={scale!r} divides by s={s!r}: it must be greater than 0. Use a positive lora_alpha.")
    if scale == "gd":
        return 1.0 / s
    if scale == "weight_svd":
        if weight_singular_values is None:
            raise ValueError("scale='weight_svd' needs weight_singular_values, the singular values of W.")
        return (weight_singular_values[:r] / s).sqrt().mean().item()
    raise ValueError(f"scale={scale!r} is unknown. Choose one of stable, unit, gd, matched, weight_svd.")


def split_directions(
    m: int, r: int, direction: str, generator: torch.Generator | None = None
) -> tuple[list[int], list[int]]:
    """
    Split the first `min(2r, m)` of `m` singular pairs into those of `A` and those of `B`, `min(r, m)` each.

    With `2r <= m` the two lists are disjoint. With fewer pairs each list is filled up with the strongest pairs that it
    lacks, so the two overlap and together hold every pair.

    Raises:
        `ValueError`: on an unknown `direction` or `r < 1`.
    """
    if r < 1:
        raise ValueError(f"r={r!r} must be at least 1.")
    of_a: Sequence[int]
    of_b: Sequence[int]
    if direction == "ArB2r":
        of_a, of_b = range(r), range(r, 2 * r)
    elif direction == "A2rBr":
        of_a, of_b = range(r, 2 * r), range(r)
    elif direction == "ArBr":
        of_a, of_b = range(1, 2 * r, 2), range(0, 2 * r, 2)
    elif direction == "random":
        order = torch.randperm(2 * r, generator=generator).tolist()
        of_a, of_b = sorted(order[:r]), sorted(order[r:])
    else:
        raise ValueError(f"direction={direction!r} is unknown. Choose one of ArB2r, A2rBr, ArBr, random.")
    return _fill(of_a, m, r), _fill(of_b, m, r)


def _fill(wanted: Sequence[int], m: int, r: int) -> list[int]:
    """Keep the pairs that exist (fewer than `m`) and add the strongest missing ones up to `min(r, m)`."""
    kept = [i for i in wanted if i < m]
    missing = [i for i in range(m) if i not in set(kept)]
    return sorted(kept + missing[: min(r, m) - len(kept)])


def lora_ga_factors(
    U: Tensor,  # (out, k)
    S: Tensor,  # (k,)
    Vt: Tensor,  # (k, in)
    r: int,
    *,
    gamma: float = 16.0,
    direction: str = "ArB2r",
    scale: str = "stable",
    s: float = 1.0,
    weight_singular_values: Tensor | None = None,  # (>= min(r, out, in),)
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # B0 (out, r), A0 (r, in)
    """
    Make the LoRA-GA start (arXiv 2407.05000, Algorithm 1 and Theorem 3.1) from the SVD of the gradient of `W`.

    `A0 = c V[:, I_A]^T`, `B0 = c U[:, I_B]` without the singular values, so that
    `B0 B0^T G + G A0^T A0 = c^2 [G]_2r`: the first SGD step moves the weight along the best rank-2r gradient.

    Args:
        U, S, Vt: the top `k >= min(2r, out, in)` singular triplets of `G`, descending; any float dtype.
        r: rank of the factors.
        gamma: see [`lora_ga_scale`]; default 16, the paper's.
        direction: see [`split_directions`]; default `"ArB2r"`, the paper's.
        scale: see [`lora_ga_scale`]; default `"stable"`, the paper's.
        s: PEFT's `scaling` of the layer; used by `gd` and `weight_svd`.
        weight_singular_values: of the base weight, descending; needed by `weight_svd`.
        generator: of the `random` split and of the rows of `A` that no direction is left for.

    Where `2r > min(out, in)` a pair that both factors hold is scaled by `1/sqrt(2)` in both, which keeps the law.
    Where `r > min(out, in)` the missing rows of `A` get `nn.Linear`'s random start and the missing columns of `B` are
    zero.

    Returns:
        `B0 (out, r)` and `A0 (r, in)` in the dtype and on the device of `U`.

    Raises:
        `ValueError`: on an unknown or impossible argument, naming it.
    """
    shape = (U.shape[0], Vt.shape[1])
    c = lora_ga_scale(shape, r, gamma=gamma, scale=scale, s=s, weight_singular_values=weight_singular_values)
    m = min(shape)
    if weight_singular_values is not None and len(weight_singular_values) < min(r, m):
        raise ValueError(
            f"{len(weight_singular_values)} weight_singular_values were given, {min(r, m)} are needed for rank {r}."
        )
    of_a, of_b = split_directions(m, r, direction, generator)
    _check_enough_pairs(U, S, Vt, min(2 * r, m))
    U, Vt = fix_signs(U, Vt)
    shared = set(of_a) & set(of_b)
    lengths = [c / math.sqrt(2.0) if i in shared else c for i in range(min(2 * r, m))]
    weight = torch.tensor(lengths, dtype=torch.float64).to(U)
    # B0 B0^T G + G A0^T A0 = c^2 [G]_2r
    A = weight[of_a, None] * Vt[of_a]
    B = U[:, of_b] * weight[of_b]
    return _pad(B, A, r, generator)


def lora_one_factors(
    U: Tensor,  # (out, k)
    S: Tensor,  # (k,)
    Vt: Tensor,  # (k, in)
    r: int,
    *,
    gamma: float = 128.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # B0 (out, r), A0 (r, in)
    """
    Make the LoRA-One start (arXiv 2502.01235, Algorithm 1) from the SVD of the gradient of `W`.

    `B0 A0 = -[G]_r / (gamma S[0])` with `B0^T B0 = A0 A0^T`: the adapter starts one normalised gradient step away from
    the base. The paper takes the SVD of `-G`; the sign is carried by `B0` here.

    Args:
        U, S, Vt: the top `k >= min(r, out, in)` singular triplets of `G`, descending; any float dtype.
        r: rank of the factors.
        gamma: default 128, the paper's.
        generator: of the rows of `A` that no direction is left for, because `r` is larger than the numerical rank of
            `G`; `B` is zero there. (Zeros in both, as the rule gives for a zero singular value, would never learn.)

    Returns:
        `B0 (out, r)` and `A0 (r, in)` in the dtype and on the device of `U`.

    Raises:
        `ValueError`: on `gamma <= 0`, `r < 1`, too few triplets or a zero gradient.
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma!r} must be greater than 0.")
    if r < 1:
        raise ValueError(f"r={r!r} must be at least 1.")
    k = min(r, U.shape[0], Vt.shape[1])
    _check_enough_pairs(U, S, Vt, k)
    if not S[0] > 0:
        raise ValueError(f"S[0]={S[0].item()!r}: LoRA-One divides by the largest singular value of the gradient.")
    U, Vt = fix_signs(U, Vt)
    S = S.to(U.dtype)
    k = int((S[:k] > torch.finfo(S.dtype).eps * S[0]).sum())
    # A0 = sqrt(S_r / S[0]) V_r^T / sqrt(gamma),  B0 = -U_r sqrt(S_r / S[0]) / sqrt(gamma)
    root = (S[:k] / S[0]).sqrt() / math.sqrt(gamma)
    return _pad(-U[:, :k] * root, root[:, None] * Vt[:k], r, generator)


def _check_enough_pairs(U: Tensor, S: Tensor, Vt: Tensor, needed: int) -> None:
    if not U.shape[1] == S.shape[0] == Vt.shape[0]:
        raise ValueError(f"U {tuple(U.shape)}, S {tuple(S.shape)} and Vt {tuple(Vt.shape)} do not hold equal numbers.")
    if S.shape[0] < needed:
        raise ValueError(
            f"{S.shape[0]} singular triplets were given, {needed} are needed. Ask the estimator for more."
        )


def _pad(
    B: Tensor,  # (out, k)
    A: Tensor,  # (k, in)
    r: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:  # B (out, r), A (r, in)
    """Fill up to rank `r`: random rows of `A`, zero columns of `B` (zeros in both would never learn)."""
    missing = r - A.shape[0]
    if missing == 0:
        return B.contiguous(), A.contiguous()
    return torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1), torch.cat([A, random_rows(missing, A, generator)])


def random_rows(
    rows: int,
    like: Tensor,  # (any, in)
    generator: torch.Generator | None,
) -> Tensor:  # (rows, in)
    """Draw rows as `nn.Linear` and PEFT start `A`: uniform in `[-1/sqrt(in), 1/sqrt(in)]`, drawn on the CPU."""
    bound = 1.0 / math.sqrt(like.shape[1])
    drawn = torch.empty(rows, like.shape[1], dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    return drawn.to(like)
