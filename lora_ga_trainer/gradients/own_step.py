"""Loss of a trainer that computes it in a `training_step` of its own."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .borrow import attribute
from .state import closure_cells, global_names


if TYPE_CHECKING:
    from transformers import Trainer


class _Caught(BaseException):
    """Leaves a training step where its backward pass would begin."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


def has_own_step(trainer: Trainer) -> bool:
    """
    Tell whether `compute_loss` may not be the loss that is trained.

    It is where `training_step` is that of transformers, or calls the one that it overrides or was put around.
    """
    step = getattr(trainer.training_step, "__func__", trainer.training_step)
    if not isinstance(step, types.FunctionType) or step.__module__.partition(".")[0] == "transformers":
        return False
    held = [getattr(cell.cell_contents, "__name__", "") for _, cell in closure_cells(step)]
    return "training_step" not in (*global_names(step.__code__), *held)


def loss_of_step(trainer: Trainer, model: nn.Module, batch: Any, items: Tensor) -> Tensor:
    """
    Run the trainer's own `training_step` on prepared inputs up to its first backward pass.

    Returns:
        The loss that it starts from, with the graph attached.

    Raises:
        `ValueError`: if it makes no backward pass.
    """
    with _caught_backward(trainer), attribute(trainer, "_prepare_inputs", lambda inputs: inputs):
        try:
            trainer.training_step(model, batch, items)
        except _Caught as caught:
            return caught.loss
    kind = type(trainer).__name__
    raise ValueError(
        f"{kind}.training_step made no backward pass that the probe could see: neither `accelerator.backward` nor "
        f"`loss.backward`. Call one of them there, or compute the loss in {kind}.compute_loss and call "
        "super().training_step."
    )


@contextmanager
def _caught_backward(trainer: Trainer) -> Iterator[None]:
    def catch(loss: Any, *args: Any, **kwargs: Any) -> None:
        raise _Caught(loss if isinstance(loss, Tensor) else loss[0])

    places: list[tuple[Any, str]] = [(Tensor, "backward"), (torch.autograd, "backward")]
    with ExitStack() as stack:
        for owner in (trainer.accelerator, trainer.model_wrapped):  # an engine has a `backward` as well
            if hasattr(owner, "backward"):
                stack.enter_context(attribute(owner, "backward", catch))
        for place, name in places:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, catch)
        yield
