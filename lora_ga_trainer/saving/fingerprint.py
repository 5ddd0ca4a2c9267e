"""Short digests that tell whether a base model or a data set is the one seen before."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.find import saved_modules
from ..adapters.host import require_adapter
from ..adapters.layer import AdaptedLayer
from ..engines.devices import preserved_rng
from ..engines.parameters import read_parameter


_WEIGHTS_PER_LAYER = 64
_EXAMPLES = 16
# Keys of a model config, at any depth, that say what its layers compute and no adapted weight shows. Of the others
# most say how a model is run or named, some change by themselves (BERT's forward writes `problem_type`), and a release
# of transformers may add or drop any.
_COMPUTED_WITH = frozenset(
    {
        "activation_function",
        "bnb_4bit_quant_type",
        "factor",
        "feed_forward_proj",
        "hidden_act",
        "hidden_activation",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "model_type",
        "n_head",
        "n_layer",
        "num_attention_heads",
        "num_experts_per_tok",
        "num_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_layers",
        "quant_method",
        "rms_norm_eps",
        "rope_theta",
        "rope_type",
        "sliding_window",
    }
)


def fingerprint_base(model: nn.Module, layers: Sequence[AdaptedLayer]) -> str:
    """
    Digest the base model: what its config says of its layers, and 64 evenly spaced numbers of every tensor that
    adapted weights are stored as.

    The scales of a quantised weight count beside its codes, which stay the same when the weight is multiplied. What is
    read does not grow with the layers: 64 numbers of each tensor, or 4 MiB where touching one maps 64 KiB of a file. A
    weight that is spread over processes is gathered first, one layer at a time.
    """
    digest = hashlib.sha256()
    config = getattr(require_adapter(model).base, "config", None)
    if config is not None:
        digest.update(json.dumps(sorted(set(_computed_with(_entries(config))))).encode())
    for layer in layers:
        digest.update(layer.name.encode())
        for part in layer.stored_weight():
            digest.update(_sample(part))
    return digest.hexdigest()[:32]


def _entries(config: Any) -> Mapping[str, Any]:
    """Return the entries of a model's config: one of transformers, a mapping, a dataclass, or any other object."""
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if isinstance(config, Mapping):
        return config
    if dataclasses.is_dataclass(config):  # which may have slots
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return getattr(config, "__dict__", {})


def _computed_with(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the decisive entries of a config and of the configs inside it; 0 and 0.0 are the same."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _computed_with(value)
        elif key in _COMPUTED_WITH and value is not None:
            yield key, json.dumps(float(value) if isinstance(value, (int, float)) else value, default=_lasting_name)


def _lasting_name(value: Any) -> str:
    """Name a value as any process would: not by `str`, which of a function holds its address."""
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def fingerprint_heads(model: nn.Module) -> str:
    """Digest the trainable copies of `modules_to_save`: the gradient of the other layers depends on them."""
    digest = hashlib.sha256()
    for module in saved_modules(model):
        for parameter in module.parameters():
            digest.update(_sample(parameter))
    return digest.hexdigest()[:32]


def fingerprint_dataset(dataset: Any) -> str:
    """
    Digest a data set: its length and 16 evenly spaced examples, or the first 16 of a stream.

    The order in which training visits the examples does not matter. Random numbers that reading them draws (data
    augmentation) are given back.

    Raises:
        `ValueError`: naming the type, for examples that hold anything but tensors, arrays, images, texts, numbers and
            nested lists and dicts of these.
    """
    digest = hashlib.sha256()
    if hasattr(dataset, "__len__"):
        digest.update(str(len(dataset)).encode())
        steps = min(_EXAMPLES, len(dataset))
        examples: Iterable[Any] = (dataset[i * len(dataset) // steps] for i in range(steps))
    else:
        examples = itertools.islice(dataset, _EXAMPLES)
    with preserved_rng():
        for example in examples:
            _update(digest, example)
    return digest.hexdigest()[:32]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} items".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, Tensor):
        _update(digest, value.detach().cpu().float().numpy() if value.is_floating_point() else value.cpu().numpy())
    elif hasattr(value, "__array_interface__"):  # NumPy arrays and scalars, PIL images
        array = np.asarray(value)
        digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        digest.update(repr(value).encode())
    else:
        raise ValueError(
            f"An example holds a {type(value).__name__}, which has no lasting fingerprint, so a probe_file can't be "
            "tied to this data set. Turn it into a tensor, or leave LoRAGAConfig.probe_file unset."
        )


@torch.no_grad()
def _sample(weight: nn.Parameter | Tensor) -> bytes:
    """Return evenly spaced elements with the shape and dtype."""
    whole = read_parameter(weight)
    index = torch.linspace(0, whole.numel() - 1, min(_WEIGHTS_PER_LAYER, whole.numel()), dtype=torch.float64).long()
    # Not reshape(-1), which copies all of a transposed tensor.
    values = whole[torch.unravel_index(index.to(whole.device), whole.shape)].cpu()
    return f"{tuple(weight.shape)}{weight.dtype}".encode() + values.double().numpy().tobytes()
