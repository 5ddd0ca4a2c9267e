"""fp32 and fp64 for factorisations, wherever the device can have them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor


if TYPE_CHECKING:
    pass


def to_fp32(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp32, on the CPU where the device has no factorisations."""
    return tensor.float().cpu() if tensor.device.type == "mps" else tensor.float()


def to_fp64(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp64, on the CPU where the device has none."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the Python, NumPy and torch generators, those of every accelerator included."""
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
