"""Short digests that tell whether a base model or a data set is the one seen before."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .layers import AdaptedLayer, saved_modules


_WEIGHTS_PER_LAYER = 64
_EXAMPLES = 16
# Keys of a model config that say where the model came from or how it is run, not what it computes.
_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "use_cache", "gradient_checkpointing", "dtype")


def fingerprint_base(model: PeftModel, layers: Sequence[AdaptedLayer]) -> str:
    """
    Digest the base model: its config and 64 evenly spaced weights of every adapted layer, as they are stored.

    Costs a few kilobytes of reads whatever the size of the model.
    """
    digest = hashlib.sha256()
    config = getattr(model.get_base_model(), "config", None)
    if config is not None:
        kept = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for layer in layers:
        digest.update(layer.name.encode())
        digest.update(_sample(layer.base.weight))
    return digest.hexdigest()[:32]


def fingerprint_heads(model: PeftModel) -> str:
    """Digest the trainable copies of `modules_to_save`: the gradient of the other layers depends on them."""
    digest = hashlib.sha256()
    for module in saved_modules(model):
        for parameter in module.parameters():
            digest.update(_sample(parameter))
    return digest.hexdigest()[:32]


def fingerprint_dataset(dataset: Any) -> str:
    """Digest a data set: its length and 16 evenly spaced examples (the first 16 of a stream), whatever their order."""
    digest = hashlib.sha256()
    if hasattr(dataset, "__len__"):
        digest.update(str(len(dataset)).encode())
        steps = min(_EXAMPLES, len(dataset))
        examples: Iterable[Any] = (dataset[i * len(dataset) // steps] for i in range(steps))
    else:
        examples = itertools.islice(dataset, _EXAMPLES)
    for example in examples:
        _update(digest, example)
    return digest.hexdigest()[:32]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, dict) or hasattr(value, "keys"):
        for key in sorted(value.keys()):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, Tensor):
        digest.update(str(value.tolist()).encode())
    else:
        digest.update(repr(value).encode())


@torch.no_grad()
def _sample(weight: nn.Parameter | Tensor) -> bytes:
    """Return evenly spaced raw elements of the storage, quantised or not, with the shape and dtype."""
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(_WEIGHTS_PER_LAYER, flat.numel()), dtype=torch.float64).long()
    values = flat[index.to(flat.device)].cpu()
    return f"{tuple(weight.shape)}{weight.dtype}".encode() + values.double().numpy().tobytes()
