"""Accumulators from tensors that were read from a file, none of which is trusted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engines.devices import to_fp64
from ..maths.recovery import HELD_OUT
from .accumulator import DTYPES, Accumulator, ExactGradient
from .sketch import SketchedGradient


# Least eigenvalue of the Gram matrix of saved test columns, where its mean is 1. Gaussian columns of a square matrix,
# which nothing sketches so narrowly, have one of about 1 / k^2.
_LEAST_GRAM = 1e-10


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
        if tensor.dtype is not torch.float32 and (name not in ("Omega", "Psi") or tensor.dtype not in DTYPES):
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
    sketch.k, sketch.seed, sketch.dtype, sketch.turned = k, 0, state["Omega"].dtype, True
    sketch.Omega, sketch.Psi, sketch.S, sketch.Y, sketch.Z = (state[name] for name in ("Omega", "Psi", "S", "Y", "Z"))
    return sketch
