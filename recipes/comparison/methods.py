"""The methods that can be compared, each with its source: what it puts on a model before training."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from finetuning.arguments import LoraArguments
from finetuning.models import make_lora_config
from peft import AdaLoraConfig, LoKrConfig, LoraConfig, PeftConfig, RandLoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from comparison.compacter import add_compacter
from comparison.inca import add_reading_heads
from comparison.lotr import add_lotr
from comparison.starts import (
    Samples,
    drop_ties,
    freeze_orthogonal_A,
    reallocate_ranks,
    start_by_eva,
    start_by_peft_lora_ga,
    step_by_peft_lora_fa,
    turn_at_random,
)


@dataclass(frozen=True)
class Method:
    """
    One way to fine-tune.

    Args:
        about: what it is, with its source.
        adapt: puts it on a plain model, given PEFT's plain LoRA settings and the samples that a start may read.
        init: `LoRAGAConfig.init`.
        settings: further fields of `LoRAGAConfig`.
        lora: changes to the recipe's arguments of the adapter.
        rate_factor: the sweep begins with the common rates times this.
        correctable: whether a LoRA-Pro correction can go with it: its pairs must be plain or anchored LoRA.
        after_start: adds a callback that runs after the start is written.
        resumes: whether a checkpoint holds all that its training needs. Where it does not, none is made, and a run
            that was cut off begins anew.
    """

    about: str
    adapt: Callable[[nn.Module, LoraConfig, Samples], nn.Module]
    init: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0
    correctable: bool = True
    after_start: Callable[[Trainer], None] | None = None
    resumes: bool = True

    def make(self, model: nn.Module, lora: LoraArguments, task: str, samples: Samples) -> nn.Module:
        """Return `model` with this method on it."""
        return self.adapt(model, make_lora_config(replace(lora, **self.lora), task), samples)


def _widen_base(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
    """Widen a base in half precision, as PEFT widens adapters: at small rates most steps would round away."""
    return model.float()


def _add_lora(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
    return get_peft_model(model, config)


def _make_peft_start(init: str) -> Callable[[nn.Module, LoraConfig, Samples], nn.Module]:
    """Return a function that lets PEFT compute a start from the base weights, which it changes."""

    def adapt(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
        config.init_lora_weights = init
        return get_peft_model(model, config)

    return adapt


def _make_tuner(kind: type[PeftConfig], **settings: Any) -> Callable[[nn.Module, LoraConfig, Samples], nn.Module]:
    """Return a function that puts another tuner of PEFT on the layers that LoRA would adapt."""

    def adapt(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
        shared = {name: getattr(config, name) for name in ("task_type", "target_modules", "modules_to_save")}
        of_rank = {"r": config.r, "alpha": config.lora_alpha} if kind is LoKrConfig else {}
        return get_peft_model(model, kind(**shared, **of_rank, **settings))

    return adapt


def _add_adalora(model: nn.Module, config: LoraConfig, samples: Samples) -> nn.Module:
    """Begin at 1.5 r and let the budget fall to r between a tenth and seven tenths of the steps."""
    steps = samples.args.max_steps
    adalora = AdaLoraConfig(
        task_type=config.task_type,
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
        lora_alpha=config.lora_alpha,
        init_r=config.r + config.r // 2,
        target_r=config.r,
        tinit=steps // 10,
        tfinal=3 * steps // 10,
        deltaT=max(1, steps // 100),
        total_step=steps,
    )
    adapted = get_peft_model(model, adalora)
    _regularise_in_training_only(adapted.base_model, adalora)
    return adapted


def _regularise_in_training_only(tuner: nn.Module, config: AdaLoraConfig) -> None:
    """Keep AdaLoRA's penalty, which PEFT adds to every loss, out of the loss that arms are judged by."""
    weight = config.orth_reg_weight

    def before(module: nn.Module, args: Any) -> None:
        config.orth_reg_weight = weight if module.training else 0.0

    def after(module: nn.Module, args: Any, output: Any) -> None:
        config.orth_reg_weight = weight

    tuner.register_forward_pre_hook(before)
    tuner.register_forward_hook(after)


