"""The optimizer that a config asks for, built around the one a Trainer makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import nn
from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

from ..adapters.find import find_adapted_layers, require_peft_model
from ..adapters.storage import anchored_parameter_names
from ..config import LoRAGAConfig, asked_for
from ..engines.support import bare_optimizer, require_gradients, steps_by_itself
from .adamw import LoRAProAdamW
from .wrapper import LoRAProOptimizer


if TYPE_CHECKING:
    from transformers import Trainer

_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def require_correctable(trainer: Trainer, config: LoRAGAConfig) -> None:
    """
    Refuse what can be seen to fail before training starts.

    Raises:
        `ValueError`: naming the setting and what it can't be combined with.
    """
    what = asked_for(config)
    if what is None:
        return
    corrects = config.correction != "none"
    if corrects and trainer.args.device.type == "mps":
        raise ValueError(
            f"{what} computes in fp64, which the device (mps) lacks. Train with `use_cpu=True`, or with "
            "correction='none'."
        )
    if config.loraplus_lr_ratio is None:  # LoRA+ reads no gradient
        require_gradients(trainer, what, in_parameters=config.correction != "lora_pro", gathers=corrects)
    if trainer.model is not None:  # with model_init it is made later
        require_peft_model(trainer.model)
    if config.correction == "lora_pro":
        return
    if trainer.optimizer is not None and not isinstance(bare_optimizer(trainer), LoRAProAdamW):
        raise ValueError(
            f"{what} makes the optimizer itself, and the trainer was given a {type(trainer.optimizer).__name__}. "
            "Leave out `optimizers=`, or use correction='lora_pro', which wraps any optimizer."
        )
    if config.correction == "lora_pro_adamw" and not _makes_adamw(trainer):
        raise ValueError(
            f"{what} is an AdamW of its own, and the arguments ask for optim={trainer.args.optim.value!r} or "
            "another optimizer class. Set optim='adamw_torch', or use correction='lora_pro', which wraps any of them."
        )


def _makes_adamw(trainer: Trainer) -> bool:
    chosen = trainer.optimizer_cls_and_kwargs
    return trainer.args.optim in _ADAMW if chosen is None else chosen[0] is torch.optim.AdamW


def build_optimizer(trainer: Trainer, config: LoRAGAConfig, create: Callable[[], Optimizer]) -> Optimizer:
    """
    Return the optimizer for `trainer`, which has none yet or one that was passed to it.

    Args:
        trainer: its arguments and model are read.
        config: what to build.
        create: the Trainer's own `create_optimizer`: makes an optimizer from `TrainingArguments.optim` and the
            Trainer's param groups, or returns the one that exists.
    """
    bare = bare_optimizer(trainer)
    if isinstance(bare, (LoRAProOptimizer, LoRAProAdamW)):  # a second train()
        return create()
    model = require_peft_model(trainer.accelerator.unwrap_model(trainer.model))
    if config.correction == "lora_pro":
        # An engine that steps by itself has its gradients corrected before: see engine_step.
        return create() if steps_by_itself(trainer) else LoRAProOptimizer(create(), model)
    if trainer.optimizer is not None:  # a second train() with an optimizer of PEFT
        return create()
    if config.correction == "lora_pro_adamw":
        return _lora_pro_adamw(create(), model, config)
    return _peft_optimizer(trainer, model, config)


def _lora_pro_adamw(plain: Optimizer, model: nn.Module, config: LoRAGAConfig) -> LoRAProAdamW:
    """Take over the groups of an AdamW that has not stepped."""
    unsupported = [key for key in ("amsgrad", "maximize") if plain.defaults.get(key)]
    if type(plain) is not torch.optim.AdamW or unsupported:
        raise ValueError(
            f"correction='lora_pro_adamw' replaces a torch.optim.AdamW without options, the trainer made "
            f"{type(plain).__name__} with {unsupported or 'its own step'}. Use correction='lora_pro' around it."
        )
    kept = ("params", "lr", "betas", "eps", "weight_decay")
    return LoRAProAdamW(
        [{key: group[key] for key in kept} for group in plain.param_groups],
        model,
        lr=plain.defaults["lr"],
        state_dtype=_STATE_DTYPES[config.lora_pro_state_dtype],
        offload_state=config.lora_pro_offload_state,
    )


def _peft_optimizer(trainer: Trainer, model: Any, config: LoRAGAConfig) -> Optimizer:
    """Hand over to PEFT's LoRA+ (arXiv 2402.12354) or Riemannian preconditioning (arXiv 2402.02347)."""
    chosen = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    optimizer_class, options = chosen[0], dict(chosen[1])
    lr = options.pop("lr", trainer.args.learning_rate)
    decay = 0.0 if anchored_parameter_names(model) else trainer.args.weight_decay
    if config.loraplus_lr_ratio is not None:
        return create_loraplus_optimizer(
            model,
            optimizer_class,
            lr=lr,
            loraplus_lr_ratio=config.loraplus_lr_ratio,
            loraplus_weight_decay=decay,
            **options,
        )
    bare = [layer.name for layer in find_adapted_layers(model) if not layer.has_inputs]
    if bare:
        raise ValueError(
            f"riemannian_reg={config.riemannian_reg}: {bare[0]} is a parameter of `target_parameters`, whose stored "
            "factors mix the ranks of all experts. Leave it out, or leave riemannian_reg unset."
        )
    anchored = sorted(anchored_parameter_names(model))
    if anchored:
        raise ValueError(
            f"riemannian_reg={config.riemannian_reg}: {anchored[0]} is stored in delta form, whose Gram matrix is not "
            "that of the factor. Use correction='lora_pro', which reads the factors from it."
        )
    options.setdefault("weight_decay", decay)
    return create_riemannian_optimizer(model, optimizer_class, lr=lr, reg=config.riemannian_reg, **options)
