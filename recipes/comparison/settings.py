"""Settings of a comparison, beside those of a recipe, and values that the user can't choose."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from finetuning.arguments import DataArguments, LoraArguments, ModelArguments
from transformers import Seq2SeqTrainingArguments

from lora_ga_trainer import LoRAGAConfig


# Arguments of the Trainer that the comparison sets, each with what to use instead.
OWNED = {
    "learning_rate": "every arm is swept over --rates",
    "seed": "use --seeds",
    "num_train_epochs": "every run has the same --max_steps",
    "eval_strategy": "use --eval_points",
    "eval_steps": "use --eval_points",
    "eval_on_start": "use --eval_points",
    "eval_delay": "use --eval_points",
    "load_best_model_at_end": "every run is judged by its last step",
    "push_to_hub": "no run is meant to be kept",
    "resume_from_checkpoint": "a comparison continues by itself in its output_dir",
}


# Training arguments that change what a run gives; the others may differ when a comparison goes on.
TRAINING = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "data_seed",
    "world_size",
    "train_batch_size",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "optim_target_modules",
    "use_liger_kernel",
    "tf32",
    "average_tokens_across_devices",
    # Losses of held-out rows are means of the means of batches, except a classifier's.
    "eval_batch_size",
    "predict_with_generate",
    "generation_max_length",
    "generation_num_beams",
)


@dataclass
class CompareArguments:
    """Say what is compared, and at what expense."""

    arms: str = field(
        default="lora,lora_ga",
        metadata={
            "help": "Comma-separated arms, each `method[:option=value]...[+correction]`; options are fields of "
            "LoRAGAConfig and of the adapter. lora_ga:gamma=64+lora_pro, lora:lora_r=16."
        },
    )
    rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        metadata={"help": "Learning rates that each sweep begins with (`full` and lora_pro_adamw: a tenth of them)."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Every rate is run with the first of them, the winning rate with all."},
    )
    max_extensions: int = field(
        default=3, metadata={"help": "Rates that may be added to a sweep whose best rate lies at its end."}
    )
    eval_points: int = field(
        default=4, metadata={"help": "Evaluations of a run, evenly spread; a multiple of 4 that divides max_steps."}
    )
    plan_only: bool = field(default=False, metadata={"help": "Print what would be run and how long, and stop."})


def require_comparable(compare: CompareArguments, args: Seq2SeqTrainingArguments) -> None:
    """
    Refuse what would be ignored or can't be measured.

    Raises:
        `ValueError`: naming the argument and what to use instead.
    """
    defaults = {f.name: f.default for f in fields(args) if f.default is not MISSING}
    for name, instead in OWNED.items():
        value = getattr(args, name)
        if value != defaults[name] and not (name == "eval_strategy" and value == "no"):
            raise ValueError(f"{name}={value!r}: {instead}.")
    if args.max_steps < 4:
        raise ValueError(f"max_steps={args.max_steps}: give the steps of every run, at least 4.")
    points = compare.eval_points
    if points < 4 or points % 4 or args.max_steps % points:
        raise ValueError(
            f"eval_points={points} must be a multiple of 4 that divides max_steps={args.max_steps}: a quarter, half "
            "and all of the steps are reported."
        )


def metric_of(args: Seq2SeqTrainingArguments) -> tuple[str, float]:
    """Return the metric that decides, `eval_loss` unless told otherwise, and the sign that makes less of it better."""
    name = args.metric_for_best_model or "eval_loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    greater = args.greater_is_better if args.greater_is_better is not None else not name.endswith("loss")
    return name, -1.0 if greater else 1.0


def settings_of(
    model: ModelArguments,
    data: DataArguments,
    lora: LoraArguments,
    config: LoRAGAConfig,
    args: Seq2SeqTrainingArguments,
    compare: CompareArguments,
) -> dict[str, Any]:
    """Return all that changes what a run gives, under the names of the command line."""
    return {
        **asdict(model),
        **asdict(data),
        **asdict(lora),
        **config.to_dict(),
        **{name: getattr(args, name) for name in TRAINING},
        "eval_points": compare.eval_points,
    }
