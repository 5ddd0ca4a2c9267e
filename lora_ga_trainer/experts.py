"""
How PEFT stores the factors of fused experts, one LoRA pair an expert in two matrices. Pure shapes.

    lora_A.weight  (E * r, in)   seen as (E, r, in): the rows of one expert lie together
    lora_B.weight  (out, r * E)  seen as (out, r, E): the columns of one expert lie E apart

A linear layer is the case `E = 1`.
"""

from __future__ import annotations

from torch import Tensor


def split_A(stored: Tensor, experts: int) -> Tensor:  # (E * r, in) -> (E, r, in), a view
    return stored.unflatten(0, (experts, -1))


def join_A(A: Tensor) -> Tensor:  # (E, r, in) -> (E * r, in)
    return A.flatten(0, 1)


def split_B(stored: Tensor, experts: int) -> Tensor:  # (out, r * E) -> (E, out, r), a view
    return stored.unflatten(1, (-1, experts)).permute(2, 0, 1)


def join_B(B: Tensor) -> Tensor:  # (E, out, r) -> (out, r * E)
    return B.permute(1, 2, 0).flatten(1, 2)
