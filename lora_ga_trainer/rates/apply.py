"""A rate that was found, handed to the optimizer and the schedule of a trainer."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from ..engines.support import steps_by_itself


# Under this name a rate is logged, and kept in `trainer_state.json`.
RATE_METRIC = "lora_ga/learning_rate"
# What trainers have whose loss does not fall as the model gets better: they score samples that the model writes.
_SCORES = ("reward_funcs", "reward_func", "reward_model", "reward_processing_classes", "judge", "num_generations")


def require_rate_can_be_found(trainer: Trainer) -> None:
    """
    Refuse a trainer whose loss says nothing about a rate, or that has no place for one.

    Raises:
        `ValueError`: naming the setting and the way out.
    """
    way_out = "Leave LoRAGAConfig.find_learning_rate out and give TrainingArguments a learning_rate."
    scores = [name for name in _SCORES if getattr(trainer, name, None) is not None]
    if scores:
        raise ValueError(
            f"find_learning_rate: {type(trainer).__name__} has `{scores[0]}` and trains on scores of what the "
            f"model writes. Its loss does not tell how good the model is, nor which rate is best. {way_out}"
        )
    if trainer.args.learning_rate <= 0:
        raise ValueError(
            f"find_learning_rate: TrainingArguments.learning_rate={trainer.args.learning_rate} must be greater than "
            "0. The rates of the groups are kept in proportion to it; leave it at its default."
        )
    _require_schedule_of_trainer(trainer, way_out)
    scheduler = trainer.lr_scheduler
    if scheduler is not None and not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"find_learning_rate: the trainer was given a {type(scheduler).__name__}, whose rates are its own. Use "
            f"`lr_scheduler_type` in TrainingArguments. {way_out}"
        )


def _require_schedule_of_trainer(trainer: Trainer, way_out: str) -> None:
    """Refuse what DeepSpeed makes by itself, and schedules that know the rate they began with: it keeps its own."""
    engine = getattr(trainer.args, "hf_deepspeed_config", None)
    if engine is None:
        return
    own = [section for section in ("optimizer", "scheduler") if section in engine.config]
    if own:
        raise ValueError(
            f"find_learning_rate: the DeepSpeed config has a section {own[0]!r}, which is DeepSpeed's own and has a "
            f"rate of its own. Leave it out, so that the Trainer makes it. {way_out}"
        )
    kind, options = trainer.args.lr_scheduler_type, trainer.args.lr_scheduler_kwargs or {}
    if kind == "polynomial" or "min_lr" in options:
        raise ValueError(
            f"find_learning_rate: lr_scheduler_type={str(kind.value)!r} with {dict(options)} ends at a fixed rate, "
            f"and DeepSpeed's schedule can't be made anew for the rate that is found. Use another one. {way_out}"
        )


def apply_rate(trainer: Trainer, rate: float) -> None:
    """
    Let a trainer train with a rate: `TrainingArguments`, the groups of the optimizer and the schedule.

    Groups keep the proportion that they have to `TrainingArguments.learning_rate` (LoRA+'s `B`). The Trainer makes its
    schedule anew, since a schedule may know the rate it began with (`min_lr`).

    Args:
        trainer: inside `on_train_begin`.
        rate: the largest one of the schedule.
    """
    optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
    # A run that is resumed with its schedule has the rate already, in all but the arguments.
    is_loaded = getattr(scheduler, "scheduler", scheduler).last_epoch > 0
    factor = 1.0 if is_loaded else rate / trainer.args.learning_rate
    trainer.args.learning_rate = rate
    if steps_by_itself(trainer) or not trainer._created_lr_scheduler:
        _scale_bases(scheduler, factor)
        return
    optimizer.defaults["lr"] = rate
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        # A schedule notes the first rate, unless it follows a measurement (plateaus).
        group["lr"] = group["initial_lr"] = group.get("initial_lr", group["lr"]) * factor
    state = scheduler.state_dict()
    trainer.lr_scheduler = None
    trainer.create_scheduler(num_training_steps=trainer.state.max_steps, optimizer=optimizer)
    if is_loaded:
        trainer.lr_scheduler.load_state_dict(state)
        for group, rate_before in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate_before
    trainer.callback_handler.lr_scheduler = trainer.lr_scheduler


def resumed_rate(trainer: Trainer) -> float:
    """
    Return the rate that was found when a resumed run began.

    Raises:
        `ValueError`: if its log has none.
    """
    found = [log[RATE_METRIC] for log in trainer.state.log_history if RATE_METRIC in log]
    if not found:
        raise ValueError(
            "resume_from_checkpoint: this run trained without find_learning_rate (its trainer_state.json has no "
            f"{RATE_METRIC!r}). Leave LoRAGAConfig.find_learning_rate out, and give TrainingArguments the "
            "learning_rate of the run."
        )
    return float(found[-1])


def _scale_bases(scheduler: Any, factor: float) -> None:
    """Multiply the rates of a schedule that is not the Trainer's to make: the user's, or that of an engine."""
    schedule = getattr(scheduler, "scheduler", scheduler)  # an engine or Accelerate may wrap it
    schedule.base_lrs = [base * factor for base in schedule.base_lrs]
    for group in schedule.optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
