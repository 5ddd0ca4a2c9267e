"""Checks of an optimizer that is to step anchored parameters: weight decay has to leave them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapters.storage import anchored_parameter_names
from ..engines.support import bare_optimizer, optimizer_groups, steps_by_itself
from .lockstep import require_lockstep
from .registry import OPTIMIZERS


if TYPE_CHECKING:
    from transformers import Trainer


def without_anchored(names: list[str], model: nn.Module) -> list[str]:
    """Leave out of the names of decayed parameters those of a model's anchored factors."""
    anchored = anchored_parameter_names(model)
    return [name for name in names if name not in anchored]


def require_sound_optimizer(trainer: Trainer, model: nn.Module) -> None:
    """
    Refuse an optimizer that would decay anchored parameters, does not hold them, or can't step them as plain ones.

    Raises:
        `ValueError`: naming a parameter.
    """
    optimizer = bare_optimizer(trainer)
    kinds = tuple(entry.kind for entry in OPTIMIZERS.values() if entry.decays_net_update and entry.kind is not None)
    net_decay = isinstance(optimizer, kinds)
    groups = {id(parameter): options for held, options in optimizer_groups(trainer) for parameter in held}
    parameters = dict(model.named_parameters())
    tried: list[dict[str, Any]] = []
    for name in sorted(anchored_parameter_names(model)):
        if not parameters[name].requires_grad:  # of an adapter that is not trained
            continue
        options = groups.get(id(parameters[name]))
        if options is None:
            raise ValueError(
                f"{name}: the optimizer does not hold this trained parameter; it was made for another model, or "
                "before the adapter was anchored. Let the Trainer make the optimizer (`optimizer_cls_and_kwargs`)."
            )
        if options.get("weight_decay", 0.0) != 0.0 and not net_decay:
            raise ValueError(
                f"{name}: the optimizer applies weight_decay={options['weight_decay']} to an anchored parameter, "
                "which would untie its halves. Let the Trainer make the optimizer (`optimizer_cls_and_kwargs`), or, "
                "where you make it yourself, put anchored parameters into a group with weight_decay 0:\n"
                "    names = lora_ga_trainer.anchored_parameter_names(model)\n"
                "    anchored = [p for n, p in model.named_parameters() if n in names]\n"
                "    groups = [{'params': others}, {'params': anchored, 'weight_decay': 0.0}]"
            )
        # LoRA-Pro's own optimizer steps A and B themselves; an engine that steps by itself has a copy of its own.
        if not net_decay and not steps_by_itself(trainer) and not any(options is other for other in tried):
            require_lockstep(getattr(optimizer, "inner", optimizer), options, parameters[name].device)
            tried.append(options)
