"""Builders of the optimizers in the registry, each around what the Trainer makes from its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import nn
from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

from ..adapters.find import find_adapted_layers
from ..adapters.layer import AdaptedLayer
from ..adapters.parameter import AdaptedExperts, AdaptedParameter
from ..adapters.storage import anchored_parameter_names
from .adamw import STATE_DTYPES, LoRAProAdamW
from .wrapper import LoRAProOptimizer


if TYPE_CHECKING:
    from transformers import Trainer

_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


@dataclass(frozen=True)
class BuildRequest:
    """
    What a builder is given.

    Args:
        trainer: its arguments are read.
        model: whose factors the optimizer is to step.
        create: the Trainer's own `create_optimizer`: makes an optimizer from `TrainingArguments.optim` and the
            Trainer's param groups, or returns the one that exists.
        setting: that asks for the optimizer, for messages.
        options: of the config, by field.
    """

    trainer: Trainer
    model: nn.Module
    create: Callable[[], Optimizer]
    setting: str
    options: Mapping[str, Any]


def wrap_lora_pro(request: BuildRequest) -> Optimizer:
    """Put LoRA-Pro around the Trainer's optimizer."""
    return LoRAProOptimizer(request.create(), request.model)


def make_lora_pro_adamw(request: BuildRequest) -> Optimizer:
    """Take over the groups of an AdamW that has not stepped."""
    plain = request.create()
    unsupported = [key for key in ("amsgrad", "maximize") if plain.defaults.get(key)]
    if type(plain) is not torch.optim.AdamW or unsupported:
        raise ValueError(
            f"{request.setting} replaces a torch.optim.AdamW without options, the trainer made "
            f"{type(plain).__name__} with {unsupported or 'its own step'}. Use correction='lora_pro' around it."
        )
    kept = ("params", "lr", "betas", "eps", "weight_decay")
    return LoRAProAdamW(
        [{key: group[key] for key in kept} for group in plain.param_groups],
        request.model,
        lr=plain.defaults["lr"],
        state_dtype=STATE_DTYPES[request.options["lora_pro_state_dtype"]],
        offload_state=request.options["lora_pro_offload_state"],
    )


def require_adamw(trainer: Trainer, setting: str) -> None:
    """
    Refuse training arguments that ask for another optimizer than AdamW.

    Raises:
        `ValueError`: naming the setting and the optimizer.
    """
    chosen = trainer.optimizer_cls_and_kwargs
    if trainer.args.optim in _ADAMW if chosen is None else chosen[0] is torch.optim.AdamW:
        return
    raise ValueError(
        f"{setting} is an optimizer of its own, and the arguments ask for optim={trainer.args.optim.value!r} or "
        "another optimizer class. Set optim='adamw_torch', or use correction='lora_pro', which wraps any of them."
    )


def make_lora_plus(request: BuildRequest) -> Optimizer:
    """Hand over to PEFT's LoRA+ (arXiv 2402.12354)."""
    optimizer_class, options, lr, decay = _plain_choice(request)
    return create_loraplus_optimizer(
        request.model,
        optimizer_class,
        lr=lr,
        loraplus_lr_ratio=request.options["loraplus_lr_ratio"],
        loraplus_weight_decay=decay,
        **options,
    )


def make_riemannian(request: BuildRequest) -> Optimizer:
    """Hand over to PEFT's Riemannian preconditioning (arXiv 2402.02347)."""
    optimizer_class, options, lr, decay = _plain_choice(request)
    _require_plain_factors(request, "whose factors PEFT's optimizer leaves without preconditioning")
    options.setdefault("weight_decay", decay)
    reg = request.options["riemannian_reg"]
    return create_riemannian_optimizer(request.model, optimizer_class, lr=lr, reg=reg, **options)


def require_muon(trainer: Trainer, setting: str) -> None:
    """
    Refuse a torch without Muon, and training arguments that ask for another optimizer than AdamW.

    Raises:
        `ValueError`: naming the setting and what is missing or asked for.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"{setting} is torch.optim.Muon, which torch {torch.__version__} lacks. Use torch 2.9 or later."
        )
    require_adamw(trainer, setting)


def make_muon(request: BuildRequest) -> Optimizer:
    """
    Let torch's Muon take over the groups of an AdamW that has not stepped, for factors alone.

    Its steps are as long as those that AdamW mostly takes at the same rate: their entries have a root mean square of
    .2 (arXiv 2502.16982, section 2.2). Rates and weight decay are those of the groups. Adam's betas and `optim_args`
    are not read.
    """
    _require_plain_factors(request, "whose factors Muon is not meant for")
    layers = find_adapted_layers(request.model)
    factors = {id(factor) for layer in layers for factor in (layer.stored_A, layer.stored_B)}
    trained = {name: parameter for name, parameter in request.model.named_parameters() if parameter.requires_grad}
    others = [name for name, parameter in trained.items() if id(parameter) not in factors]
    if others:
        raise ValueError(
            f"{request.setting}: {others[0]} is trained and is no LoRA factor of the active adapter, and Muon is for "
            f"these alone. Freeze it (`modules_to_save`, `bias`, `use_dora`), or train without {request.setting}."
        )
    plain = request.create()
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in plain.param_groups]
    return torch.optim.Muon(groups, lr=plain.defaults["lr"], adjust_lr_fn="match_rms_adamw")


def _require_plain_factors(request: BuildRequest, why: str) -> None:
    """Refuse factors that an optimizer can't take as the matrices `A (r, in)` and `B (out, r)` of one weight."""
    layers = find_adapted_layers(request.model)
    bare = [layer.name for layer in layers if isinstance(layer, AdaptedExperts)]
    if bare:
        raise ValueError(
            f"{request.setting}: {bare[0]} is a parameter of `target_parameters`, whose stored factors mix the ranks "
            f"of all experts. Leave it out, or train without {request.setting}."
        )
    others = [
        layer.name for layer in layers if type(layer) is not AdaptedLayer and not isinstance(layer, AdaptedParameter)
    ]
    if others:
        raise ValueError(
            f"{request.setting}: {others[0]} is a convolution or an embedding, {why}. Leave it out of "
            f"`target_modules`, or train without {request.setting}."
        )
    anchored = sorted(anchored_parameter_names(request.model))
    if anchored:
        raise ValueError(
            f"{request.setting}: {anchored[0]} is stored in delta form, and a step of it is none of the factor. "
            "Use correction='lora_pro', which reads the factors from it."
        )


def _plain_choice(request: BuildRequest) -> tuple[type[Optimizer], dict[str, Any], float, float]:
    """Return class, options, rate and weight decay of the optimizer that the Trainer would make."""
    trainer, model = request.trainer, request.model
    chosen = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    optimizer_class, options = chosen[0], dict(chosen[1])
    lr = options.pop("lr", trainer.args.learning_rate)
    return optimizer_class, options, lr, 0.0 if anchored_parameter_names(model) else trainer.args.weight_decay
