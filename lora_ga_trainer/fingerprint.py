"""Short digests that tell whether a base model or a data set is the one seen before."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from .adapted_layer import AdaptedLayer
from .borrow import preserved_rng
from .engines import read_parameter
from .layers import saved_modules


_WEIGHTS_PER_LAYER = 64
_EXAMPLES = 16
# Keys of a model config that say where the model came from or how it is run, not what its layers compute. Some change
# by themselves: BERT's forward writes `problem_type`, saving writes `architectures`, the Trainer aligns token ids, TRL
# turns the router loss of experts on or off.
_VOLATILE = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "distributed_config",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "name_or_path",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "router_aux_loss_coef",
    "transformers_version",
    "use_cache",
)


def fingerprint_base(model: PeftModel, layers: Sequence[AdaptedLayer]) -> str:
    """
    Digest the base model: its config and 64 evenly spaced numbers of every tensor that adapted weights are stored as.

    The scales of a quantised weight count beside its codes, which stay the same when the weight is multiplied. What is
    read does not grow with the layers: 64 numbers of each tensor, or 4 MiB where touching one maps 64 KiB of a file. A
    weight that is spread over processes is gathered first, one layer at a time.
    """
    digest = hashlib.sha256()
    config = getattr(model.get_base_model(), "config", None)
    if config is not None:
        kept = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for layer in layers:
        digest.update(layer.name.encode())
        for part in layer.stored_weight():
            digest.update(_sample(part))
    return digest.hexdigest()[:32]


def fingerprint_heads(model: PeftModel) -> str:
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
