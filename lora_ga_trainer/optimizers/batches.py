"""
Pairs in a few large batches, so that the number of kernels of a step does not grow with the number of layers.

What every step has in common stands here: stack the pairs, decompose their Gram matrices, compute a change of `A` and
`B`, and bring it to the form in which the factors are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapters.layer import AdaptedLayer
from ..engines.parameters import like_parameter, whole
from ..maths.lora_pro import (
    CUTOFF,
    FLOOR,
    GramEigen,
    apply_correction,
    cross_products,
    decompose,
    gram_matrices,
    solve_correction,
)


@dataclass
class PairBatch:
    """Pairs of one shape, stacked, in fp32 or fp64. Anchored ones are brought from delta form to `A` and `B`."""

    pairs: list[AdaptedLayer]
    weights_A: list[nn.Parameter]  # `lora_A.weight` of each pair: a look-up through modules costs as much as a launch
    weights_B: list[nn.Parameter]
    A: Tensor  # (L, r, in)
    B: Tensor  # (L, out, r)
    gA: Tensor  # (L, r, in)
    gB: Tensor  # (L, out, r)
    s: Tensor  # (L,), fp64


Read = Callable[[nn.Parameter], tuple[Tensor, Tensor]]  # value and gradient of a factor, whole


def read_factor(parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Return a factor and its gradient where both are kept in the parameter; gathered if they are sharded."""
    return whole(parameter.detach()), whole(cast(Tensor, parameter.grad))


