"""
Methods of a trainer that a bare callback has to wrap, since it can't override them.

They are wrapped on one instance. [`LoRAGAMixin`] overrides them instead, so nothing is patched there.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from .gradients.state import global_names
from .optimizers.weight_decay import without_anchored
from .saving.checkpoint import load_with_adapter, save_with_adapter
from .saving.resume import checked_checkpoint
from .saving.untrained import folder_of_untrained


if TYPE_CHECKING:
    from transformers import Trainer

    from .callback import LoRAGACallback


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


def own_callbacks(trainer: Trainer) -> list[TrainerCallback]:
    """
    Find the callbacks that the class of a trainer has added itself, in a trainer that is made already.

    They are of the classes that methods of the trainer name, other than methods of transformers.
    """
    callbacks = [other for other in trainer.callback_handler.callbacks if not is_of_transformers(other)]
    functions = [
        function
        for kind in type(trainer).__mro__
        if not kind.__module__.startswith("transformers.")
        for function in vars(kind).values()
        if isinstance(function, types.FunctionType)
    ]
    named = [f.__globals__.get(name) for f in functions for name in global_names(f.__code__)] if callbacks else []
    return [other for other in callbacks if any(type(other) is kind for kind in named)]


def is_of_transformers(callback: TrainerCallback) -> bool:
    """Tell whether a callback is one of transformers, or derived from one."""
    kinds = [kind for kind in type(callback).__mro__ if kind not in (TrainerCallback, object)]
    return any(kind.__module__.startswith("transformers.") for kind in kinds)


def log_without_start(
    log: Callable[..., None], seconds: float, logs: dict[str, Any], start_time: float | None, *more: Any, **kwargs: Any
) -> None:
    """
    Log as a Trainer does, with the time that the start took left out of the runtime and of what is counted by second.

    Args:
        log: the trainer's own.
        seconds: the time that the start took in this `train()`.
        logs: changed in place, as the Trainer changes them: the last ones are what `train()` returns.
        start_time: when training began, where the Trainer gives it. It counts tokens by second from there.
        more, kwargs: what else `log` takes.
    """
    with_start = logs.get("train_runtime", 0.0)
    if with_start > seconds > 0:
        runtime = with_start - seconds
        logs["train_runtime"] = round(runtime, 4)
        for name in ("train_samples_per_second", "train_steps_per_second", "train_tokens_per_second"):
            if name in logs:
                logs[name] = round(logs[name] * with_start / runtime, 3)
    if start_time is None:  # a class may have a `log` that takes no more than the figures
        log(logs, *more, **kwargs)
    else:
        log(logs, start_time + seconds, *more, **kwargs)


def patch_trainer(trainer: Trainer, callback: LoRAGACallback) -> None:
    """
    Make a trainer leave anchored parameters out of weight decay, check a checkpoint before it is loaded, begin
    training with a start, and leave the time of the start out of its figures.

    Args:
        trainer: made already.
        callback: the one that starts.
    """
    train, choose, log = trainer.train, trainer.get_decay_parameter_names, trainer.log

    @functools.wraps(train)
    def checked_train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        put_first(trainer, callback, own_callbacks(trainer))
        checkpoint = checked_checkpoint(trainer, resume_from_checkpoint)
        callback.resumes_from = folder_of_untrained(trainer, checkpoint)
        return train(checkpoint, *args, **kwargs)

    def undecayed(model: nn.Module) -> list[str]:
        # Decay would untie the halves of `A` and shrink `B0`.
        return without_anchored(choose(model), model)

    @functools.wraps(log)
    def timed_log(logs: dict[str, Any], start_time: float | None = None, *args: Any, **kwargs: Any) -> None:
        log_without_start(log, callback.start_seconds, logs, start_time, *args, **kwargs)

    save, load, load_best = trainer._save, trainer._load_from_checkpoint, trainer._load_best_model

    def whole_save(output_dir: str | None = None, state_dict: Any = None) -> None:
        save_with_adapter(trainer, lambda whole: save(output_dir, whole), output_dir, state_dict)

    def whole_load(folder: str, *args: Any, **kwargs: Any) -> None:
        load_with_adapter(trainer, lambda: load(folder, *args, **kwargs), folder, best=False)

    def whole_best() -> None:
        load_with_adapter(trainer, load_best, trainer.state.best_model_checkpoint or "", best=True)

    trainer._save, trainer._load_from_checkpoint, trainer._load_best_model = whole_save, whole_load, whole_best
    trainer.train, trainer.log = checked_train, timed_log
    trainer.get_decay_parameter_names = undecayed
