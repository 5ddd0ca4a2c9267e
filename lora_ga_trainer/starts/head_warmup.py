"""Train fresh heads for a few steps before the probe, so that the gradient is not that of a random head."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ..adapters.find import saved_modules
from ..config import LoRAGAConfig
from ..engines.collectives import mean_over_processes, sum_over_processes
from ..engines.parameters import read_parameter, write_parameters
from ..engines.support import probed_module
from ..gradients.borrow import borrowed
from ..gradients.samples import MicroBatch, count_items, mean_loss, micro_batches


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
    with borrowed(trainer, model), warm_up.in_place():
        warm_up.train(config.head_warmup_steps, per_step)
    write_parameters(trainer, list(zip(warm_up.parameters, warm_up.copies, strict=True)))
    logger.info(
        "Trained %d head parameters for %d steps.", sum(map(torch.numel, warm_up.copies)), config.head_warmup_steps
    )


@contextmanager
def warm_heads(trainer: Trainer, config: LoRAGAConfig) -> Iterator[None]:
    """Warm the heads up, and give them their values back if anything inside raises. Collective."""
    heads = saved_modules(trainer.accelerator.unwrap_model(trainer.model))
    parameters = [parameter for head in heads for parameter in head.parameters() if parameter.requires_grad]
    before = [read_parameter(parameter).clone() for parameter in parameters]
    try:
        warm_up_heads(trainer, config)
        yield
    except BaseException:
        write_parameters(trainer, list(zip(parameters, before, strict=True)))
        raise


class _Heads:
    """
    Whole copies of the heads' parameters, which an AdamW of their own steps and the heads compute with meanwhile.

    They are fp32 at least: bf16 weights would round small steps away.
    The engine has no part in it: no parameter of the model requires grad, and none is written before the end.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, heads: list[nn.Module], lr: float) -> None:
        self.trainer, self.model, self.heads = trainer, model, heads
        self.named = [{n: p for n, p in head.named_parameters() if p.requires_grad} for head in heads]
        # Tied heads (an output layer that is the embedding) hold one parameter under two names: it has one copy.
        self.parameters = list({id(p): p for named in self.named for p in named.values()}.values())
        self.copies = [_copy_for_training(read_parameter(parameter)) for parameter in self.parameters]
        self.sums = [torch.zeros_like(copy) for copy in self.copies]
        self.items = 0.0
        self.optimizer = torch.optim.AdamW(self.copies, lr=lr, weight_decay=0.0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the heads compute with the copies, in the dtypes of their own parameters."""
        copy_of = dict(zip(map(id, self.parameters), self.copies, strict=True))
        with ExitStack() as stack:
            for head, named in zip(self.heads, self.named, strict=True):
                copies = {name: copy_of[id(parameter)] for name, parameter in named.items()}
                stack.enter_context(_computing_with(head, named, copies))
            yield

    def train(self, steps: int, per_step: int) -> None:
        done = 0
        while done < steps:
            before, seen = done, 0
            for micro_batch in micro_batches(self.trainer, per_step * (steps - done)):
                if seen >= per_step * (done - before + 1):
                    self._step()
                    done += 1
                self._accumulate(micro_batch)
                seen += micro_batch.samples
            pending = mean_over_processes(self.trainer, 1.0, self.items) > 0  # nan where no process has an item
            if pending and done < steps:
                self._step()
                done += 1
            if done == before:
                raise ValueError("head_warmup_steps: the train dataloader gave no sample with a label.")

    def _accumulate(self, micro_batch: MicroBatch) -> None:
        """Add the gradient of one micro-batch's summed loss; every process runs one, whether it counts or not."""
        items = count_items(self.trainer, micro_batch)
        weight = items * micro_batch.share
        loss = mean_loss(self.trainer, self.model, micro_batch.batch, items) * weight
        gradients = torch.autograd.grad(loss, self.copies, allow_unused=True)
        if weight == 0:
            return
        self.items += weight
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
        self.items = 0.0
        self.sums = [torch.zeros_like(copy) for copy in self.copies]


def _copy_for_training(value: Tensor) -> Tensor:
    """Copy a parameter, in fp32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32)).clone().requires_grad_()


@contextmanager
def _computing_with(head: nn.Module, named: dict[str, nn.Parameter], copies: dict[str, Tensor]) -> Iterator[None]:
    """Let a head compute with `copies` in place of its parameters; what it held is back after each call."""
    forward, own = head.forward, vars(head).get("forward")

    def with_copies(*args: Any, **kwargs: Any) -> Any:
        tensors = {name: copy.to(named[name].dtype) for name, copy in copies.items()}
        with _reparametrize_module(head, tensors):
            return forward(*args, **kwargs)

    head.forward = with_copies
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
