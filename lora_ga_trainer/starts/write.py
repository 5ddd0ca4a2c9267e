"""Write the factors of a start into an adapted layer, under any engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..adapters.anchor import start_values
from ..adapters.layer import AdaptedLayer
from ..engines.parameters import write_parameters


if TYPE_CHECKING:
    from transformers import Trainer


def write_start(
    trainer: Trainer,
    layer: AdaptedLayer,
    B0: Tensor,  # (out, r), of experts (E, out, r)
    A0: Tensor,  # (r, in), of experts (E, r, in)
) -> None:
    """
    Write the factors that a layer starts from, under any engine.

    An anchored layer is written so that its output stays that of the base. In a plain layer the start moves the
    weight by `s B0 A0`, and DoRA's magnitude follows.

    Args:
        trainer: a trainer whose model is prepared (any time after `on_train_begin`).
        layer: one of [`find_adapted_layers`].
        B0, A0: the same on every process.

    A plain start with rows of your own in `A`, for each layer of [`find_adapted_layers`]:

        write_start(trainer, layer, torch.zeros(layer.shape[0], layer.rank), rows)
    """
    write_parameters(trainer, start_values(layer, B0, A0))
