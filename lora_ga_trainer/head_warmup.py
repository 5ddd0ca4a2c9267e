"""Train fresh heads for a few steps before the probe, so that the gradient is not that of a random head."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from .borrow import borrowed
from .collectives import sum_over_processes
from .config import LoRAGAConfig
from .engines import probed_module
from .layers import require_peft_model, saved_modules
from .samples import Piece, count_items, mean_loss, sample_pieces


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
    heads = saved_modules(require_peft_model(trainer.accelerator.unwrap_model(trainer.model)))
    if not heads:
        raise ValueError(
            f"head_warmup_steps={config.head_warmup_steps}, but the adapter has no `modules_to_save` to train. Name "
            "the fresh head there in the LoraConfig, or set head_warmup_steps=0."
        )
    parameters = [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.head_warmup_learning_rate, weight_decay=0.0)
    args = trainer.args
    per_step = trainer._train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    with borrowed(trainer, model):
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)  # every rank sums the same list, samples or not
        try:
            _train(trainer, model, optimizer, parameters, config.head_warmup_steps, per_step)
        finally:
            for parameter in parameters:
                parameter.grad = None
    logger.info(
        "Trained %d head parameters for %d steps.", sum(map(torch.numel, parameters)), config.head_warmup_steps
    )


def _train(
    trainer: Trainer,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    steps: int,
    per_step: int,
) -> None:
    done = 0
    while done < steps:
        before, items = done, 0.0
        for piece in sample_pieces(trainer, [per_step * n for n in range(1, steps - done + 1)]):
            if piece.part > done - before:
                _step(trainer, optimizer, parameters, items)
                done, items = done + 1, 0.0
            items += _accumulate(trainer, model, piece)
        if items > 0 and done < steps:
            _step(trainer, optimizer, parameters, items)
            done += 1
        if done == before:
            raise ValueError("head_warmup_steps: the train dataloader gave no sample with a label.")


def _accumulate(trainer: Trainer, model: nn.Module, piece: Piece) -> float:
    """Add the gradient of the summed loss of one piece; return its number of items on this process."""
    items = count_items(trainer, piece.batch)
    if piece.mine == 0 or items == 0:
        return 0.0
    (mean_loss(trainer, model, piece.batch, items) * items).backward()
    return items


def _step(trainer: Trainer, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], items: float) -> None:
    """Step on the gradient of the mean over the items of all processes."""
    total = torch.tensor([items], dtype=torch.float64)
    gradients = [parameter.grad for parameter in parameters]
    sum_over_processes(trainer, [total, *gradients])
    if total.item() > 0:
        for gradient in gradients:
            gradient.div_(total.item())
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
