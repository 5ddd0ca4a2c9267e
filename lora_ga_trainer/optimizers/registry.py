"""
Registry of the optimizers that a config can ask for in place of the Trainer's own.

A new one is an entry of `OPTIMIZERS`, and a test of its step. Config, trainer, callback and the step of an engine read
the entry; nothing else compares its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..maths.lora_pro import GramEigen
from .adamw import LoRAProAdamW
from .batches import PairBatch, correct_batch
from .builders import (
    BuildRequest,
    make_lora_plus,
    make_lora_pro_adamw,
    make_muon,
    make_riemannian,
    require_adamw,
    require_muon,
    wrap_lora_pro,
)
from .wrapper import LoRAProOptimizer


if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True)
class OptimizerEntry:
    """
    One optimizer.

    Args:
        about: what it is, with its source; `LoRAGAConfig`'s help lists it.
        build: makes it from a [`BuildRequest`]; `None` for the Trainer's own.
        kind: the class that `build` makes. An optimizer of this class that the trainer has already is kept.
        chosen_by: the field of the config that asks for it: `"correction"`, by this entry's name, or a field of its
            own, by any value.
        fields: fields of the config that it alone reads. They are refused with any other entry.
        wraps: whether it goes around any optimizer, also one that was passed to the trainer.
        reads_gradients: whether it works on the gradients of the factors, whole ones.
        gathers_gradients: whether it gathers gradients that FSDP2 spreads over processes.
        correct: all that it does to gradients, as a function of a batch of pairs, so that it can be done before the
            step of an engine that steps by itself (ZeRO); `None` where the optimizer itself has to step.
        needs_fp64: whether it computes in fp64.
        decays_net_update: whether its weight decay acts on `s (B A - B0 A0)` of anchored adapters, which leaves the
            halves tied and `B0` alone. Any other decay must leave anchored parameters out.
        steps_weight: whether its step is one of the weight, so that it wants learning rates of full fine-tuning.
        not_anchored: why it can't step anchored factors, and the way out; `None` where it can.
        check: refuses, before training, a trainer it can't be built for, given the trainer and the setting's name.

    Raises:
        `ValueError`: if `kind` is missing and an existing optimizer has to be known by it.
    """

    about: str
    build: Callable[[BuildRequest], Optimizer] | None
    kind: type[Optimizer] | None = None
    chosen_by: str = "correction"
    fields: tuple[str, ...] = ()
    wraps: bool = False
    reads_gradients: bool = True
    gathers_gradients: bool = False
    correct: Callable[[PairBatch, GramEigen], tuple[Tensor, Tensor]] | None = None
    needs_fp64: bool = False
    decays_net_update: bool = False
    steps_weight: bool = False
    not_anchored: str | None = None
    check: Callable[[Trainer, str], None] | None = None

    def __post_init__(self) -> None:
        # Without it a second train() would wrap again, and the decay of the net update would be refused.
        if self.kind is None and (self.wraps or self.decays_net_update):
            raise ValueError(
                f"OptimizerEntry {self.about!r}: kind is missing. An optimizer that wraps another one, or that decays "
                "the net update, is known by its class."
            )


@dataclass(frozen=True)
class ChosenOptimizer:
    """
    The entry that a config asks for.

    Args:
        entry: of `OPTIMIZERS`.
        setting: the setting that asks for it, for messages: `correction='lora_pro'`.
        options: values of the fields that it alone reads, by name.
    """

    entry: OptimizerEntry
    setting: str
    options: Mapping[str, Any] = field(default_factory=dict)


_IN_DELTA_FORM = (
    "whose factors are stored in delta form: the Gram matrices would be those of [A; A - A0], [B - B0, B0], not of A "
    "and B. Use init='lora_one' with it, or correction='lora_pro' with this one."
)

OPTIMIZERS = {
    "none": OptimizerEntry("the optimizer of the training arguments", build=None, reads_gradients=False),
    "lora_pro": OptimizerEntry(
        "LoRA-Pro around the optimizer of the training arguments, arXiv 2407.18242, Theorem 2.1",
        build=wrap_lora_pro,
        kind=LoRAProOptimizer,
        wraps=True,
        gathers_gradients=True,
        correct=correct_batch,
        needs_fp64=True,
    ),
    "lora_pro_adamw": OptimizerEntry(
        "LoRA-Pro's own AdamW, arXiv 2407.18242, Algorithm 1",
        build=make_lora_pro_adamw,
        kind=LoRAProAdamW,
        fields=("lora_pro_state_dtype", "lora_pro_offload_state"),
        gathers_gradients=True,
        needs_fp64=True,
        decays_net_update=True,
        steps_weight=True,
        check=require_adamw,
    ),
    "muon": OptimizerEntry(
        "torch's Muon on each factor, with steps as long as AdamW's, arXiv 2502.16982",
        build=make_muon,
        kind=getattr(torch.optim, "Muon", None),  # from torch 2.9 on; `check` says so before
        not_anchored="whose factors are stored in delta form, and Muon steps along a whole factor. Use init='none' or "
        "init='lora_one'.",
        check=require_muon,
    ),
    "lora_plus": OptimizerEntry(
        "PEFT's LoRA+, arXiv 2402.12354",
        build=make_lora_plus,
        chosen_by="loraplus_lr_ratio",
        fields=("loraplus_lr_ratio",),
        reads_gradients=False,
    ),
    "riemannian": OptimizerEntry(
        "PEFT's Riemannian preconditioning, arXiv 2402.02347",
        build=make_riemannian,
        chosen_by="riemannian_reg",
        fields=("riemannian_reg",),
        not_anchored=_IN_DELTA_FORM,
    ),
}


def corrections() -> list[str]:
    """List what the field `correction` may be."""
    return [name for name, entry in OPTIMIZERS.items() if entry.chosen_by == "correction"]
