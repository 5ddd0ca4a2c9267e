"""Average adapters of several runs: exact at the sum of their ranks, then cut to the rank that is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor

from ..adapters.host import PREFIX
from ..maths.products import truncate_product
from ..saving.adapter_folder import AdapterFolder, SavedFactors, exact_key, write_adapter
from ..saving.export import whole_scale
from ..saving.record import read_record


_BIAS = ".lora_B.bias"
# Entries of a config that say which layers it is for. Where adapters differ in one, the layers are named one by one.
_CHOOSE_LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@torch.no_grad()
def average_adapters(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> dict[str, float]:
    """
    Write the weighted sum of the changes of several adapters as one adapter, which plain PEFT loads.

        errors = average_adapters(["outputs/seed0", "outputs/seed1"], "outputs/average", rank=16)

    Each layer's change becomes `sum_i w_i s_i B_i A_i`. The factors laid side by side have this product exactly, at
    the sum of the ranks. With `rank` it is cut to its best approximation of that rank (Eckart-Young), from QR
    decompositions of the stacked factors; the product is never formed, and no base is needed. A layer that one of the
    adapters leaves alone counts as unchanged by it.

    What PEFT's `add_weighted_adapter` (0.21) lacks: it needs the base and all adapters in memory. Its `linear`
    averages the factors and not the products, and asks for equal ranks. Its `svd` forms the whole product, and tells
    no error. Its `cat` is exact, but gives every layer the sum of the largest ranks. Both set `lora_alpha = r` and
    keep `use_rslora`, so with rsLoRA the change comes out `sqrt(r)` times too large. None carries `lora_bias`. For
    sign election and pruning (TIES, DARE) use PEFT.

    Args:
        folders: of the adapters, plain or anchored ones, of any ranks, scalings, starts and target modules.
        output: another folder, made if it does not exist. The result is a plain adapter with `s = 1`.
        weights: one number an adapter; they need not sum to 1. Default: `1 / len(folders)` each, the mean.
        rank: of every layer of the result. Default: the sum of the ranks of each layer, without error.

    Returns:
        The relative error `||exact - written|| / ||exact||` (Frobenius) of every layer by name, and of all layers
        together under `"total"`; the rounding of the factors' dtype, the widest among the adapters, is not in it.

    Raises:
        `ValueError`: naming the folder and what can't be averaged: DoRA and other variants, fused experts, starts that
            change the base, adapters of different bases, and trained heads, biases or tokens that are not the same
            in all adapters.
    """
    adapters, weights = _require_arguments(folders, output, weights, rank)
    _require_one_base(adapters)
    tensors = _shared_tensors(adapters)
    ranks, errors, lost, whole = {}, {}, 0.0, 0.0
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        parts = [(w, a.read(name)) for w, a in zip(weights, adapters, strict=True) if name in a.layers]
        B, A = _stack(adapters, parts)
        errors[name] = 0.0
        if rank is not None:
            B, A, S = truncate_product(B, A, rank)
            energy = S.square()
            lost_here, whole_here = energy[rank:].sum().item(), energy.sum().item()
            errors[name] = math.sqrt(lost_here / whole_here) if whole_here > 0 else 0.0
            lost, whole = lost + lost_here, whole + whole_here
        ranks[name] = A.shape[0]
        tensors.update(_as_stored([part for _, part in parts], B, A))
    tensors.update(_biases(adapters, weights))
    errors["total"] = math.sqrt(lost / whole) if whole > 0 else 0.0
    write_adapter(output, _config(adapters, ranks), tensors)
    return errors


def _require_arguments(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None,
    rank: int | None,
) -> tuple[list[AdapterFolder], list[float]]:
    if isinstance(folders, (str, os.PathLike)) or not folders:
        raise ValueError(f"average_adapters: folders={folders!r} must be a list of folders.")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"average_adapters: rank={rank!r} must be a whole number of at least 1, or None.")
    given = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    if len(given) != len(folders) or not all(type(w) in (int, float) and math.isfinite(w) for w in given):
        raise ValueError(f"average_adapters: weights={given!r} must be {len(folders)} finite numbers, one an adapter.")
    if Path(output).resolve() in {Path(folder).resolve() for folder in folders}:
        raise ValueError(f"average_adapters: output={os.fspath(output)!r} is one of the folders. Name another one.")
    return [AdapterFolder(folder, "average_adapters") for folder in folders], given


def _require_one_base(adapters: Sequence[AdapterFolder]) -> None:
    """Refuse adapters whose records or configs name different bases."""
    first = adapters[0]
    for other in adapters[1:]:
        prints = [record.base if record else None for record in (read_record(first.path), read_record(other.path))]
        if prints[0] is not None and prints[0] == prints[1]:
            continue  # the same weights, whatever their folder was called
        names = [adapter.config.base_model_name_or_path for adapter in (first, other)]
        # A fingerprint is of the adapted layers alone, so those of other layers can't be compared.
        differ = None not in prints and set(first.layers) == set(other.layers)
        if differ or (None not in names and names[0] != names[1]):
            raise ValueError(
                f"average_adapters: {first.path} was trained on {names[0]!r} and {other.path} on {names[1]!r}"
                f"{', with other weights (lora_ga.json)' if differ else ''}. A change is for one base. If it is one "
                "base under two names, write the same base_model_name_or_path into both files adapter_config.json."
            )


def _shared_tensors(adapters: Sequence[AdapterFolder]) -> dict[str, Tensor]:
    """Return what else the adapters hold, the same in all of them."""
    first = {name: value for name, value in adapters[0].others().items() if not name.endswith(_BIAS)}
    for other in adapters[1:]:
        theirs = {name: value for name, value in other.others().items() if not name.endswith(_BIAS)}
        for name in sorted({*first, *theirs}):
            same = name in first and name in theirs and torch.equal(first[name], theirs[name])
            if not same:
                raise ValueError(
                    f"average_adapters: {name} is not the same in {adapters[0].path} and {other.path}. Trained heads, "
                    "biases and tokens are no change `s B A`, and which of them to keep is for you to say: remove it "
                    "from `modules_to_save` and the files, or copy one into all folders."
                )
    return first


def _stack(adapters: Sequence[AdapterFolder], parts: Sequence[tuple[float, SavedFactors]]) -> tuple[Tensor, Tensor]:
    """Return `[w_1 s_1 B_1, ...] (out, sum of ranks)` and `[A_1; ...]` of one layer, in fp64."""
    shapes = {part.shape for _, part in parts}
    if len(shapes) > 1 or len({part.stored_A.shape[1:] for _, part in parts}) > 1:
        raise ValueError(
            f"average_adapters: layer {parts[0][1].name} has the shapes {sorted(shapes)} in these "
            f"{len(adapters)} adapters, so they are for different bases."
        )
    return torch.cat([w * part.s * part.B for w, part in parts], dim=1), torch.cat([part.A for _, part in parts])


def _as_stored(parts: Sequence[SavedFactors], B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """Return a layer's factors in the widest dtype among the adapters."""
    dtype = parts[0].stored_A.dtype
    for part in parts:
        dtype = torch.promote_types(dtype, torch.promote_types(part.stored_A.dtype, part.stored_B.dtype))
    return parts[0].as_stored(A.to(dtype), B.to(dtype))


