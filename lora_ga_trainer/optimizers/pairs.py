"""LoRA factors and their gradients in a few large batches: the kernels of a step don't grow with the layer count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapters.find import find_lora_pairs
from ..adapters.layer import AdaptedLayer
from ..engines.parameters import like_parameter, whole
from ..maths.lora_pro import (
    CUTOFF,
    GramEigen,
    apply_correction,
    cross_products,
    decompose,
    gram_matrices,
    solve_correction,
)


@dataclass
class PairBatch:
    """Pairs of one shape, stacked; at least fp32. In anchored layers these are `A`, `B`, not the stored delta form."""

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
    Stack the pairs, all of which have gradients, by shape, dtype, device and form.

    A batch of more than one pair stands for at most `most` entries of `W`.
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


def decompose_batches(batches: Sequence[PairBatch]) -> list[GramEigen]:
    """Decompose the Gram matrices of all batches, with one `eigh` for all layers of equal rank."""
    ranks: dict[tuple[Any, ...], list[int]] = {}
    for index, batch in enumerate(batches):
        ranks.setdefault((batch.A.shape[1], batch.A.dtype, batch.A.device), []).append(index)
    found: dict[int, GramEigen] = {}
    for (_, dtype, _), indices in ranks.items():
        grams = [gram_matrices(batches[i].A, batches[i].B) for i in indices]
        gram_A, gram_B = (torch.cat(side) for side in zip(*grams, strict=True))
        sizes = [len(batches[i].pairs) for i in indices]
        parts = [part.split(sizes) for part in decompose(gram_A, gram_B, CUTOFF[dtype])]
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
    factors = batch.A, batch.B, batch.gA, batch.gB
    return apply_correction(solve_correction(eigen, *cross_products(*factors), batch.s), *factors)


Correct = Callable[[PairBatch, GramEigen], tuple[Tensor, Tensor]]  # dA (L, r, in), dB (L, out, r)


def each_corrected(
    batches: Sequence[PairBatch], correct: Correct = correct_batch
) -> Iterator[tuple[PairBatch, Sequence[Tensor], Sequence[Tensor]]]:
    """
    Decompose the Gram matrices of all batches, correct each batch and bring the outcome to the stored form.

    Yields:
        The batch and, one a pair, the changes of `lora_A.weight` and of `lora_B.weight`.
    """
    for batch, eigen in zip(batches, decompose_batches(batches), strict=True):
        yield batch, *stored_form(batch, *correct(batch, eigen))


def stored_form(
    batch: PairBatch,
    dA: Tensor,  # (L, r, in)
    dB: Tensor,  # (L, out, r)
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """
    Return changes of `A` and `B` as changes of `lora_A.weight` and `lora_B.weight`, one a pair, in their dtypes.

    In an anchored layer both halves of `A` get the change, so that they stay tied, and `B0` gets zero. A factor that
    is sharded gets its shard of the change.
    """
    if batch.pairs[0].is_anchored:
        dA = torch.cat([dA, dA], dim=1)
        dB = torch.cat([dB, torch.zeros_like(dB)], dim=2)
    dAs, dBs = dA.to(batch.weights_A[0].dtype).unbind(), dB.to(batch.weights_B[0].dtype).unbind()
    return (
        [like_parameter(change, weight) for change, weight in zip(dAs, batch.weights_A, strict=True)],
        [like_parameter(change, weight) for change, weight in zip(dBs, batch.weights_B, strict=True)],
    )


def trained_pairs(model: nn.Module, param_groups: list[dict[str, Any]], who: str) -> list[AdaptedLayer]:
    """
    List the pairs whose factors both are in `param_groups`.

    Args:
        model: the model that holds them.
        param_groups: of an optimizer.
        who: the optimizer's name, for the message.

    Raises:
        `ValueError`: naming a factor whose partner is missing or in a group of other options, or a LoRA parameter for
            which no correction is defined; also if there is no pair at all.
    """
    owner = {id(p): index for index, group in enumerate(param_groups) for p in group["params"]}
    every, others = find_lora_pairs(model)
    for name, parameter in others.items():
        if id(parameter) in owner:
            raise ValueError(
                f"{who}: {name} of shape {tuple(parameter.shape)} is a LoRA parameter but not a factor of a linear "
                "layer, so it can't be corrected, and it is not a plain parameter. Leave its layer out of "
                "`target_modules` (`target_parameters`), or use an optimizer without correction."
            )
    pairs = []
    for pair in every:
        of_A, of_B = owner.get(id(pair.lora_A.weight)), owner.get(id(pair.lora_B.weight))
        if of_A is None and of_B is None:
            continue
        _require_together(pair, of_A, of_B, param_groups, who)
        pairs.append(pair)
    if not pairs:
        raise ValueError(
            f"{who}: the optimizer holds no pair of LoRA factors of the {type(model).__name__}. Pass the model whose "
            "`lora_A` and `lora_B` it trains, or use the optimizer without correction."
        )
    return pairs


def _require_together(
    pair: AdaptedLayer, of_A: int | None, of_B: int | None, param_groups: list[dict[str, Any]], who: str
) -> None:
    place = f"{who}: {pair.name}, adapter {pair.adapter!r}"
    if of_A is None or of_B is None:
        held, missing = ("lora_B", "lora_A") if of_A is None else ("lora_A", "lora_B")
        raise ValueError(
            f"{place}: the optimizer holds {held} but not {missing}. The two are corrected together: train both, or "
            "use an optimizer without correction."
        )
    if pair.s == 0:
        raise ValueError(f"{place}: its scaling is 0, so it has no gradient. Use a `lora_alpha` other than 0.")
    if of_A == of_B:
        return
    different = different_options(param_groups[of_A], param_groups[of_B])
    if different:
        raise ValueError(
            f"{place}: lora_A is in group {of_A} and lora_B in group {of_B}, with different {', '.join(different)}. "
            "A corrected step is one step of both: put them into groups of equal options (LoRA+ can't be combined)."
        )


def different_options(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Describe the options in which two param groups differ."""
    missing = object()
    keys = [key for key in first | second if key != "params"]
    return [
        f"{key} ({first.get(key)!r}, {second.get(key)!r})"
        for key in keys
        if not _equal(first.get(key, missing), second.get(key, missing))
    ]


def _equal(left: Any, right: Any) -> bool:
    return left is right or bool(left == right)


def pairs_with_gradients(pairs: Iterable[AdaptedLayer], who: str) -> list[AdaptedLayer]:
    """
    Leave out the pairs of which a factor has no gradient.

    Raises:
        `RuntimeError`: naming a sparse gradient.
    """
    ready = []
    for pair in pairs:
        gradients = {"lora_A": pair.lora_A.weight.grad, "lora_B": pair.lora_B.weight.grad}
        for side, gradient in gradients.items():
            if gradient is not None and gradient.layout != torch.strided:
                raise RuntimeError(
                    f"{who}: the gradient of {side} of {pair.name}, adapter {pair.adapter!r}, is sparse "
                    f"({gradient.layout}). LoRA-Pro needs dense gradients: leave that layer out of `target_modules`."
                )
        if all(gradient is not None for gradient in gradients.values()):
            ready.append(pair)
    return ready


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
