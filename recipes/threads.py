"""How many threads a process computes with."""

import os

import torch
from transformers import TrainingArguments


def use_all_cores(args: TrainingArguments) -> None:
    """Give each process its share of the CPU where `accelerate launch` set one thread, as it does unless told more."""
    if args.device.type == "cpu" and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.world_size))
