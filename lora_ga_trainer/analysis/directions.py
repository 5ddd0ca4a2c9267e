"""The directions that an adapter's start came from: those of the probe's gradient, or of the start itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..engines.devices import to_fp64
from ..gradients.restore import MOMENTS, require_state_shapes, restore_accumulator
from ..maths.products import span_of
from ..saving.adapter_folder import AdapterFolder, SavedFactors
from ..saving.record import read_record


class Directions(NamedTuple):
    """Orthonormal columns: of outputs `U (out, m)`, of inputs `V (in, n)`."""

    U: Tensor
    V: Tensor


class StartDirections:
    """
    Gives the directions of one layer after the other.

    With a probe file they are the top singular vectors of the gradient, as many as the stored rank, on both sides.
    Without one an anchored adapter tells of its own start: the span of the columns of `B0` and of the rows of `A0`,
    r on each side. Other adapters have kept nothing of theirs.

    Args:
        adapter: that was started.
        probe_file: as `LoRAGAConfig.probe_file` names it.

    Attributes:
        source (`str` or `None`): what the directions are of; `None` where there are none.

    Raises:
        `ValueError`: if the probe file can't be read.
    """

    def __init__(self, adapter: AdapterFolder, probe_file: str | os.PathLike[str] | None) -> None:
        self._probe = None if probe_file is None else Path(probe_file)
        record = read_record(adapter.path)
        self._anchored = record is not None and record.anchored
        self.source = "the start" if self._anchored else None
        self._keys: list[str] = []
        if self._probe is not None:
            self.source = "the probe's gradient"
            try:
                with safe_open(self._probe, framework="pt") as file:
                    self._keys = list(file.keys())
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"probe_file={str(probe_file)!r} can't be read ({error}). Name the file that "
                    "LoRAGAConfig.probe_file of the run has written."
                ) from error

    def of_layer(self, layer: SavedFactors) -> Directions | None:
        """
        Return the directions of a layer; `None` where nothing is known of them.

        Raises:
            `ValueError`: if the probe file does not know the layer, or holds something else.
        """
        if self._probe is not None:
            return self._of_gradient(layer)
        if not self._anchored:
            return None
        r = layer.rank // 2
        A0, B0 = layer.A[:r] - layer.A[r:], layer.B[:, r:]  # stored as [A; A - A0] and [B - B0, B0]
        return Directions(span_of(B0), span_of(A0.T))

    def _of_gradient(self, layer: SavedFactors) -> Directions:
        parts = [key.partition("|")[2] for key in self._keys if key.partition("|")[0] == layer.name]
        parts = [part for part in parts if part not in MOMENTS]
        try:
            with safe_open(str(self._probe), framework="pt") as file:
                shapes = {part: tuple(file.get_slice(f"{layer.name}|{part}").get_shape()) for part in parts}
                require_state_shapes(shapes, layer.shape)  # before a tensor is read: a header may claim any size
                state = {part: file.get_tensor(f"{layer.name}|{part}") for part in parts}
            gradient = restore_accumulator(state, layer.shape)
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"probe_file={str(self._probe)!r}: no gradient of layer {layer.name}, shape {layer.shape} ({error}). "
                "Name the probe file of the run that trained the adapter, or none."
            ) from error
        top = gradient.svd(min(layer.rank, gradient.directions))
        present = top.S > 0
        return Directions(to_fp64(top.U)[:, present], to_fp64(top.Vt)[present].T)
