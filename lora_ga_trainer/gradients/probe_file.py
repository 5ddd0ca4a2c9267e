"""Save a gradient estimate and give it back, so that seeds, ranks and sweeps share one probe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.collectives import gather_integers
from ..saving.atomic import whole_file
from ..saving.fingerprint import fingerprint_base, fingerprint_dataset, fingerprint_heads
from ..saving.json_file import is_number, parse_json, short
from .accumulator import Accumulator
from .borrow import preserved_state
from .estimate import GradientEstimate, require_reached
from .moments import COLUMNS, LayerMoments, needs_of, require_inputs
from .probe import estimate_gradients
from .restore import read_tensors
from .sharing import name_shared
from .sketch import directions_used, sketch_columns


if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import Trainer

_FORMAT = "5"
_FIGURES = ("samples", "items", "tokens", "loss", "seconds", "bytes_sent")


def save_estimate(
    estimate: GradientEstimate,
    config: LoRAGAConfig,
    model: nn.Module,
    layers: Sequence[AdaptedLayer],
    dataset: Any,
    write: bool = True,
) -> None:
    """
    Write `estimate` to `config.probe_file` as safetensors, whole or not at all, with its fingerprints.

    Every process calls this, since fingerprints of a sharded base take all of them; one of them has `write`.
    """
    metadata = {
        **_fingerprints(config, model, layers, dataset),
        "figures": json.dumps({name: getattr(estimate, name) for name in _FIGURES}),
        "unreached": json.dumps(estimate.unreached),
        "shared": json.dumps(estimate.shared),
        "seen_twice": json.dumps(estimate.seen_twice),
        "holds": json.dumps(
            ["singular_pairs", *sorted({kind for m in estimate.moments.values() for kind in m.holds})]
        ),
    }
    if not write:
        return
    states = [(name, accumulator.state()) for name, accumulator in estimate.estimators.items()]
    states += [(name, moments.state()) for name, moments in estimate.moments.items()]
    tensors = _own_memory({f"{name}|{key}": tensor for name, state in states for key, tensor in state.items()})
    try:
        with whole_file(_path(config)) as partial:
            save_file(tensors, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"probe_file={config.probe_file!r} could not be written ({error}). Free some space or name another file; "
            "the probe itself went well."
        ) from error


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to the CPU, each with memory of its own: layers of a shape share Gaussians until they turn."""
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        owned[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return owned


def load_estimate(
    config: LoRAGAConfig, model: nn.Module, layers: Sequence[AdaptedLayer], dataset: Any
) -> GradientEstimate | None:
    """
    Read `config.probe_file`; `None` if there is no such file.

    Raises:
        `ValueError`: if the file is damaged, or comes from another base, head, data set or other settings; the message
            names which. Also if it left layers unreached that this run does not allow, or does not hold what the init
            of this run needs.
    """
    path = _path(config)
    if not path.exists():
        return None
    expected = _fingerprints(config, model, layers, dataset)
    with _damage_named(config), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise ValueError(
                f"probe_file={config.probe_file!r} does not fit this run: its {key} is {short(metadata.get(key))}, "
                f"this run's {value!r}. Delete it to probe anew, or name another file."
            )
    with _damage_named(config):
        figures = _parse_figures(metadata)
        names = {key: _parse_names(metadata, key, layers) for key in ("unreached", "shared", "seen_twice")}
        accumulators, moments = read_tensors(path, layers)
    require_reached(names["unreached"], layers, config, f"probe_file={config.probe_file!r}")
    _require_directions(config, layers, accumulators)
    _require_moments(config, layers, moments)
    name_shared(names["shared"])
    seen: dict[str, Any] = {**names, **figures}
    return GradientEstimate(estimators=accumulators, moments=moments, **seen)


@contextmanager
def _damage_named(config: LoRAGAConfig) -> Iterator[None]:
    """Name the file in whatever reading it raises."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"probe_file={config.probe_file!r} is damaged or not a probe of this package ({error}). Delete it to "
            "probe anew, or name another file."
        ) from error


def _parse_figures(metadata: dict[str, str]) -> dict[str, Any]:
    figures = parse_json(metadata["figures"])
    if not isinstance(figures, dict) or set(figures) != set(_FIGURES):
        raise KeyError(f"figures must be {', '.join(_FIGURES)}")
    for name, value in figures.items():
        if not is_number(value):
            raise TypeError(f"{name}={short(value)} is not a number")
    return figures


def _parse_names(metadata: dict[str, str], key: str, layers: Sequence[AdaptedLayer]) -> list[str]:
    """Read names of layers."""
    found, names = parse_json(metadata[key]), {layer.name for layer in layers}
    if not isinstance(found, list) or not all(type(name) is str and name in names for name in found):
        raise KeyError(f"{key}={short(found)} does not name adapted layers")
    return found


def _require_directions(
    config: LoRAGAConfig, layers: Sequence[AdaptedLayer], accumulators: dict[str, Accumulator]
) -> None:
    """Refuse sketches that can't hold the directions of this run, or hold them less well than its own would."""
    columns = sketch_columns(config, max(layer.rank for layer in layers))
    for layer in layers:
        of_layer = [accumulators[name] for name in layer.matrices]
        needed = min(directions_used(config, layer.rank), *layer.shape)
        directions = min(accumulator.directions for accumulator in of_layer)
        if directions < needed:
            raise ValueError(
                f"probe_file={config.probe_file!r} holds {directions} directions of layer {layer.name}; "
                f"{_name(config)} at rank {layer.rank} needs {needed}. Delete it to probe anew with a larger "
                "sketch_size, or name another file."
            )
        if config.sketch_size is None and any(found.sketched and found.directions < columns for found in of_layer):
            raise ValueError(
                f"probe_file={config.probe_file!r} has sketches of {directions} columns, of layer {layer.name} for "
                f"one; {_name(config)} at this rank would use {columns}. Delete it to probe anew, or set the "
                "same sketch_size in the run that writes it and in those that read it."
            )


def _require_moments(config: LoRAGAConfig, layers: Sequence[AdaptedLayer], moments: dict[str, LayerMoments]) -> None:
    """Refuse a file that lacks what the init asks for beside singular pairs."""
    require_inputs(config, layers)
    for layer in layers if needs_of(config) else ():
        held = moments.get(layer.name, LayerMoments(0.0))
        lacks = needs_of(config) - held.holds
        # A lower rank gathers fewer directions.
        found = [values for values in (held.output_eigenvalues, held.input_eigenvalues) if values is not None]
        if any(
            len(values) < min(COLUMNS * layer.rank, n) for values, n in zip(found, layer.shape, strict=bool(found))
        ):
            lacks |= needs_of(config) & {"covariance_directions"}
        if lacks:
            raise ValueError(
                f"probe_file={config.probe_file!r} was made for an init that needs less: it does not hold the "
                f"{' and '.join(sorted(lacks))} of layer {layer.name} that {_name(config)} needs at rank "
                f"{layer.rank}. Delete it to probe anew, or name another file."
            )


def _name(config: LoRAGAConfig) -> str:
    """Name what decides how much of a gradient is needed."""
    return f"init={config.init!r}" + (f" with whitening={config.whitening}" if config.whitening > 0 else "")


def require_probe_folder(config: LoRAGAConfig) -> None:
    """
    Look at the folder of `config.probe_file` before anything is computed.

    Raises:
        `ValueError`: if it does not exist, or `probe_file` is a folder itself.
    """
    if config.probe_file is None:
        return
    path = _path(config)
    if not path.parent.is_dir():
        raise ValueError(f"probe_file={config.probe_file!r}: the folder {path.parent} does not exist. Make it first.")
    if path.exists() and not path.is_file():
        raise ValueError(f"probe_file={config.probe_file!r} is not a file. Name a .safetensors file.")


def _path(config: LoRAGAConfig) -> Path:
    if config.probe_file is None:
        raise ValueError("LoRAGAConfig.probe_file is not set.")
    return Path(config.probe_file)


def _fingerprints(
    config: LoRAGAConfig, model: nn.Module, layers: Sequence[AdaptedLayer], dataset: Any
) -> dict[str, str]:
    settings = {"num_samples": config.num_samples, "estimator": config.estimator, "sketch_size": config.sketch_size}
    if config.estimator == "sketch":
        settings["min_energy_kept"] = config.min_energy_kept
    settings["probe_order"] = config.probe_order
    if config.probe_order == "random":
        settings["probe_seed"] = config.probe_seed
    return {
        "format": _FORMAT,
        "base": fingerprint_base(model, layers),
        "heads": fingerprint_heads(model),
        "data": fingerprint_dataset(dataset),
        "settings": json.dumps(settings, sort_keys=True),
    }


def load_or_estimate(
    trainer: Trainer, config: LoRAGAConfig, layers: list[AdaptedLayer], probe_dataset: Dataset | None
) -> GradientEstimate:
    if config.probe_file is None:
        return estimate_gradients(trainer, config, layers, probe_dataset)
    dataset = trainer.train_dataset if probe_dataset is None else probe_dataset
    model = trainer.accelerator.unwrap_model(trainer.model)
    seen = [row[0] for row in gather_integers(trainer, int(Path(config.probe_file).exists()))]
    if len(set(seen)) > 1:
        raise ValueError(
            f"probe_file={config.probe_file!r} is there for {sum(seen)} of {len(seen)} processes only. Name a file "
            "in a folder that all of them share."
        )
    with preserved_state(trainer, dataset=dataset):  # fingerprints read some examples
        estimate = load_estimate(config, model, layers, dataset)
    if estimate is None:
        estimate = estimate_gradients(trainer, config, layers, probe_dataset)
        with preserved_state(trainer, dataset=dataset):
            save_estimate(estimate, config, model, layers, dataset, write=trainer.is_world_process_zero())
    return estimate
