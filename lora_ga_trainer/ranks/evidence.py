"""Evidence for the rank of each layer: what a rule asks for, from the probe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.host import require_adapter
from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.collectives import mean_over_processes
from ..engines.support import probed_module
from ..gradients.accumulator import ExactGradient
from ..gradients.borrow import borrowed
from ..gradients.estimate import GradientEstimate
from ..gradients.failing import failing_together
from ..gradients.halves import estimate_halves
from ..gradients.order import probe_order
from ..gradients.probe import estimate_gradients
from ..gradients.samples import count_items, mean_loss, micro_batches
from ..gradients.sketch import top_svds
from ..maths.dimension import two_nn
from ..maths.ranks import LayerEvidence, RankRule, confirm


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

# Points that a dimension is estimated from: distances between all of them are computed.
_POINTS = 2048
# Of a name such as `model.layers.3.mlp.up_proj`, what ends in its first number.
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


def gather_evidence(
    trainer: Trainer,
    config: LoRAGAConfig,
    rule: RankRule,
    layers: Sequence[AdaptedLayer],
    costs: Sequence[int],
    probe_dataset: Dataset | None = None,
) -> tuple[list[LayerEvidence], int]:
    """
    Probe for what a rule needs of every layer. Collective.

    Args:
        trainer, config, layers, probe_dataset: see [`estimate_gradients`].
        rule: its `needs` say what is looked at.
        costs: of one rank of each layer.

    Returns:
        The evidence by layer, and the samples that it was taken from.
    """
    if "halves" in rule.needs:
        return _from_halves(trainer, config, layers, costs, probe_dataset)
    if "weights" in rule.needs:
        config = replace(config, estimator="exact", sketch_size=None)
    estimate = estimate_gradients(trainer, config, layers, probe_dataset)
    growths: Sequence[int | None] = [None] * len(layers)
    if "dimensions" in rule.needs:
        growths = _growths(trainer, config, layers, probe_dataset)
    evidence = []
    for layer, cost, growth in zip(layers, costs, growths, strict=True):
        spectrum, energy = _spectrum(estimate, layer)
        found = LayerEvidence(layer.shape, cost, spectrum, energy, growth=growth)
        if "weights" in rule.needs:
            product = layer.dense_weight().float() * _gradient(estimate, layer)
            found = replace(found, sensitivity=product.abs().mean().item())
        evidence.append(found)
    return evidence, estimate.samples


def _from_halves(
    trainer: Trainer,
    config: LoRAGAConfig,
    layers: Sequence[AdaptedLayer],
    costs: Sequence[int],
    probe_dataset: Dataset | None,
) -> tuple[list[LayerEvidence], int]:
    """Probe twice, see [`estimate_halves`]. Sums are linear in the samples, so both halves together are the whole."""
    first, second = estimate_halves(trainer, config, layers, probe_dataset)
    items = first.items + second.items
    evidence = []
    for layer, cost in zip(layers, costs, strict=True):
        G1, G2 = _gradient(first, layer), _gradient(second, layer)
        whole = (G1.double() * first.items + G2.double() * second.items) / items
        confirmed, errors = confirm(G1, G2)
        spectrum = torch.linalg.svdvals(whole)
        energy = whole.square().sum().item()
        evidence.append(LayerEvidence(layer.shape, cost, spectrum, energy, confirmed=confirmed, errors=errors))
    return evidence, first.samples + second.samples


def _gradient(estimate: GradientEstimate, layer: AdaptedLayer) -> Tensor:  # (out, in), fp32
    found = estimate.estimators[layer.name]
    assert isinstance(found, ExactGradient)
    return found.G


def _spectrum(estimate: GradientEstimate, layer: AdaptedLayer) -> tuple[Tensor, float]:
    """Return the singular values that are known of `G`, and `||G||^2`."""
    found = estimate.estimators[layer.name]
    if isinstance(found, ExactGradient):
        G = found.G.double()
        return torch.linalg.svdvals(G), G.square().sum().item()
    top = top_svds(estimate.estimators, {layer.name: found.directions})[layer.name]
    return top.S.double(), top.total


def block_of(name: str) -> str | None:
    """Return the name of the block that a layer is in, `model.layers.3` say; `None` outside of any."""
    found = _BLOCK.match(name)
    return None if found is None else found.group()


def _growths(
    trainer: Trainer, config: LoRAGAConfig, layers: Sequence[AdaptedLayer], probe_dataset: Dataset | None
) -> list[int]:
    """Return `max(d_out - d_in, 0)` of the block of every layer, 0 outside of blocks. Collective."""
    model = probed_module(trainer)
    base = require_adapter(trainer.accelerator.unwrap_model(trainer.model)).base
    names = sorted({block for layer in layers if (block := block_of(layer.name)) is not None})
    points: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    with borrowed(trainer, model, probe_dataset), probe_order(trainer, config), torch.no_grad():
        for number, micro_batch in enumerate(micro_batches(trainer, config.num_samples)):
            with failing_together(trainer, number), _watched(base, points, _mask(micro_batch.batch)):
                mean_loss(trainer, model, micro_batch.batch, count_items(trainer, micro_batch))
    growth: dict[str | None, int] = {None: 0}
    for name, (entering, leaving) in points.items():
        before, after = (_dimension(trainer, seen, name) for seen in (entering, leaving))
        growth[name] = max(after - before, 0)
    return [growth[block_of(layer.name)] for layer in layers]


def _dimension(trainer: Trainer, seen: Sequence[Tensor], block: str) -> int:
    """Return the dimension of what passed, to the next whole number; over processes the mean. Collective."""
    if not seen:
        raise ValueError(
            f"rule='gelora': no tensor of features passes through block {block}, so it has no dimension. Use another "
            "rule."
        )
    points = torch.cat(list(seen))
    chosen = torch.linspace(0, len(points) - 1, min(len(points), _POINTS)).long()
    return round(mean_over_processes(trainer, two_nn(points[chosen]), 1.0))


@contextmanager
def _watched(
    base: nn.Module, points: Mapping[str, tuple[list[Tensor], list[Tensor]]], mask: Tensor | None
) -> Iterator[None]:
    """Keep what enters and leaves each block, one point a token."""

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            made = output[0] if isinstance(output, tuple) else output
            for kept, value in zip(points[name], (given, made), strict=True):
                if isinstance(value, Tensor) and value.is_floating_point():
                    tokens = value.flatten(0, -2)
                    if mask is not None and mask.shape == value.shape[:-1]:
                        tokens = tokens[mask.flatten().bool()]
                    kept.append(tokens.float().cpu())

        return after

    handles = [base.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in points]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None
