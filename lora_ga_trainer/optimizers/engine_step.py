"""Clipping and correction of gradients just before an engine steps by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..adapters.layer import AdaptedLayer
from ..adapters.storage import anchored_parameter_names, counted_norm
from ..engines.parameters import read_parameter
from ..engines.support import (
    loss_scale,
    optimizer_groups,
    read_gradient,
    run_before_steps,
    steps_by_itself,
    write_gradient,
)
from .batches import Correct, batch_pairs, correct_batch, each_corrected
from .pairs import trained_pairs


if TYPE_CHECKING:
    from transformers import Trainer


class EngineStep:
    """
    Clip and correct gradients before an engine steps.

    The norm counts the gradient of an anchored `A` once. Both need whole gradients, so the processes gather them: of
    every trained parameter for the norm, of the pairs for the correction. The clipping comes first, as elsewhere.

    Args:
        trainer: prepared, with an engine that steps by itself.
        model: the bare model.
        pairs: to correct; none for clipping alone.
        correct: the correction of a batch of pairs.

    Attributes:
        norm: of the gradients in the last step, before clipping.
    """

    def __init__(
        self, trainer: Trainer, model: nn.Module, pairs: list[AdaptedLayer], correct: Correct = correct_batch
    ) -> None:
        self.trainer, self.model, self.pairs, self.correct = trainer, model, pairs, correct
        self.norm = torch.zeros(())
        self.max_norm = run_before_steps(trainer, self.run)

    @torch.no_grad()
    def run(self) -> None:
        """Clip and correct once. The gradients of all accumulated passes are in place by then."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = {parameter: read_gradient(parameter) for parameter in trained}
        self.norm = counted_norm(self.model, gradients.get) / loss_scale(self.trainer)
        new = self._correct(gradients) if self.pairs else {}
        # The correction is linear, so its outcome times the factor of the raw norm is what clipping before it gives.
        factor = 1.0
        if self.max_norm > 0:
            factor = min(1.0, self.max_norm / (self.norm.item() + 1e-6))
        for parameter, gradient in gradients.items():
            # A write is a collective, so a gradient that stays as it is is left alone.
            value = new.get(parameter, gradient if factor < 1 else None)
            if value is not None:
                write_gradient(parameter, value * factor)

    def _correct(self, gradients: dict[nn.Parameter, Tensor | None]) -> dict[nn.Parameter, Tensor]:
        has_gradient = lambda linear: gradients[linear.weight] is not None
        ready = [pair for pair in self.pairs if has_gradient(pair.lora_A) and has_gradient(pair.lora_B)]
        batches = batch_pairs(
            ready, read=lambda parameter: (read_parameter(parameter), cast(Tensor, gradients[parameter]))
        )
        found: dict[nn.Parameter, Tensor] = {}
        for batch, dAs, dBs in each_corrected(batches, self.correct):
            found.update(zip(batch.weights_A, dAs, strict=True))
            found.update(zip(batch.weights_B, dBs, strict=True))
        return found


def install_engine_step(trainer: Trainer, model: nn.Module, correct: Correct | None) -> EngineStep | None:
    """
    Put an [`EngineStep`] before the steps of the trainer's engine, if that steps by itself and there is work for it.

    Args:
        trainer: prepared.
        model: the bare model.
        correct: the correction of a batch of pairs; `None` where gradients stay as they are.
    """
    if not steps_by_itself(trainer):
        return None
    pairs: list[AdaptedLayer] = []
    if correct is not None:
        groups = [{**options, "params": parameters} for parameters, options in optimizer_groups(trainer)]
        pairs = trained_pairs(model, groups, "LoRA-Pro")
    clips = trainer.args.max_grad_norm and anchored_parameter_names(model)
    return EngineStep(trainer, model, pairs, correct or correct_batch) if pairs or clips else None
