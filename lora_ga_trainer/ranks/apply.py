"""An adapter of planned ranks, in the place of the one that the trainer began with."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from ..adapters.find import find_lora_layers
from ..adapters.frozen import train_both_or_B
from ..adapters.host import AdapterHost, require_adapter
from ..config import LoRAGAConfig
from ..engines.devices import preserved_rng
from ..saving.load import read_lora_config
from ..starts.prepare import prepare_adapter
from .plan import RankPlan


logger = logging.getLogger(__name__)


def make_adapter_anew(trainer: Trainer, config: LoRAGAConfig, lora: LoraConfig, drawn_from: Tensor) -> None:
    """
    Put another adapter in the place of the one that the trainer's model has, before there is an optimizer.

    Args:
        trainer: its model is a `PeftModel` whose adapter was not trained.
        config: how it will start.
        lora: of the new adapter.
        drawn_from: the state of the random numbers that its factors are drawn from. Those of training stay.
    """
    base = require_adapter(trainer.model).owner.unload()  # type: ignore[operator]  # a PeftModel: a method
    with preserved_rng():
        torch.set_rng_state(drawn_from)
        # A copy: PEFT and anchoring both write into the config of the adapter.
        model = get_peft_model(base, copy.deepcopy(lora))
    if config.init != "none":
        prepare_adapter(model, config)
    train_both_or_B(model, config.train_A, config.init)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model


def require_planned(model: nn.Module, plan: RankPlan) -> None:
    """
    Refuse an adapter that PEFT has not made as it was planned.

    Raises:
        `ValueError`: naming a layer.
    """
    made = {layer.name: layer.rank for layer in find_lora_layers(model)}
    wanted = {name: rank for name, rank in plan.ranks.items() if rank > 0}
    differing = [name for name in {**made, **wanted} if made.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"Layer {name}: the plan says rank {wanted.get(name, 0)}, PEFT made {made.get(name, 0)}. PEFT takes the "
            "names in a LoraConfig as ends of names, so another layer's name may end in this one. Use "
            "LoRAGAConfig(ranks='given')."
        )


def resumed_config(folder: str | Path, host: AdapterHost, lora: LoraConfig) -> LoraConfig:
    """
    Return `lora` with the layers, ranks and alphas of the adapter in a checkpoint.

    Args:
        folder: of the checkpoint.
        host: of the adapter that is resumed.
        lora: of which everything else is taken.
    """
    saved = read_lora_config(host.place(folder))
    made = copy.deepcopy(lora)
    for name in ("target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(made, name, getattr(saved, name))
    made.exclude_modules = made.layers_to_transform = made.layers_pattern = None
    logger.info("The ranks are those of %s.", folder)
    return made
