"""fp32 and fp64 for factorisations, wherever the device can have them."""

from __future__ import annotations

from torch import Tensor


def narrow(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp32, on the CPU where the device has no factorisations."""
    return tensor.float().cpu() if tensor.device.type == "mps" else tensor.float()


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in fp64, on the CPU where the device has none."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
