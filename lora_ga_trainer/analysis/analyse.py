"""The figures of every layer of an adapter, from its files and the weights under it, one layer at a time."""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from ..maths.intruders import Comparison, compare_directions
from ..maths.products import effective_rank, product_svd, share_of_inputs, share_of_outputs, stable_rank
from ..saving.adapter_folder import AdapterFolder, SavedFactors
from .base import BaseWeights, open_base
from .directions import StartDirections
from .report import AdapterReport, Intruder, LayerChange


@torch.no_grad()
def analyse_adapter(
    base: nn.Module | str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    probe_file: str | os.PathLike[str] | None = None,
    k: int = 10,
    eps: float = 0.5,
    device: str | torch.device | None = None,
) -> AdapterReport:
    """
    Tell what training did to each adapted weight.

        report = analyse_adapter("path/of/the/base", "outputs/sst2")
        print(report.table())

    Of each layer: the singular values, the stable and the effective rank of the change `s B A`, how much of it lies
    in the directions that the start came from and in the strongest directions of the base weight, and its *intruder
    dimensions*: directions among the top `k` of `W + s B A` that are like none of `W` (arXiv 2410.21228).

    What is exact: all figures of the change alone and all shares, from QR decompositions of the factors in fp64. For
    intruders a layer is screened first, by subspace iteration with bounds on the error. If every direction is cleared,
    there is none. If one is not, `W W^T` and that of `W + s B A` are decomposed in fp64, which is as exact as a full
    singular value decomposition but for directions below 1e-7 of the strongest one; `lora_ga_trainer.maths.intruders`
    has the analysis. Memory is that of one layer: its weight, and in fp64 itself, its sum and two square matrices of
    its shorter side.

    Args:
        base: what the adapter was trained on: a folder of safetensors, sharded or not, or a model in memory, with an
            adapter in it or not. Quantised layers of a model are dequantised one at a time. `None` only with `k=0`.
        folder: of the adapter, as PEFT or a Trainer has written it; anchored or plain.
        probe_file: of the run that trained it, `LoRAGAConfig.probe_file`. Without one an anchored adapter tells of
            its own start.
        k: directions of `W + s B A` that are looked at for intruders, and directions of `W` for the overlap. Default
            10, as PEFT's. With 0 the base is not read and these figures are `None`.
        eps: a direction is an intruder if `max_i |u . u0_i| < eps`. Default 0.5, as PEFT's.
        device: to work on. Default: where the weight lies; the CPU for a folder.

    Raises:
        `ValueError`: naming the layer or the setting: DoRA and other variants, fused experts, adapters of
            `nn.MultiheadAttention`, starts of PEFT that change the base, a base of other shapes, quantised files.
    """
    begin = time.perf_counter()
    require_settings("analyse_adapter", k, eps, least=0)
    if base is None and k:
        raise ValueError("analyse_adapter: base=None: intruders are directions that the base lacks. Name it, or k=0.")
    adapter = AdapterFolder(folder, "analyse_adapter")
    starts = StartDirections(adapter, probe_file)
    weights = open_base(base, adapter.config.fan_in_fan_out) if base is not None and k else None
    layers = []
    for name in adapter.layers:
        factors = adapter.read(name)
        layer = describe(factors, starts)
        if weights is not None:
            found, norm = compare_layer(factors, weights, k, eps, device)
            add_base(layer, factors, found, norm, eps)
        layers.append(layer)
    return AdapterReport(os.fspath(folder), k, eps, starts.source, time.perf_counter() - begin, layers)


def require_settings(what: str, k: int, eps: float, least: int) -> None:
    """
    Check the settings of a search for intruders.

    Raises:
        `ValueError`: naming the setting.
    """
    if type(k) is not int or k < least:
        raise ValueError(f"{what}: k={k!r} must be a whole number of at least {least}.")
    if type(eps) not in (int, float) or not 0 < eps <= 1:
        raise ValueError(f"{what}: eps={eps!r} must be a number above 0 and at most 1, the cosine of an angle.")


def compare_layer(
    factors: SavedFactors,
    weights: BaseWeights,
    k: int,
    eps: float,
    device: str | torch.device | None,
) -> tuple[Comparison, float]:
    """Compare a changed weight with the weight; see [`compare_directions`]. Also return `||W||`."""
    W = weights.weight(factors)
    W = W if device is None else W.to(device)
    if not W.isfinite().all():
        raise ValueError(f"Layer {factors.name}: the base weight is not finite. Download or load the base again.")
    if W.device.type == "mps":
        W = W.cpu()  # which lacks fp64 and factorisations
    B, A = (factors.s * factors.B).to(W.device), factors.A.to(W.device)
    norm = torch.linalg.vector_norm(W, dtype=torch.float64).item()
    return compare_directions(W, B, A, k, eps), norm


def describe(factors: SavedFactors, starts: StartDirections) -> LayerChange:
    """Return the figures of a layer that need no base."""
    B, A = factors.s * factors.B, factors.A
    _, S, _ = product_svd(B, A)
    layer = LayerChange(
        name=factors.name,
        shape=factors.shape,
        rank=factors.rank,
        singular_values=S.tolist(),
        norm=S.square().sum().sqrt().item(),
        stable_rank=stable_rank(S),
        effective_rank=effective_rank(S),
    )
    start = starts.of_layer(factors)
    if start is not None:
        layer.start_share_out, layer.start_share_in = share_of_outputs(B, A, start.U), share_of_inputs(B, A, start.V)
        layer.start_directions = start.U.shape[1], start.V.shape[1]
    return layer


def add_base(layer: LayerChange, factors: SavedFactors, found: Comparison, norm: float, eps: float) -> None:
    """Add the figures of a layer beside those of its weight, whose Frobenius norm is `norm`."""
    layer.relative_norm = layer.norm / norm if norm > 0 else None
    B, A = factors.s * factors.B, factors.A
    layer.base_share_out = share_of_outputs(B, A, found.base_U.to(B.device))
    layer.base_share_in = share_of_inputs(B, A, found.base_V.to(B.device))
    layer.top_values = found.S.tolist()
    layer.least_similarity = min(found.similarity.tolist(), default=None)
    layer.screened = found.screened
    layer.intruders = [
        Intruder(j, value, similarity)
        for j, (value, similarity) in enumerate(zip(found.S.tolist(), found.similarity.tolist(), strict=True))
        if similarity < eps
    ]
