"""Write a rank-limited copy of an adapter for servers with a small maximum rank."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.find import find_lora_layers
from ..adapters.host import WEIGHTS_FILE, require_adapter
from ..adapters.layer import AdaptedLayer
from ..adapters.parameter import AdaptedExperts
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
    Path(folder).mkdir(parents=True, exist_ok=True)
    _exported_config(host.config, rank).save_pretrained(os.fspath(folder))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
    return errors


def _truncate(layer: AdaptedLayer, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return `B (out, rank)`, `A (rank, in)` as stored, and the energy lost and whole of PEFT's `scaling * B A`."""
    Q_b, R_b = torch.linalg.qr(layer.stored_B.double().flatten(1))  # (out, k), (k, k)
    Q_a, R_a = torch.linalg.qr(layer.stored_A.double().flatten(1).T)  # (in, k), (k, k)
    U, S, Vt = torch.linalg.svd(layer.scaling * R_b @ R_a.T, full_matrices=False)
    root = S[:rank].sqrt()
    B, A = (Q_b @ U[:, :rank]) * root, root[:, None] * (Q_a @ Vt[:rank].T).T
    short = rank - root.shape[0]
    B, A = torch.nn.functional.pad(B, (0, short)), torch.nn.functional.pad(A, (0, 0, 0, short))
    energy = S.square()
    dtype = layer.stored_A.dtype
    A, B = layer.as_stored(A.to(dtype), B.to(dtype))
    return B, A, energy[rank:].sum().item(), energy.sum().item()


def _exported_config(config: LoraConfig, rank: int) -> LoraConfig:
    config = plain_config(copy.copy(config))
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    config.inference_mode = True
    return config
