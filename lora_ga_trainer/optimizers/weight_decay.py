"""Weight decay leaves anchored parameters alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..adapters.storage import anchored_parameter_names
from ..engines.support import bare_optimizer, optimizer_groups
from .registry import OPTIMIZERS


if TYPE_CHECKING:
    from transformers import Trainer


def without_anchored(names: list[str], model: nn.Module) -> list[str]:
    """Leave out of the names of decayed parameters those of a model's anchored factors."""
    anchored = anchored_parameter_names(model)
    return [name for name in names if name not in anchored]


def require_sound_optimizer(trainer: Trainer, model: nn.Module) -> None:
    """
    Refuse an optimizer that would decay anchored parameters or does not hold them.

    Raises:
        `ValueError`: naming a parameter.
    """
    optimizer = bare_optimizer(trainer)
    kinds = tuple(entry.kind for entry in OPTIMIZERS.values() if entry.decays_net_update and entry.kind is not None)
    net_decay = isinstance(optimizer, kinds)
    decay = {
        id(parameter): options.get("weight_decay", 0.0)
        for parameters, options in optimizer_groups(trainer)
        for parameter in parameters
    }
    parameters = dict(model.named_parameters())
    for name in sorted(anchored_parameter_names(model)):
        if not parameters[name].requires_grad:  # of an adapter that is not trained
            continue
        if id(parameters[name]) not in decay:
            raise ValueError(
                f"{name}: the optimizer does not hold this trained parameter; it was made for another model, or "
                "before the adapter was anchored. Let the Trainer make the optimizer (`optimizer_cls_and_kwargs`)."
            )
        if decay[id(parameters[name])] != 0.0 and not net_decay:
            raise ValueError(
                f"{name}: the optimizer applies weight_decay={decay[id(parameters[name])]} to an anchored parameter, "
                "which would untie its halves. Let the Trainer make the optimizer (`optimizer_cls_and_kwargs`), or "
                "put LoRA parameters into a group with weight_decay 0."
            )
