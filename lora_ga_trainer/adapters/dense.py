"""The dense weight of a frozen layer, however it is stored."""

from __future__ import annotations

from typing import cast

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from ..engines.parameters import read_parameter


def read_dense(name: str, base: nn.Module, shape: tuple[int, int]) -> Tensor:  # (out, in)
    """
    Return the weight of a layer dequantised, whole and in the orientation of `G`; a copy or a view.

    It is never to be written to. Collective where the weight is sharded.

    Args:
        name: of the layer, for messages.
        base: the layer itself, without an adapter around it.
        shape: `(out, in)` that the weight must have; the axes of a kernel are part of `in`.

    Raises:
        `ValueError`: if an engine or a quantiser keeps the weight in a form that can't be read.
    """
    require_unpacked(name, cast(Tensor, base.weight))
    held = dict(base.named_parameters(recurse=False)).get("weight")
    weight = read_parameter(dequantize_module_weight(base))
    if held is not None and base.weight is not held:
        base.weight = held  # PEFT leaves a copy in its place, which has lost the scales of int8 codes
    if is_traceable_wrapper_subclass(weight):
        weight = weight.dequantize()
    weight = weight.T if isinstance(base, (Conv1D, nn.Embedding)) else weight.flatten(1)
    if weight.shape != shape:
        raise ValueError(
            f"Layer {name}: this engine shows its weight as {tuple(weight.shape)} instead of {shape}, and DoRA, "
            "scale='weight_svd' and an analysis have to read it. Use another engine, or none of them."
        )
    return weight


def require_unpacked(name: str, weight: Tensor) -> None:
    """
    Refuse packed 4-bit codes.

    Raises:
        `ValueError`: naming the layer.
    """
    # Of release 0.50.2 what is read of packed codes is another weight, and no gradient passes them.
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"Layer {name}: bitsandbytes has packed its 4-bit codes for this CPU when the model was evaluated. Packed "
            "codes can't be trained through or read. Load the base again, and before it is evaluated set "
            "`module.support_avx512bf16_for_cpu = False` on each of its Linear4bit modules."
        )
