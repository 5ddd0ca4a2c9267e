"""
Methods of a trainer that a bare callback has to wrap, since it can't override them.

Both are wrapped on one instance. [`LoRAGAMixin`] overrides them instead, so nothing is patched there.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from .optimizers.weight_decay import without_anchored
from .saving.resume import checked_checkpoint


if TYPE_CHECKING:
    from transformers import Trainer


def patch_trainer(trainer: Trainer) -> None:
    """Make a trainer leave anchored parameters out of weight decay, and check a checkpoint before it is loaded."""
    train, choose = trainer.train, trainer.get_decay_parameter_names

    @functools.wraps(train)
    def checked_train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        return train(checked_checkpoint(trainer, resume_from_checkpoint), *args, **kwargs)

    def undecayed(model: nn.Module) -> list[str]:
        # Decay would untie the halves of `A` and shrink `B0`.
        return without_anchored(choose(model), model)

    trainer.train = checked_train  # type: ignore[method-assign] # on this instance only
    trainer.get_decay_parameter_names = undecayed  # type: ignore[method-assign] # the same