METHODS = {
    "full": Method("full fine-tuning, of fp32 weights", _widen_base, rate_factor=0.1, correctable=False),
    "lora": Method("LoRA, arXiv 2106.09685", _add_lora),
    "rslora": Method("rank-stabilised LoRA, arXiv 2312.03732", _add_lora, lora={"use_rslora": True}),
    "lora_plus": Method(
        "LoRA+, arXiv 2402.12354: the rate of B is 16 times that of A",
        _add_lora,
        settings={"loraplus_lr_ratio": 16.0},
        correctable=False,
    ),
    "dora": Method("DoRA, arXiv 2402.09353", _add_lora, lora={"use_dora": True}),
    "adalora": Method(
        "AdaLoRA, arXiv 2303.10512",
        _add_adalora,
        correctable=False,
        after_start=reallocate_ranks,
        resumes=False,  # PEFT saves pruned factors, which fit no new adapter, and not what the pruning goes by
    ),
    "pissa": Method("PiSSA, arXiv 2404.02948", _make_peft_start("pissa")),
    "olora": Method("OLoRA, arXiv 2406.01775", _make_peft_start("olora")),
    "eva": Method("EVA, arXiv 2410.07170", start_by_eva),
    "randlora": Method("RandLoRA, arXiv 2502.00987, PEFT's defaults", _make_tuner(RandLoraConfig), correctable=False),
    "lokr": Method("LoKr (Kronecker factors), arXiv 2309.14859", _make_tuner(LoKrConfig), correctable=False),
    "lotr": Method(
        "LoTR (one tensor for like layers), arXiv 2402.01376",
        add_lotr,
        # Outer factors of variance 1 let a step of the cores move a weight some hundred times as far as LoRA's step.
        rate_factor=0.01,
        correctable=False,
    ),
    "compacter": Method("Compacter (hypercomplex adapters), arXiv 2106.04647", add_compacter, correctable=False),
    "inca": Method(
        "InCA (heads that read frozen activations), arXiv 2303.04105; classification only",
        add_reading_heads,
        correctable=False,
    ),
    "asymmetric": Method(
        "asymmetric LoRA, arXiv 2402.16842: A orthogonal at random and frozen", freeze_orthogonal_A, correctable=False
    ),
    "frozen_a": Method(
        "A as PEFT draws it, and frozen: LoRA-FA, arXiv 2308.03303, as its paper trains it",
        _add_lora,
        settings={"train_A": False},
        correctable=False,
    ),
    "lora_fa": Method(
        "LoRA-FA with PEFT's optimizer, which divides the gradient of B by s^2 A A^T",
        _add_lora,
        settings={"train_A": False},
        correctable=False,
        after_start=step_by_peft_lora_fa,
    ),
    "peft_lora_ga": Method("LoRA-GA as PEFT computes it, on a changed base", start_by_peft_lora_ga),
    "random_orthogonal": Method(
        "LoRA-GA's anchored start with random orthonormal directions of the same lengths: size without direction",
        _add_lora,
        init="lora_ga",
        after_start=turn_at_random,
    ),
    "lora_ga_free": Method(
        "LoRA-GA's start [A0; 0], [0, B0] as an ordinary LoRA of rank 2r: nothing tied, nothing frozen",
        _add_lora,
        init="lora_ga",
        correctable=False,
        after_start=drop_ties,
    ),
    "lora_ga": Method("LoRA-GA, arXiv 2407.05000, anchored", _add_lora, init="lora_ga"),
    "lora_one": Method("LoRA-One, arXiv 2502.01235", _add_lora, init="lora_one"),
    "gradient_directions": Method(
        "plain LoRA whose rows of A point along the gradient, B = 0", _add_lora, init="gradient_directions"
    ),
}
