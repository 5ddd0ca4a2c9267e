"""Accumulators and moments from the tensors of a file, none of which is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..adapters.layer import AdaptedLayer
from ..engines.devices import to_fp64
from ..maths.fidelity import HELD_OUT
from ..saving.json_file import short
from .accumulator import DTYPES, SUMS, Accumulator, ExactGradient
from .moments import LayerMoments
from .sketched import SketchedGradient


# Least eigenvalue of the Gram matrix of saved test columns, where its mean is 1. Gaussian columns of a square matrix,
# which nothing sketches so narrowly, have one of about 1 / k^2.
_LEAST_GRAM = 1e-10


# Parts of a tensor's name that belong to the moments of a layer.
MOMENTS = {field.name for field in fields(LayerMoments)}
# How far columns read from a file may be from orthonormal; fp32 leaves 1e-6.
_SKEW = 1e-3


def read_tensors(path: Path, layers: Sequence[AdaptedLayer]) -> tuple[dict[str, Accumulator], dict[str, LayerMoments]]:
    """
    Read the accumulators of every matrix, and the moments of the layers that have some.

    No tensor is read before all are known to be of the shapes of the layers: a header may claim any size.

    Raises:
        `KeyError`: if a tensor is missing, too many, of another shape or dtype, or of values that can't be.
    """
    shapes = {name: layer.shape for layer in layers for name in layer.matrices}
    with safe_open(path, framework="pt") as file:
        headers: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in shapes}
        of_moments: dict[str, dict[str, tuple[int, ...]]] = {}
        for key in file.keys():  # noqa: SIM118 - safe_open is not a dict
            name, _, part = key.partition("|")
            if name not in shapes:
                raise KeyError(f"{short(key)} belongs to no adapted layer")
            header = of_moments.setdefault(name, {}) if part in MOMENTS else headers[name]
            header[part] = tuple(file.get_slice(key).get_shape())
        for name, header in headers.items():
            require_state_shapes(header, shapes[name])
        for name, header in of_moments.items():
            require_moment_shapes(header, shapes[name])
        read = lambda name, parts: {part: file.get_tensor(f"{name}|{part}") for part in parts}
        accumulators = {name: restore_accumulator(read(name, headers[name]), shapes[name]) for name in shapes}
        moments = {name: restore_moments(read(name, header)) for name, header in of_moments.items()}
    return accumulators, moments


def require_moment_shapes(state: dict[str, tuple[int, ...]], shape: tuple[int, int]) -> None:
    """
    Check that tensors of these shapes, by name, are the `state()` of the moments of a layer `(out, in)`.

    Raises:
        `KeyError`: if one is missing or of another shape.
    """
    expected: dict[str, tuple[int, ...]] = {"tokens": ()}
    for side, features in zip(("output", "input"), shape, strict=True):
        if "input_second_moments" in state:
            expected[f"{side}_second_moments"] = (features,)
        if "input_directions" in state:
            values = state.get(f"{side}_eigenvalues", ())
            k = values[0] if len(values) == 1 and 0 < values[0] <= features else 0
            expected |= {f"{side}_directions": (features, k), f"{side}_eigenvalues": (k,)}
    if state != expected:
        raise KeyError(f"moments have the shapes {short(state)}, expected {short(expected)}")


def restore_moments(state: dict[str, Tensor]) -> LayerMoments:
    """
    Make the moments whose `state()` is given, of shapes that were checked.

    Raises:
        `KeyError`: if a tensor is of another dtype, not finite or negative, or if directions are not orthonormal.
    """
    for name, tensor in state.items():
        if tensor.dtype is not (torch.float64 if name == "tokens" else torch.float32):
            raise KeyError(f"{name} is of dtype {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise KeyError(f"{name} is not finite")
        if name.endswith("directions"):
            gram = to_fp64(tensor).T @ to_fp64(tensor)
            if (gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max() > _SKEW:
                raise KeyError(f"the columns of {name} are not orthonormal")
        elif (tensor < 0).any():
            raise KeyError(f"{name} has negative values")
    return LayerMoments.from_state(state)


def require_state_shapes(state: dict[str, tuple[int, ...]], shape: tuple[int, int]) -> None:
    """
    Check that tensors of these shapes, by name, are the `state()` of an accumulator of `G (out, in)`.

    Raises:
        `KeyError`: if one is missing, too many or of another shape.
    """
    out_features, in_features = shape
    if set(state) == {"G"}:
        expected: dict[str, tuple[int, ...]] = {"G": (out_features, in_features)}
    elif set(state) == {"Omega", "Psi", "S", "Y", "Z"}:
        (k,) = state["S"] if len(state["S"]) == 1 else (0,)
        if not 0 < k <= min(shape):
            raise KeyError(f"S has shape {state['S']}, a sketch of {out_features} x {in_features} can't")
        right, left = (in_features, k + HELD_OUT), (out_features, k + HELD_OUT)
        expected = {"Omega": right, "Psi": left, "S": (k,), "Y": left, "Z": right}
    else:
        raise KeyError(f"tensors {sorted(state)[:10]}, expected G, or Omega, Psi, S, Y and Z")
    for name, found in state.items():
        if found != expected[name]:
            raise KeyError(f"{name} has shape {found}, expected {expected[name]}")


def restore_accumulator(state: dict[str, Tensor], shape: tuple[int, int]) -> Accumulator:
    """
    Make the accumulator whose `state()` is given.

    Raises:
        `KeyError`: if a tensor is missing, of another shape or dtype, or not finite, or if the columns of a test
            matrix depend on each other.
    """
    require_state_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, shape)
    for name, tensor in state.items():
        kinds = {"Omega": DTYPES, "Psi": DTYPES, "Y": SUMS, "Z": SUMS}.get(name, (torch.float32,))
        if tensor.dtype not in kinds:
            raise KeyError(f"{name} is of dtype {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise KeyError(f"{name} is not finite")
    if "G" in state:
        exact = ExactGradient((0, 0))
        exact.G = state["G"]
        return exact
    k = state["S"].shape[0]
    for name in ("Omega", "Psi"):
        gram = to_fp64(state[name][:, :k]).T @ to_fp64(state[name][:, :k])
        if not torch.linalg.eigvalsh(gram / gram.trace().clamp(min=1e-200))[0] > _LEAST_GRAM / k:
            raise KeyError(f"the columns of {name} depend on each other")
    sketch = SketchedGradient.__new__(SketchedGradient)
    sketch.k, sketch.seed, sketch.dtype, sketch.turned, sketch.additions = k, 0, state["Omega"].dtype, True, 0
    (sketch.Omega, sketch.w), (sketch.Psi, sketch.z) = (
        state[name].split([k, HELD_OUT], 1) for name in ("Omega", "Psi")
    )
    sketch.S, sketch.Y, sketch.Z = (state[name] for name in ("S", "Y", "Z"))
    return sketch
