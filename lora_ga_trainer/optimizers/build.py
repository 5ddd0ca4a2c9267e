"""The optimizer that a config asks for, built around the one a Trainer makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ..adapters.host import require_adapter
from ..engines.support import bare_optimizer, require_gradients, steps_by_itself
from .builders import BuildRequest
from .registry import ChosenOptimizer


if TYPE_CHECKING:
    from transformers import Trainer


def require_buildable(trainer: Trainer, chosen: ChosenOptimizer) -> None:
    """
    Refuse what can be seen to fail before training starts.

    Raises:
        `ValueError`: naming the setting and what it can't be combined with.
    """
    entry, setting = chosen.entry, chosen.setting
    if entry.build is None:
        return
    if entry.needs_fp64 and trainer.args.device.type == "mps":
        raise ValueError(
            f"{setting} computes in fp64, which the device (mps) lacks. Train with `use_cpu=True`, or with "
            "correction='none'."
        )
    if entry.reads_gradients:
        in_parameters = entry.correct is None
        require_gradients(trainer, setting, in_parameters=in_parameters, gathers=entry.gathers_gradients)
    if trainer.model is not None:  # with model_init it is made later
        require_adapter(trainer.model)
    if entry.wraps:
        return
    if trainer.optimizer is not None and not _is_made_by(chosen, trainer):
        raise ValueError(
            f"{setting} makes the optimizer itself, and the trainer was given a {type(trainer.optimizer).__name__}. "
            "Leave out `optimizers=`, or use correction='lora_pro', which wraps any optimizer."
        )
    if entry.check is not None:
        entry.check(trainer, setting)


def build_optimizer(trainer: Trainer, chosen: ChosenOptimizer, create: Callable[[], Optimizer]) -> Optimizer:
    """
    Return the optimizer for `trainer`, which has none yet or one that was passed to it.

    Args:
        trainer: its arguments and model are read.
        chosen: what to build.
        create: the Trainer's own `create_optimizer`: makes an optimizer from `TrainingArguments.optim` and the
            Trainer's param groups, or returns the one that exists.
    """
    entry = chosen.entry
    if entry.build is None or _is_made_by(chosen, trainer):  # the latter in a second train()
        return create()
    if entry.wraps and entry.correct is not None and steps_by_itself(trainer):
        return create()  # its gradients are corrected before the engine steps: see engine_step
    if trainer.optimizer is not None and not entry.wraps:  # a second train() with an optimizer of PEFT
        return create()
    model = trainer.accelerator.unwrap_model(trainer.model)
    require_adapter(model)
    return entry.build(BuildRequest(trainer, model, create, chosen.setting, chosen.options))


def _is_made_by(chosen: ChosenOptimizer, trainer: Trainer) -> bool:
    kind = chosen.entry.kind
    return kind is not None and isinstance(bare_optimizer(trainer), kind)
