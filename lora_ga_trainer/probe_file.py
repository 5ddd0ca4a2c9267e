"""Save a gradient estimate and give it back, so that seeds, ranks and sweeps share one probe."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import LoRAGAConfig
from .fingerprint import fingerprint_base, fingerprint_dataset, fingerprint_heads
from .layers import AdaptedLayer
from .probe import GradientEstimate
from .sketch import restore_estimator


_FORMAT = "1"
_FIGURES = ("samples", "items", "tokens", "loss", "seconds", "bytes_sent")


def save_estimate(
    estimate: GradientEstimate,
    config: LoRAGAConfig,
    model: PeftModel,
    layers: Sequence[AdaptedLayer],
    dataset: Any,
) -> None:
    """Write `estimate` to `config.probe_file` as safetensors, whole or not at all, with its fingerprints."""
    tensors = {
        f"{name}|{key}": tensor.contiguous().cpu()
        for name, estimator in estimate.estimators.items()
        for key, tensor in estimator.state().items()
    }
    metadata = {
        **_fingerprints(config, model, layers, dataset),
        "figures": json.dumps({name: getattr(estimate, name) for name in _FIGURES}),
        "unreached": json.dumps(estimate.unreached),
    }
    target = _path(config)
    partial = target.with_name(target.name + ".partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, target)


def load_estimate(
    config: LoRAGAConfig, model: PeftModel, layers: Sequence[AdaptedLayer], dataset: Any
) -> GradientEstimate | None:
    """
    Read `config.probe_file`; `None` if there is no such file.

    Raises:
        `ValueError`: if the file is damaged, or comes from another base, head, data set or other settings; the message
            names which. Also if the folder it would be written to does not exist.
    """
    path = _path(config)
    if not path.exists():
        if not path.parent.is_dir():
            raise ValueError(
                f"probe_file={config.probe_file!r}: the folder {path.parent} does not exist. Make it first."
            )
        return None
    expected = _fingerprints(config, model, layers, dataset)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key, value in expected.items():
                if metadata.get(key) != value:
                    raise ValueError(
                        f"probe_file={config.probe_file!r} was made for another {key} ({metadata.get(key)!r}, this "
                        f"run has {value!r}). Delete it to probe anew, or name another file."
                    )
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no dict
        figures, unreached = json.loads(metadata["figures"]), json.loads(metadata["unreached"])
        estimators = {
            layer.name: restore_estimator(
                {key.split("|", 1)[1]: value for key, value in stored.items() if key.split("|", 1)[0] == layer.name},
                layer.shape,
            )
            for layer in layers
        }
        return GradientEstimate(estimators=estimators, unreached=unreached, **figures)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"probe_file={config.probe_file!r} is damaged or not a probe of this package ({error}). Delete it to "
            "probe anew, or name another file."
        ) from error


def _path(config: LoRAGAConfig) -> Path:
    if config.probe_file is None:
        raise ValueError("LoRAGAConfig.probe_file is not set.")
    return Path(config.probe_file)


def _fingerprints(
    config: LoRAGAConfig, model: PeftModel, layers: Sequence[AdaptedLayer], dataset: Any
) -> dict[str, str]:
    settings = {"num_samples": config.num_samples, "estimator": config.estimator, "sketch_size": config.sketch_size}
    return {
        "format": _FORMAT,
        "base": fingerprint_base(model, layers),
        "heads": fingerprint_heads(model),
        "data": fingerprint_dataset(dataset),
        "settings": json.dumps(settings, sort_keys=True),
    }