def batch_pairs(pairs: Iterable[AdaptedLayer], most: int | None = None, read: Read = read_factor) -> list[PairBatch]:
    """
    Stack pairs of equal shape, dtype, device and form. All of them have gradients.

    Args:
        pairs: to stack.
        most: entries of `W` that a batch of more than one pair stands for.
        read: gives value and gradient of a factor.
    """
    shapes: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for pair in pairs:
        lora_A = pair.lora_A
        weight_A, weight_B = cast(nn.Parameter, lora_A.weight), cast(nn.Parameter, pair.lora_B.weight)
        (A, gA), (B, gB) = read(weight_A), read(weight_B)
        key = (type(lora_A), A.shape, B.shape, A.dtype, B.dtype, A.device, B.device)
        shapes.setdefault(key, []).append((pair, weight_A, weight_B, A, B, gA, gB))
    batches = []
    for group in shapes.values():
        out_features, in_features = group[0][0].shape
        length = len(group) if most is None else max(1, most // (out_features * in_features))
        for i in range(0, len(group), length):
            batches.append(_stack(*(list(column) for column in zip(*group[i : i + length], strict=True))))
    return batches


def _stack(
    pairs: list[AdaptedLayer], weights_A: list[nn.Parameter], weights_B: list[nn.Parameter], *values: list[Tensor]
) -> PairBatch:
    dtype = torch.promote_types(torch.promote_types(weights_A[0].dtype, weights_B[0].dtype), torch.float32)
    A, B, gA, gB = (torch.stack(tensors).to(dtype) for tensors in values)
    if pairs[0].is_anchored:
        # Stored: [A; A - A0] with tied gradients, [B - B0, B0] with the gradient of B in the first half.
        r = pairs[0].rank
        A, gA, gB = A[:, :r], gA[:, :r], gB[..., :r]
        B = B[..., :r] + B[..., r:]
    s = torch.tensor([pair.s for pair in pairs], dtype=torch.float64, device=A.device)
    return PairBatch(pairs, weights_A, weights_B, A, B, gA, gB, s)


def decompose_batches(batches: Sequence[PairBatch], floor: float = FLOOR) -> list[GramEigen]:
    """Decompose the Gram matrices of all batches, with one `eigh` for all layers of equal rank."""
    # A Gram matrix is r x r whatever the shape of its layer, so batches of different shapes share one call.
    ranks: dict[tuple[Any, ...], list[int]] = {}
    for index, batch in enumerate(batches):
        ranks.setdefault((batch.A.shape[1], batch.A.dtype, batch.A.device), []).append(index)
    found: dict[int, GramEigen] = {}
    for (_, dtype, _), indices in ranks.items():
        grams = [gram_matrices(batches[i].A, batches[i].B) for i in indices]
        gram_A, gram_B = (torch.cat(side) for side in zip(*grams, strict=True))
        sizes = [len(batches[i].pairs) for i in indices]
        parts = [part.split(sizes) for part in decompose(gram_A, gram_B, CUTOFF[dtype], floor)]
        found.update(zip(indices, (GramEigen(*members) for members in zip(*parts, strict=True)), strict=True))
    return [found[index] for index in range(len(batches))]


def stored_factors(batch: PairBatch) -> tuple[Tensor, Tensor]:  # (L, k, in), (L, out, k)
    """Return stacked `lora_A.weight`, `lora_B.weight`, whose product times `s` is the net change of `W`."""
    if not batch.pairs[0].is_anchored:
        return batch.A, batch.B
    A = torch.stack([whole(weight.detach()) for weight in batch.weights_A])
    B = torch.stack([whole(weight.detach()) for weight in batch.weights_B])
    return A.to(batch.A.dtype), B.to(batch.A.dtype)


def correct_batch(batch: PairBatch, eigen: GramEigen) -> tuple[Tensor, Tensor]:  # dA (L, r, in), dB (L, out, r)
    """Correct the gradients of a batch (LoRA-Pro, Theorem 2.1)."""
    factors = batch.A, batch.B, batch.gA, batch.gB
    return apply_correction(solve_correction(eigen, *cross_products(*factors), batch.s), *factors)


Correct = Callable[[PairBatch, GramEigen], tuple[Tensor, Tensor]]  # dA (L, r, in), dB (L, out, r)


def each_corrected(
    batches: Sequence[PairBatch], correct: Correct = correct_batch, floor: float = FLOOR
) -> Iterator[tuple[PairBatch, Sequence[Tensor], Sequence[Tensor]]]:
    """
    Decompose the Gram matrices of all batches, correct each batch and bring the outcome to the stored form.

    Yields:
        The batch and, one for each pair, the changes of `lora_A.weight` and of `lora_B.weight`. A batch is computed
        when the one before it is done with, so the large buffers of one batch are alive at a time.
    """
    for batch, eigen in zip(batches, decompose_batches(batches, floor), strict=True):
        yield batch, *stored_form(batch, *correct(batch, eigen))


def stored_form(
    batch: PairBatch,
    dA: Tensor,  # (L, r, in)
    dB: Tensor,  # (L, out, r)
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """
    Return changes of `A` and `B` as changes of `lora_A.weight` and `lora_B.weight`, one for each pair.

    They have the dtypes of the parameters. A factor that is sharded gets its shard of the change.
    """
    if batch.pairs[0].is_anchored:
        # [A; A - A0]: both halves move as A does, so they stay tied. [B - B0, B0]: B0 stays.
        dA = torch.cat([dA, dA], dim=1)
        dB = torch.cat([dB, torch.zeros_like(dB)], dim=2)
    dAs, dBs = dA.to(batch.weights_A[0].dtype).unbind(), dB.to(batch.weights_B[0].dtype).unbind()
    return (
        [like_parameter(change, weight) for change, weight in zip(dAs, batch.weights_A, strict=True)],
        [like_parameter(change, weight) for change, weight in zip(dBs, batch.weights_B, strict=True)],
    )


def require_floor(floor: float, who: str) -> None:
    """
    Check the floor of an optimizer, see [`correct_gradients`].

    Raises:
        `ValueError`: naming it.
    """
    if not 0.0 <= floor < float("inf"):
        raise ValueError(f"{who}: floor={floor} must be a finite number of at least 0. The default is {FLOOR}.")


def require_finite(batches: Sequence[PairBatch], who: str) -> None:
    """
    Check the gradients as they came; waits for the device.

    Raises:
        `RuntimeError`: naming the first pair whose gradient is not finite.
    """
    for batch in batches:
        finite = batch.gA.isfinite().all(dim=-1).all(dim=-1) & batch.gB.isfinite().all(dim=-1).all(dim=-1)
        for pair, good in zip(batch.pairs, finite.tolist(), strict=True):
            if not good:
                raise RuntimeError(
                    f"{who}: the gradient of {pair.name}, adapter {pair.adapter!r}, is not finite. Lower the learning "
                    "rate or clip, unscale fp16 gradients first, or pass error_if_nonfinite=False to go on as torch "
                    "does."
                )
