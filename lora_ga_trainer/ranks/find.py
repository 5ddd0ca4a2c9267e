"""Ranks for the layers of a trainer's model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import Trainer

from ..adapters.conv import AdaptedConv
from ..adapters.embedding import AdaptedEmbedding
from ..adapters.find import find_lora_layers
from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.collectives import gather_integers
from ..engines.parameters import is_sharded
from ..engines.support import holds_whole_gradients
from ..gradients.rollouts import require_repeatable
from ..maths.ranks import DEFAULT_RULE, RULES, LayerEvidence, spend
from ..starts.head_warmup import lent_warm_heads
from .evidence import gather_evidence
from .plan import LayerRank, RankPlan


if TYPE_CHECKING:
    from torch.utils.data import Dataset

# What has a rank of its own in PEFT's patterns.
_KINDS = (AdaptedLayer, AdaptedConv, AdaptedEmbedding)


def plan_ranks(
    trainer: Trainer,
    budget: int | None = None,
    rule: str = DEFAULT_RULE,
    config: LoRAGAConfig | None = None,
    probe_dataset: Dataset | None = None,
    in_bytes: bool = False,
) -> RankPlan:
    """
    Share a number of parameters out among the layers of an adapter, from one probe. Collective.

        plan = plan_ranks(trainer, budget=500_000, rule="energy")
        print(plan.table())
        lora = plan.lora_config(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

    The trainer's model has an adapter, which says what layers there are to choose from. Nothing of the trainer, its
    model or the order of its data changes. Ranks are bought in the order of what the rule finds them worth, until no
    layer that is worth it could get one more within the budget.

    Args:
        trainer: on one process or under DDP; training has not begun.
        budget: of parameters of the factors; default as many as the adapter has.
        rule: a name of the registry `RULES`.
        config: how to probe; default the trainer's own, or `LoRAGAConfig()`. `signal` and `gora` keep whole gradients
            in fp32, whatever its `estimator`.
        probe_dataset: examples to use instead of the trainer's `train_dataset`.
        in_bytes: whether the budget counts bytes of the factors, in their dtype.

    Returns:
        The plan, the same on every process.

    Raises:
        `ValueError`: naming the rule, the budget, the engine or the layer that can't be used.
    """
    begin = time.perf_counter()
    if rule not in RULES:
        raise ValueError(f"plan_ranks: rule={rule!r} is unknown. Choose one of {', '.join(RULES)}.")
    config = getattr(trainer, "lora_ga_config", None) or LoRAGAConfig() if config is None else config
    require_plannable(trainer)
    require_repeatable(trainer, config)
    layers = find_lora_layers(trainer.accelerator.unwrap_model(trainer.model))
    _require_own_ranks(layers)
    costs = [sum(layer.shape) * (layer.stored_A.element_size() if in_bytes else 1) for layer in layers]
    if budget is None:
        budget = sum(layer.rank * cost for layer, cost in zip(layers, costs, strict=True))
    if type(budget) is not int or budget < min(costs):
        raise ValueError(
            f"plan_ranks: budget={budget!r} must be a whole number of at least {min(costs)}, what one rank of the "
            "smallest layer takes."
        )
    with lent_warm_heads(trainer, config):  # the gradient through a random head says little
        evidence, samples = gather_evidence(trainer, config, RULES[rule], layers, costs, probe_dataset)
    worths = RULES[rule].worths(evidence, budget / sum(costs))
    ranks = spend(worths, costs, budget)
    # The last bits of a factorisation differ between machines: all take the ranks of the first process.
    ranks = gather_integers(trainer, *ranks)[0]
    if not any(ranks):
        raise ValueError(
            f"plan_ranks: rule={rule!r} finds no layer worth an adapter on {samples} samples. Use more num_samples, "
            "or rule='uniform'."
        )
    return RankPlan(
        rule=rule,
        budget=budget,
        spent=sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)),
        unit="bytes" if in_bytes else "parameters",
        samples=samples,
        seconds=time.perf_counter() - begin,
        layers=[_planned(*entry) for entry in zip(layers, ranks, evidence, strict=True)],
    )


def _planned(layer: AdaptedLayer, rank: int, seen: LayerEvidence) -> LayerRank:
    held = seen.spectrum[:rank].double().square().sum().item()
    return LayerRank(
        name=layer.name,
        shape=layer.shape,
        rank=rank,
        parameters=rank * sum(layer.shape),
        scaling=layer.scaling,
        expressed=min(held / seen.energy, 1.0) if seen.energy else 1.0,
        energy=seen.energy,
        confirmed=None if seen.confirmed is None else seen.sure,
        growth=seen.growth,
    )


def require_plannable(trainer: Trainer) -> None:
    """
    Refuse an engine on which the ranks can't be chosen before training begins.

    Raises:
        `ValueError`: naming the engine.
    """
    # A model that transformers shards as it loads it (DistributedConfig) is no matter of Accelerate's engine.
    sharded = any(map(is_sharded, trainer.model.parameters()))
    if sharded or not holds_whole_gradients(trainer):
        engine = "FSDP" if sharded else trainer.accelerator.distributed_type.value
        raise ValueError(
            f"Ranks are planned before training begins, and {engine} is not ready for a probe then. Plan on "
            "one process or under DDP (`plan_ranks`, or recipes/plan_ranks.py), and train with the LoraConfig that it "
            "gives."
        )


def _require_own_ranks(layers: Sequence[AdaptedLayer]) -> None:
    for layer in layers:
        if type(layer) not in _KINDS:
            raise ValueError(
                f"Layer {layer.name} ({type(layer).__name__}) has no rank of its own in a LoraConfig: torch's "
                "attention has one for both its weights, fused experts one for all. Leave it out of the adapter to "
                "plan ranks."
            )
