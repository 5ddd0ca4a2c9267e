"""Anchored factors need an optimizer that steps their two halves as it would step plain factors."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engines.devices import preserved_rng


logger = logging.getLogger(__name__)

# More entries than an 8-bit optimizer of bitsandbytes keeps in fp32 (4096), and no multiple of its blocks (256), so
# that a block holds entries of both halves.
_R, _OUT, _IN = 5, 829, 827
_STEPS = 3
_RATE = 1e-2
# Largest difference of a step, relative to the largest step. Rounding brings about 1e-5 (AdamW in fp32, three steps).
_TOLERANCE = 1e-3


def require_lockstep(optimizer: Optimizer, group: dict[str, Any], device: torch.device) -> None:
    """
    Try an optimizer on small factors in delta form, beside plain ones, and refuse it where the two walk apart.

    An anchored adapter stores `[A; A - A0]` with the gradient of `A` in both halves and `[B - B0, B0]` with a zero
    gradient in the second. An elementwise optimizer (SGD, AdamW, Adagrad, RMSprop) steps each entry alone, so the
    net change is that of plain `A` and `B`. One that looks at a matrix as a whole (Adafactor, Muon) takes another
    step, and one that quantises its state by blocks (8-bit) lets the halves drift apart.

    Args:
        optimizer: of the trainer, before its first step. It is not changed: its class and settings are tried on
            parameters of their own.
        group: the options it has for anchored factors.
        device: where these are.

    Raises:
        `ValueError`: naming the optimizer, by how much the steps differ, and the way out.
    """
    # With its library: bitsandbytes calls its 8-bit AdamW by the name of torch's.
    name = f"{type(optimizer).__name__} of {type(optimizer).__module__.partition('.')[0]}"
    try:
        with preserved_rng():
            found = _largest_difference(optimizer, group, device)
    except Exception as error:  # whatever an optimizer raises that wants more than gradients
        logger.warning(
            "%s could not be tried on small factors (%r). Anchored factors rely on an optimizer that steps each entry "
            "alone. If this one does not, use LoRAGAConfig(init='lora_one').",
            name,
            error,
        )
        return
    if not found <= _TOLERANCE:
        raise ValueError(
            f"{name} does not step anchored factors as it would step plain ones: on small factors the steps differ "
            f"by {found:.1%}. It looks at more than one entry at a time, or keeps its state in 8 bits. Use an "
            "elementwise optimizer such as optim='adamw_torch', or init='lora_one', whose factors are plain."
        )


def _largest_difference(optimizer: Optimizer, group: dict[str, Any], device: torch.device) -> float:
    """Return the largest difference between the net steps of anchored and plain factors, relative to the largest."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    A0, B0 = draw(_R, _IN), draw(_OUT, _R)
    anchored = [_parameter(torch.cat([A0, 0 * A0]), device), _parameter(torch.cat([0 * B0, B0], dim=1), device)]
    plain = [_parameter(A0, device), _parameter(B0, device)]
    of_anchored, of_plain = _twin(optimizer, group, anchored), _twin(optimizer, group, plain)
    for _ in range(_STEPS):
        # Heavy tails, as gradients have: Adafactor clips by the root mean square of a whole matrix.
        gA, gB = (g.pow(3).to(device) for g in (draw(_R, _IN), draw(_OUT, _R)))
        anchored[0].grad, anchored[1].grad = torch.cat([gA, gA]), torch.cat([gB, 0 * gB], dim=1)
        plain[0].grad, plain[1].grad = gA, gB
        of_anchored.step()
        of_plain.step()
    A, B = (parameter.detach().cpu() for parameter in anchored)
    step_A, step_B = plain[0].detach().cpu() - A0, plain[1].detach().cpu() - B0
    differences = [
        (A[:_R] - A0 - step_A, step_A),  # the half that is A
        (A[_R:] - step_A, step_A),  # the half that is A - A0
        (B[:, :_R] - step_B, step_B),  # the half that is B - B0
        (B[:, _R:] - B0, step_B),  # B0, which is frozen
    ]
    return max((_largest(difference) / _largest(step)) if step.any() else 0.0 for difference, step in differences)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _parameter(value: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(value.clone().to(device))


def _twin(optimizer: Optimizer, group: dict[str, Any], parameters: list[nn.Parameter]) -> Optimizer:
    """Return an optimizer of the same class and settings, with a state of its own, for other parameters."""
    # Not copy.copy: an optimizer pickles its groups and state alone, and loses what its class keeps beside them.
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    # A schedule has put a counting `step` of the first optimizer in front of the class's.
    twin.__dict__.pop("step", None)
    twin.state = defaultdict(dict)
    # A schedule with a warm-up begins at a rate of 0.
    lr = torch.full_like(group["lr"], _RATE) if isinstance(group.get("lr"), Tensor) else _RATE
    twin.param_groups = [{**copy.deepcopy({k: v for k, v in group.items() if k != "params"}), "lr": lr}]
    twin.param_groups[0]["params"] = parameters
    return twin
