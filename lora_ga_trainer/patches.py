"""
Methods of a trainer that a bare callback has to wrap, since it can't override them.

All are wrapped on one instance. [`LoRAGAMixin`] overrides them instead, so nothing is patched there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from .optimizers.weight_decay import without_anchored
from .saving.checkpoint import load_with_adapter, save_with_adapter
from .saving.resume import checked_checkpoint


if TYPE_CHECKING:
    from transformers import Trainer


def put_first(trainer: Trainer, callback: TrainerCallback, own: Sequence[TrainerCallback] = ()) -> None:
    """
    Let a callback run before the trainer's other ones, those of transformers and its own excepted.

    Callbacks that copy weights when training begins (moving averages) have to see the start. The trackers of
    transformers set themselves up at that moment and have to be ready for what the start logs.

    Args:
        trainer: whose callbacks are put in another order.
        callback: the one that starts.
        own: those that the trainer's class adds itself. Its loss may need what they set up: TRL's SDPO and SDFT make
            a second adapter, the teacher, when training begins.
    """
    callbacks = trainer.callback_handler.callbacks
    if callback not in callbacks:
        return
    own = [other for other in own if other in callbacks]  # not what the user has removed
    for other in (callback, *own):
        callbacks.remove(other)
    of_transformers = [is_of_transformers(other) for other in callbacks]
    place = of_transformers.index(False) if False in of_transformers else len(callbacks)
    callbacks[place:place] = [*own, callback]


def is_of_transformers(callback: TrainerCallback) -> bool:
    """Tell whether a callback is one of transformers, or derived from one."""
    kinds = [kind for kind in type(callback).__mro__ if kind not in (TrainerCallback, object)]
    return any(kind.__module__.startswith("transformers.") for kind in kinds)


def patch_trainer(trainer: Trainer, callback: TrainerCallback) -> None:
    """
    Make a trainer leave anchored parameters out of weight decay, check a checkpoint before it is loaded, and begin
    training with a start.

    Args:
        trainer: made already.
        callback: the one that starts.
    """
    train, choose = trainer.train, trainer.get_decay_parameter_names

    @functools.wraps(train)
    def checked_train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        put_first(trainer, callback)
        return train(checked_checkpoint(trainer, resume_from_checkpoint), *args, **kwargs)

    def undecayed(model: nn.Module) -> list[str]:
        # Decay would untie the halves of `A` and shrink `B0`.
        return without_anchored(choose(model), model)

    save, load, load_best = trainer._save, trainer._load_from_checkpoint, trainer._load_best_model

    def whole_save(output_dir: str | None = None, state_dict: Any = None) -> None:
        save_with_adapter(trainer, lambda: save(output_dir, state_dict), output_dir, state_dict)

    def whole_load(folder: str, *args: Any, **kwargs: Any) -> None:
        load_with_adapter(trainer, lambda: load(folder, *args, **kwargs), folder, best=False)

    def whole_best() -> None:
        load_with_adapter(trainer, load_best, trainer.state.best_model_checkpoint or "", best=True)

    trainer._save, trainer._load_from_checkpoint, trainer._load_best_model = whole_save, whole_load, whole_best
    trainer.train = checked_train
    trainer.get_decay_parameter_names = undecayed
