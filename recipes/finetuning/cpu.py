"""CPU defaults: threads and pinned memory."""

import os

import torch
from transformers import TrainingArguments


def adapt_to_cpu(args: TrainingArguments) -> None:
    """
    On a CPU give each process its share of the cores, and pin no memory.

    `accelerate launch` sets one thread unless told more; a number of threads set for plain `python` is left alone.
    """
    if args.device.type != "cpu":
        return
    args.dataloader_pin_memory = False  # there is no device to copy to, and torch warns at every epoch
    if torch.get_num_threads() == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.world_size))
