"""Gradient estimate: what the probe learned of every adapted weight, and what it was averaged over."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..maths.recovery import TopSVD
from .accumulator import Accumulator
from .moments import LayerMoments


logger = logging.getLogger(__name__)


class NonFiniteGradient(ValueError):
    """A loss or a gradient of the probe is NaN or infinite."""


@dataclass
class GradientEstimate:
    """
    What the probe learned.

    Args:
        estimators: the accumulators, one per adapted layer, of fused experts one each, by name, holding
            `G = dL/dW (out, in)` of the item-weighted mean loss.
        samples: examples used, over all processes: those asked for, and what is left of the last micro-batches.
        items: what the loss is a mean over (label tokens, or examples), over all processes.
        tokens: input tokens that passed through the model, over all processes.
        loss: mean loss over all items; NaN for an estimate read from a file.
        seconds: wall time of the probe.
        bytes_sent: bytes that this process handed to all-reduces.
        unreached: layers that the loss never reached.
        shared: layers that it reached whose weight has other uses, which `G` leaves out.
        seen_twice: layers that kept too little after one pass and were seen in a second one.
        tops: singular triplets that this process has computed already, by name; those of layers seen twice are not.
        moments: what the init asks for beside `G`, by the name of the layer; empty if it asks for nothing.
        first_batch: the first prepared inputs of this process, for measuring the loss before and after the write.
        first_items: items of `first_batch` that count.
        first_loss: the mean loss over the `first_batch` of all processes.
    """

    estimators: dict[str, Accumulator]
    samples: int = 0
    items: float = 0.0
    tokens: int = 0
    loss: float = math.nan
    seconds: float = 0.0
    bytes_sent: int = 0
    unreached: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    seen_twice: list[str] = field(default_factory=list)
    tops: dict[str, TopSVD] = field(default_factory=dict)
    moments: dict[str, LayerMoments] = field(default_factory=dict)
    first_batch: Any = None
    first_items: float = 0.0
    first_loss: float = math.nan

    @property
    def nbytes(self) -> int:
        """Bytes of probe state on this process, test matrices included, those that layers share once."""
        parts = [part for e in self.estimators.values() for part in e.held()]
        parts += [part for m in self.moments.values() for part in m.state().values()]
        tensors = {tensor.data_ptr(): tensor for tensor in parts}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def require_reached(
    unreached: Sequence[str], layers: Sequence[AdaptedLayer], config: LoRAGAConfig, source: str | None = None
) -> None:
    """
    Name the layers that the loss never reached in a warning, or refuse them.

    Args:
        unreached: their names.
        layers: all that were looked at.
        config: `allow_unreached` is read.
        source: where the names come from, for the message: a probe that runs now names none.

    Raises:
        `ValueError`: if the loss reaches no layer at all, or if `allow_unreached` is `False`, naming the layers.
    """
    if not unreached:
        return
    what = "The loss" if source is None else f"{source}: the loss"
    if len(unreached) == len(layers):
        raise ValueError(
            f"{what} reaches none of the {len(layers)} adapted layers ({', '.join(unreached[:5])}, ...): training "
            "would change nothing. Name layers in `target_modules` that the loss depends on, and look for `no_grad`, "
            "`detach` or a reentrant checkpoint without an input that requires grad between them and the loss."
        )
    if not config.allow_unreached:
        raise ValueError(
            f"{what} never reaches {len(unreached)} adapted layers: {', '.join(unreached[:5])}. Leave them out of "
            "`target_modules`, or set LoRAGAConfig(allow_unreached=True) to start them as plain LoRA."
        )
    logger.warning(
        "%s never reaches %d of the %d adapted layers. They keep PEFT's own start: %s.",
        what,
        len(unreached),
        len(layers),
        ", ".join(unreached),
    )
