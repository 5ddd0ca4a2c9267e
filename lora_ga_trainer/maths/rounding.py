"""Rounding to bf16 without a bias, for sums that are kept in bf16 between their steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def round_to_bf16(
    value: Tensor,  # any shape, fp32; used up
    step: int | Tensor,  # whole numbers, broadcastable to `value`
) -> Tensor:
    """
    Round to numbers that bf16 holds: up as often as a number is far from its lower neighbour, not to nearest.

    Rounding to nearest loses a change below half a unit every time, or makes it a whole unit every time. This is right
    in the mean over steps. What is not finite stays so; NaN becomes infinite.

    Args:
        value: to round.
        step: the number of this rounding, one for all or one for each part. Equal numbers round alike, on every
            process and after a resume.
    """
    # fp32 is bf16 with 16 more bits: add a number below 2^16 and cut them off. The multiples of 2^16 / golden ratio
    # spread evenly and need no generator.
    dither = step * 40503 % 65536
    # The bits of a NaN may be all ones, as those of a GPU's are. One more, and it would be -0.
    value.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    value.view(torch.int32).add_(dither).bitwise_and_(-65536)
    return value
