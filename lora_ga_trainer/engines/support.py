"""Engines that are supported, where their gradients are, and who takes the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from torch import Tensor, nn

from .parameters import is_partitioned, partitions


if TYPE_CHECKING:
    from transformers import Trainer

_REPLICATED = (
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_HPU,
)
_SUPPORTED = (*_REPLICATED, DistributedType.FSDP, DistributedType.DEEPSPEED)


def require_supported(trainer: Trainer) -> None:
    """
    Refuse an engine that splits a layer, so that the probe would see only a part of its input or output-gradient.

    Raises:
        `ValueError`: naming the engine.
    """
    engine = trainer.accelerator.distributed_type
    if engine not in _SUPPORTED:
        raise ValueError(
            f"The engine is {engine.value}; a gradient-aligned start is supported on one process, DDP, FSDP and "
            "DeepSpeed ZeRO. Use one of these, or `LoRAGAConfig(init='none')`."
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1 and not plugin.use_orig_params:
        raise ValueError(
            "FSDP1 with use_orig_params=False flattens an adapter's factors into one parameter, so that no layer has "
            "its own. Set fsdp_use_orig_params: true in the launch file, or use FSDP2."
        )
    size = getattr(trainer.model, "tp_size", None) or 1
    if size > 1:
        raise ValueError(
            f"The model is split by tensor parallelism (tp_size={size}), where a layer sees only a part of its input "
            "or output. Shard it with FSDP or ZeRO instead, or use `LoRAGAConfig(init='none')`."
        )


def holds_whole_gradients(trainer: Trainer) -> bool:
    """Tell whether every process holds the whole gradient of every adapter parameter, as under DDP."""
    return trainer.accelerator.distributed_type in _REPLICATED


def require_resumable_engine(trainer: Trainer) -> None:
    """
    Refuse to resume under an engine whose checkpoints lack the optimizer's state.

    Raises:
        `ValueError`: with the reason and the way out.
    """
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "resume_from_checkpoint: the model is sharded at load time (DistributedConfig), for which transformers "
            "writes no optimizer state, so a resume would start AdamW anew. Load the saved adapter with "
            "`lora_ga_trainer.load_adapter` and train on, or use DDP or DeepSpeed ZeRO to resume."
        )


def require_gradients(trainer: Trainer, what: str, in_parameters: bool, gathers: bool) -> None:
    """
    Refuse an engine that hides gradients from the optimizer.

    Args:
        trainer: its engine is looked at.
        what: the setting that asks for the optimizer, for the message.
        in_parameters: whether the optimizer reads gradients from the model's parameters. An engine that steps by
            itself leaves none there.
        gathers: whether the optimizer gathers gradients that are spread over processes.

    Raises:
        `ValueError`: naming the setting and the engine.
    """
    engine = trainer.accelerator.distributed_type
    if in_parameters and steps_by_itself(trainer):
        raise ValueError(
            f"{what} reads gradients of parameters, and {engine.value} shows an optimizer flat partitions only. Use "
            "correction='lora_pro', which corrects them before the engine's step, or DDP or FSDP2."
        )
    flat = engine == DistributedType.FSDP and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2
    if flat or (not gathers and not holds_whole_gradients(trainer)):
        raise ValueError(
            f"{what} needs whole gradients, and this engine ({engine.value}) spreads each over the processes. Use one "
            "process, DDP or ZeRO (FSDP2 for LoRA-Pro), or correction='none'."
        )


def probed_module(trainer: Trainer) -> nn.Module:
    """
    Return the module whose forward the probe calls.

    Under DDP and DeepSpeed it is the bare model. The sketches are summed once at the end, so the engine has nothing to
    reduce, and DeepSpeed would even divide or step. Under FSDP it is the wrapped model, which gathers the weights.
    """
    return trainer.model


def optimizer_groups(trainer: Trainer) -> list[tuple[list[nn.Parameter], dict[str, Any]]]:
    """Return, for every group of the trainer's optimizer, the model's parameters in it and its options."""
    optimizer = trainer.optimizer
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        return [(group["params"], group) for group in optimizer.param_groups]
    zero = optimizer.optimizer  # its groups hold flat fp32 partitions, not the model's parameters
    if hasattr(zero, "trainable_param_groups"):  # ZeRO-3
        return [(group["params"], group) for group in zero.trainable_param_groups]
    return list(zip(zero.bit16_groups, zero.param_groups, strict=True))


def steps_by_itself(trainer: Trainer) -> bool:
    """Tell whether the engine clips and steps inside its backward pass, on flat partitions of its own (ZeRO does)."""
    return trainer.accelerator.distributed_type == DistributedType.DEEPSPEED


def read_gradient(parameter: nn.Parameter) -> Tensor | None:
    """
    Return the whole accumulated gradient of a parameter, under an engine that steps by itself. Collective.

    It is multiplied by the loss scale; see [`loss_scale`].
    """
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def write_gradient(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace the accumulated gradient of a parameter, under an engine that steps by itself. Collective."""
    from deepspeed.utils import safe_set_full_grad

    safe_set_full_grad(parameter, partitions(value, parameter) if is_partitioned(parameter) else value)


def loss_scale(trainer: Trainer) -> float:
    """Return the factor in the gradients of an engine that steps by itself. It is 1 without fp16."""
    return float(trainer.optimizer.optimizer.loss_scale)


def run_before_steps(trainer: Trainer, hook: Callable[[], None]) -> float:
    """
    Call `hook` before each step of an engine that steps by itself, and stop the engine from clipping.

    The hook finds the accumulated gradients in place.

    Returns:
        The norm that the engine would have clipped to, or 0 if it would not have clipped.
    """
    engine, zero = trainer.model_wrapped, trainer.optimizer.optimizer
    step = engine.step

    @functools.wraps(step)
    def hooked_step(*args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            hook()
        return step(*args, **kwargs)

    engine.step = hooked_step
    # A resumed engine has a clip_grad of 0 already, so the norm is read from the engine's config.
    zero.clip_grad = 0.0
    return float(engine.gradient_clipping())


def bare_optimizer(trainer: Trainer) -> Any:
    """Return the trainer's optimizer without Accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)
