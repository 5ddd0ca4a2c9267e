"""Differences between devices: the precision that they factorise in, and their random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def to_fp32(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp32. It moves to the CPU where the device lacks factorisations."""
    return tensor.float().cpu() if tensor.device.type == "mps" else tensor.float()


def to_fp64(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp64. It moves to the CPU where the device lacks fp64."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch, and those of every accelerator."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.get_device_module() if torch.accelerator.is_available() else None
    every = "_all" if hasattr(device, "get_rng_state_all") else ""  # torch.mps has one device
    devices = getattr(device, f"get_rng_state{every}")() if device else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if device:
            getattr(device, f"set_rng_state{every}")(devices)
