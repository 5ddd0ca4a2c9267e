"""Write a rank-limited copy of an adapter for servers with a small maximum rank."""

from __future__ import annotations

import copy
import os

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..adapters.find import find_lora_layers
from ..adapters.host import require_adapter
from ..adapters.layer import AdaptedLayer
from ..adapters.parameter import AdaptedExperts
from ..maths.products import truncate_product
from .adapter_folder import write_adapter
from .record import plain_config


@torch.no_grad()
def export_adapter(model: nn.Module, folder: str | os.PathLike[str], rank: int) -> dict[str, float]:
    """
    Write the active adapter truncated to `rank` as a plain PEFT adapter.

    Each layer's change of the weight `s B A` is replaced by its best approximation of that rank (Eckart-Young), with
    `s` folded into the factors, so the saved `lora_alpha` equals `r`. Trained `modules_to_save`, biases and DoRA
    magnitudes are written as they are. The model itself is not changed.

    Args:
        model: the trained model, whichever way its adapter was added.
        folder: made if it does not exist; `adapter_model.safetensors` and `adapter_config.json` are written.
        rank: of the exported factors; at least 1.

    Returns:
        The relative error `||s B A - truncated|| / ||s B A||` (Frobenius) of every layer by name, and of all layers
        together under `"total"`.

    Raises:
        `ValueError`: if `rank < 1`, if the model has no LoRA adapter, or if the adapter is on fused experts.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"export_adapter: rank={rank!r} must be a whole number of at least 1.")
    host = require_adapter(model)
    layers = find_lora_layers(model)
    for layer in layers:
        if isinstance(layer, AdaptedExperts):
            raise ValueError(
                f"export_adapter: {layer.name} is a parameter of `target_parameters` ({layer.experts} experts); only "
                "the factors of linear layers can be truncated. Serve the adapter at its stored rank "
                f"({layer.stored_rank}), or merge it with `merge_and_unload()`."
            )
    tensors = host.state_dict()
    errors, lost, whole = {}, 0.0, 0.0
    for layer in layers:
        B, A, lost_here, whole_here = _truncate(layer, rank)
        key = f"base_model.model.{layer.key}"
        name_A, name_B = layer.factor_names
        tensors[f"{key}.{name_A}"], tensors[f"{key}.{name_B}"] = A, B
        if f"{key}.lora_B.bias" in tensors:
            tensors[f"{key}.lora_B.bias"] = layer.scaling * tensors[f"{key}.lora_B.bias"]
        errors[layer.name] = (lost_here / whole_here) ** 0.5 if whole_here > 0 else 0.0
        lost, whole = lost + lost_here, whole + whole_here
    errors["total"] = (lost / whole) ** 0.5 if whole > 0 else 0.0
    write_adapter(folder, whole_scale(host.config, rank), tensors)
    return errors


def _truncate(layer: AdaptedLayer, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return `B (out, rank)`, `A (rank, in)` as stored, and the energy lost and whole of PEFT's `scaling * B A`."""
    B, A, S = truncate_product(
        layer.scaling * layer.stored_B.double().flatten(1), layer.stored_A.double().flatten(1), rank
    )
    energy = S.square()
    dtype = layer.stored_A.dtype
    A, B = layer.as_stored(A.to(dtype), B.to(dtype))
    return B, A, energy[rank:].sum().item(), energy.sum().item()


def whole_scale(config: LoraConfig, rank: int) -> LoraConfig:
    """Return a plain copy of a config whose layers all have one rank, and `s = 1`."""
    config = plain_config(copy.copy(config))
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    config.inference_mode = True
    return config
