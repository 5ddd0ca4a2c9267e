"""Train fresh heads for a few steps before the probe, so that the gradient is not that of a random head."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from .borrow import borrowed
from .collectives import mean_over_processes, sum_over_processes
from .config import LoRAGAConfig
from .engines import probed_module, read_parameter, write_parameters
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
    args = trainer.args
    per_step = trainer._train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    with borrowed(trainer, model):
        for parameter in parameters:
            parameter.requires_grad_(True)
        warm_up = _Heads(trainer, model, parameters, config.head_warmup_learning_rate)
        warm_up.train(config.head_warmup_steps, per_step)
    logger.info(
        "Trained %d head parameters for %d steps.", sum(map(torch.numel, warm_up.copies)), config.head_warmup_steps
    )


class _Heads:
    """
    Whole fp32 copies of the heads' parameters, stepped by an AdamW of their own and written back after each step.

    The engine has no part in it: gradients come from `autograd.grad`, which runs none of its hooks.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, parameters: list[nn.Parameter], lr: float) -> None:
        self.trainer, self.model, self.parameters = trainer, model, parameters
        self.copies = [read_parameter(parameter).float().clone() for parameter in parameters]
        self.sums = [torch.zeros_like(copy) for copy in self.copies]
        self.items = 0.0
        self.optimizer = torch.optim.AdamW(self.copies, lr=lr, weight_decay=0.0)

    def train(self, steps: int, per_step: int) -> None:
        done = 0
        while done < steps:
            before = done
            for piece in sample_pieces(self.trainer, [per_step * n for n in range(1, steps - done + 1)]):
                if piece.part > done - before:
                    self._step()
                    done += 1
                self._accumulate(piece)
            pending = mean_over_processes(self.trainer, 1.0, self.items) > 0  # nan where no process has an item
            if pending and done < steps:
                self._step()
                done += 1
            if done == before:
                raise ValueError("head_warmup_steps: the train dataloader gave no sample with a label.")

    def _accumulate(self, piece: Piece) -> None:
        """Add the gradient of the summed loss of one piece; every process runs it, whether it has samples or not."""
        items = count_items(self.trainer, piece.batch) if piece.mine > 0 else 0.0
        loss = mean_loss(self.trainer, self.model, piece.batch, items) * items
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        if items == 0:
            return
        self.items += items
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient)

    def _step(self) -> None:
        """Step on the gradient of the mean over the items of all processes."""
        total = torch.tensor([self.items], dtype=torch.float64)
        sum_over_processes(self.trainer, [total, *self.sums])
        if total.item() > 0:
            for copy, gradient in zip(self.copies, self.sums, strict=True):
                copy.grad = gradient.div_(total.item())
            self.optimizer.step()
            write_parameters(self.trainer, list(zip(self.parameters, self.copies, strict=True)))
        self.items = 0.0
        self.sums = [torch.zeros_like(copy) for copy in self.copies]
