"""Rules for a learning rate, and optimizers without one, which learning_rates.py compares with the found rate."""

import importlib.util
import math
from typing import Any

import numpy as np
import torch

from lora_ga_trainer import LoRAGATrainer, find_adapted_layers


RANGE_STEPS, RANGE = 60, (1e-5, 1.0)
RACERS, RACE_STEPS = (1e-3, 3e-3, 1e-2), 30
# Optimizers that are meant to need no rate: the library of each, and its settings.
FREE = {
    "prodigy": "prodigyopt",
    "schedule-free, 1e-3": "schedulefree",
    "schedule-free, 2.5e-3": "schedulefree",
}


def require_libraries(rules: list[str]) -> None:
    """
    Refuse rules whose library is missing, before anything is trained.

    Raises:
        `ModuleNotFoundError`: naming the libraries, and the command that installs them.
    """
    missing = sorted({FREE[rule] for rule in rules if rule in FREE and not importlib.util.find_spec(FREE[rule])})
    if missing:
        raise ModuleNotFoundError(
            f"--rivals {' '.join(rules)}: {', '.join(missing)} can't be imported. They are no part of this package: "
            f"pip install --no-deps {' '.join(missing)}, or leave those rivals out."
        )


def free_settings(rule: str) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Return the rate, the changes of the training arguments and those of the trainer that an optimizer asks for."""
    if rule == "prodigy":
        from prodigyopt import Prodigy

        # What its README recommends with warm-up.
        options = {"lr": 1.0, "use_bias_correction": True, "safeguard_warmup": True}
        return 1.0, {}, {"optimizer_cls_and_kwargs": (Prodigy, options)}
    # It has its own warm-up, which the Trainer hands to it, and no schedule.
    changes = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    return float(rule.split(", ")[1]), changes, {}


class RangeTest(LoRAGATrainer):
    """Takes its steps at rates that grow exponentially over `RANGE`, and notes the loss before each."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        low, high = RANGE
        self.tried = getattr(self, "tried", {})
        rate = low * (high / low) ** (len(self.tried) / (self.args.max_steps - 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["initial_lr"] / self.args.learning_rate
        loss = super().training_step(*args, **kwargs)
        self.tried[rate] = loss.item()
        return loss


class Racer(LoRAGATrainer):
    """Stops after `RACE_STEPS` of its steps. The mean loss of the last third of them is what it is judged by."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen = getattr(self, "seen", [])
        loss = super().training_step(*args, **kwargs)
        self.seen.append(loss.item())
        self.control.should_training_stop = len(self.seen) >= RACE_STEPS
        return loss

    def mean_loss(self) -> float:
        last = self.seen[-max(1, len(self.seen) // 3) :]
        mean = sum(last) / len(last)
        return mean if math.isfinite(mean) else math.inf


def steepest(tried: dict[float, float], skip_start: int = 10, skip_end: int = 5) -> float:
    """
    Return the rate at which the smoothed loss falls most from a step to the next, as torch-lr-finder suggests it.

    Its smoothing: each loss counts for .05, and the test ends where the smoothed one is 5 times the least.
    """
    smooth: list[float] = []
    for loss in tried.values():
        smooth.append(loss if not smooth else 0.05 * loss + 0.95 * smooth[-1])
        if not smooth[-1] <= 5 * min(smooth):
            break
    inner = slice(skip_start, len(smooth) - skip_end)
    return list(tried)[inner][int(np.gradient(np.array(smooth)[inner]).argmin())]


def valley(tried: dict[float, float]) -> float:
    """
    Return the rate half-way along the longest falling subsequence of the smoothed loss, fastai's `valley`.

    Its smoothing is a mean with weight .98 on the past, and the test ends where it is 4 times the least.
    """
    smooth: list[float] = []
    mean = 0.0
    for step, loss in enumerate(tried.values(), 1):
        mean = 0.98 * mean + 0.02 * loss
        smooth.append(mean / (1 - 0.98**step))
        if not smooth[-1] <= 4 * min(smooth):
            break
    lengths = [1] * len(smooth)
    for i, loss in enumerate(smooth):
        lengths[i] = 1 + max((lengths[j] for j in range(i) if smooth[j] > loss), default=0)
    end = lengths.index(max(lengths))
    start = max(0, end - lengths[end])
    return list(tried)[start + (end - start) // 2]


def size_of_start(trainer: LoRAGATrainer, ratio: float) -> float:
    """
    Return how far a step of AdamW at rate 1 moves a weight, by the norms of the factors at the start.

    It is the mean over layers of `s (ratio |A0| / sqrt(in) + |B0| / sqrt(out))`, with Frobenius norms. `ratio` is that
    of B's rate to A's. An anchored layer stores `[A; A - A0]` and `[B - B0, B0]`.
    """
    sizes = []
    for layer in find_adapted_layers(trainer.model):
        A, B = layer.stored_A.detach()[: layer.rank], layer.stored_B.detach()[:, -layer.rank :]
        step = ratio * A.norm() / A.shape[1] ** 0.5 + B.norm() / B.shape[0] ** 0.5
        sizes.append(layer.scaling * step.item())
    return sum(sizes) / len(sizes)


def published(hidden_size: int) -> float:
    """
    Return `5e-5 * 10 * (2000 / hidden_size)^.781`, the rate for the Llama family by hidden size.

    https://tinker-docs.thinkingmachines.ai/supervised-learning/sl-hyperparams gave it after "LoRA Without Regret".
    Later versions of its library have a table of models in its place.
    """
    return 5e-4 * (2000 / hidden_size) ** 0.781