def _biases(adapters: Sequence[AdapterFolder], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the sums `w_i s_i b_i` of the biases of `lora_B`, which PEFT scales as it does the product."""
    sums: dict[str, Tensor] = {}
    for w, adapter in zip(weights, adapters, strict=True):
        for name, bias in adapter.others().items():
            if name.endswith(_BIAS):
                part = w * adapter.scaling_of(name) * bias.double()
                sums[name] = (sums[name].double() + part if name in sums else part).to(bias.dtype)
    if sums:  # then PEFT gives every layer a bias, and one that the file lacks would keep what it was made with
        for adapter in adapters:
            for layer in adapter.linear_layers:
                factors = adapter.read(layer)
                sums.setdefault(f"{PREFIX}{layer}{_BIAS}", factors.stored_B.new_zeros(factors.shape[0]))
    return sums


def _config(adapters: Sequence[AdapterFolder], ranks: dict[str, int]) -> LoraConfig:
    """Return the config of the result: the first one's, for the layers of all of them, with `s = 1`."""
    commonest = max(set(ranks.values()), key=lambda rank: (list(ranks.values()).count(rank), rank))
    config = whole_scale(adapters[0].config, commonest)
    odd = {exact_key(name): rank for name, rank in ranks.items() if rank != commonest}
    config.rank_pattern, config.alpha_pattern = dict(odd), dict(odd)
    config.lora_bias = any(adapter.config.lora_bias for adapter in adapters)
    config.init_lora_weights = True  # a layer that PEFT adapts beyond those of the file starts without a change
    for setting in _CHOOSE_LAYERS:
        first = getattr(config, setting)
        if any(getattr(adapter.config, setting) != first for adapter in adapters):
            for other in _CHOOSE_LAYERS:
                setattr(config, other, None)
            config.target_modules = set(ranks)
            break
    return config
