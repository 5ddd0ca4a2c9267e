"""Train fresh heads for a few steps before the probe, so that the gradient is not that of a random head."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..adapters.find import saved_modules
from ..config import LoRAGAConfig
from ..engines.collectives import mean_over_processes
from ..engines.parameters import read_parameter, write_parameters
from ..engines.support import probed_module
from ..gradients.borrow import borrowed
from ..gradients.copies import TrainedCopies
from ..gradients.descent import CopyDescent
from ..gradients.samples import micro_batches


if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


def warm_up_heads(trainer: Trainer, config: LoRAGAConfig) -> None:
    """
    Take `config.head_warmup_steps` AdamW steps on the modules of `modules_to_save` alone.

    The batches are those of the train dataloader, `per_device_train_batch_size * gradient_accumulation_steps` samples
    a process and step, in epochs that start over when the data ends; dropout is off and the loss is weighted by items
    as in the probe. Every other parameter, the data order and the random numbers of the training run stay what they
    were.

    Raises:
        `ValueError`: if the adapter has no `modules_to_save`.
    """
    model = probed_module(trainer)
    heads = saved_modules(trainer.accelerator.unwrap_model(trainer.model))
    if not heads:
        raise ValueError(
            f"head_warmup_steps={config.head_warmup_steps}, but the adapter has no `modules_to_save` to train. Name "
            "the fresh head there in the LoraConfig, or set head_warmup_steps=0."
        )
    args = trainer.args
    per_step = trainer._train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    warm_up = _Heads(trainer, model, heads, config.head_warmup_learning_rate)
    with borrowed(trainer, model), warm_up.copies.in_forward():
        warm_up.train(config.head_warmup_steps, per_step)
    write_parameters(trainer, list(zip(warm_up.copies.parameters, warm_up.copies.values, strict=True)))
    logger.info(
        "Trained %d head parameters for %d steps.",
        sum(map(torch.numel, warm_up.copies.values)),
        config.head_warmup_steps,
    )


@contextmanager
def warm_heads(trainer: Trainer, config: LoRAGAConfig) -> Iterator[None]:
    """Warm the heads up, and give them their values back if anything inside raises. Collective."""
    before = _values(trainer)
    try:
        warm_up_heads(trainer, config)
        yield
    except BaseException:
        write_parameters(trainer, before)
        raise


@contextmanager
def lent_warm_heads(trainer: Trainer, config: LoRAGAConfig) -> Iterator[None]:
    """Warm the heads up while the context is open, if `config` asks for it; afterwards they are cold. Collective."""
    before = _values(trainer)
    try:
        if config.head_warmup_steps > 0:
            warm_up_heads(trainer, config)
        yield
    finally:
        if config.head_warmup_steps > 0:
            write_parameters(trainer, before)


def _values(trainer: Trainer) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Return the trained parameters of the heads with copies of their values. Collective."""
    heads = saved_modules(trainer.accelerator.unwrap_model(trainer.model))
    parameters = [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]
    return [(parameter, read_parameter(parameter).clone()) for parameter in parameters]


class _Heads:
    """
    Copies of the heads' parameters, which an AdamW of their own steps and the heads compute with meanwhile.

    No parameter of the model is written before the end.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, heads: list[nn.Module], lr: float) -> None:
        self.trainer = trainer
        trained = [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]
        self.copies = TrainedCopies(model, trained)
        self.descent = CopyDescent(trainer, model, self.copies)
        self.optimizer = torch.optim.AdamW(self.copies.values, lr=lr, weight_decay=0.0)

    def train(self, steps: int, per_step: int) -> None:
        done = 0
        while done < steps:
            before, seen = done, 0
            for micro_batch in micro_batches(self.trainer, per_step * (steps - done)):
                if seen >= per_step * (done - before + 1):
                    self._step()
                    done += 1
                self.descent.accumulate(micro_batch)
                seen += micro_batch.samples
            pending = mean_over_processes(self.trainer, 1.0, self.descent.items) > 0  # nan where none has an item
            if pending and done < steps:
                self._step()
                done += 1
            if done == before:
                raise ValueError("head_warmup_steps: the train dataloader gave no sample with a label.")

    def _step(self) -> None:
        self.descent.step(self.optimizer.step)
