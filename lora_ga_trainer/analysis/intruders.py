"""Write an adapter whose intruder dimensions are scaled down."""

from __future__ import annotations

import copy
import math
import os
import time
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..maths.intruders import Comparison
from ..saving.adapter_folder import AdapterFolder, SavedFactors, exact_key, write_adapter
from .analyse import add_base, compare_layer, describe, require_settings
from .base import open_base
from .directions import StartDirections
from .report import AdapterReport


@torch.no_grad()
def remove_intruders(
    base: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    strength: float = 0.75,
    k: int = 10,
    eps: float = 0.5,
    device: str | torch.device | None = None,
) -> AdapterReport:
    """
    Write an adapter whose intruder dimensions are scaled down, which recovers some of what the base knew before.

        remove_intruders("path/of/the/base", "outputs/sst2", "outputs/sst2_mended", strength=0.75)

    With `u_j, s_j, v_j` the intruders among the singular triplets of `W + s B A`, the adapted weight becomes

        W' = W + s B A + (strength - 1) sum_j s_j u_j v_j^T

    (arXiv 2410.21228; PEFT's `reduce_intruder_dimension`). PEFT cuts the new change back to rank r and loses some of
    it. Here each intruder becomes one more row of `A` and column of `B`, so nothing is lost but the rounding of the
    factors' dtype: a layer with n intruders has rank r + n, of which `rank_pattern` and `alpha_pattern` tell. Plain
    PEFT loads the folder. Layers without intruders, trained heads and biases are copied to the bit. The result
    is a plain adapter, also where the first one was anchored. There are k intruders in a layer at most. Usually there
    are r at most, so that the rank stays below 2r, but no law says so.

    Args:
        base: see [`analyse_adapter`].
        folder: of the adapter.
        output: another folder, made if it does not exist.
        strength: what remains of an intruder: 1 changes nothing, 0 takes it out. Default 0.75, as PEFT's.
        k, eps, device: see [`analyse_adapter`].

    Returns:
        The [`AdapterReport`] of the adapter as it was, with the intruders that were scaled down.

    Raises:
        `ValueError`: as [`analyse_adapter`]; if `output` is `folder`, or `strength` is not a number from 0 to 1.
    """
    begin = time.perf_counter()
    require_settings("remove_intruders", k, eps, least=1)
    if type(strength) not in (int, float) or not 0 <= strength <= 1:
        raise ValueError(f"remove_intruders: strength={strength!r} must be a number from 0 to 1.")
    if Path(output).resolve() == Path(folder).resolve():
        raise ValueError(f"remove_intruders: output={os.fspath(output)!r} is the adapter itself. Name another folder.")
    adapter = AdapterFolder(folder, "remove_intruders")
    weights, starts = open_base(base, adapter.config.fan_in_fan_out), StartDirections(adapter, None)
    tensors, grown, layers = adapter.others(), {}, []
    for name in adapter.layers:
        factors = adapter.read(name)
        found, norm = compare_layer(factors, weights, k, eps, device)
        layer = describe(factors, starts)
        add_base(layer, factors, found, norm, eps)
        layers.append(layer)
        removed = [intruder.index for intruder in layer.intruders or []] if strength < 1 else []
        if removed:
            grown[name] = factors.rank + len(removed), factors.s
        tensors.update(_without(factors, found, removed, strength))
    write_adapter(output, _grown_config(adapter.config, grown), tensors)
    return AdapterReport(os.fspath(folder), k, eps, starts.source, time.perf_counter() - begin, layers)


def _without(factors: SavedFactors, found: Comparison, removed: list[int], strength: float) -> dict[str, Tensor]:
    """Return the tensors of a layer with `(strength - 1) s_j u_j v_j^T` of some triplets added to its change."""
    B, A = factors.stored_B.flatten(1), factors.stored_A.flatten(1)
    if removed:
        # PEFT multiplies the product by s, so the new part is divided by it. Both factors carry its root.
        root = ((1 - strength) * found.S[removed] / abs(factors.s)).sqrt().cpu()
        U, Vt = found.U[:, removed].cpu() * root, found.Vt[removed].cpu() * root[:, None]
        B, A = torch.cat([B, U.to(B.dtype)], dim=1), torch.cat([A, math.copysign(1, -factors.s) * Vt.to(A.dtype)])
    return factors.as_stored(A, B)


def _grown_config(config: LoraConfig, grown: dict[str, tuple[int, float]]) -> LoraConfig:
    """Return a config in which some layers have another rank and the same `s`."""
    config = copy.copy(config)
    # PEFT takes the first pattern that matches, hence these before the others.
    root = math.sqrt if config.use_rslora else float
    ranks = {exact_key(name): rank for name, (rank, _) in grown.items()}
    alphas = {exact_key(name): s * root(rank) for name, (rank, s) in grown.items()}
    config.rank_pattern = {**ranks, **cast(dict[str, Any], config.rank_pattern)}
    config.alpha_pattern = {**alphas, **cast(dict[str, Any], config.alpha_pattern)}
    config.inference_mode = True
    return config
