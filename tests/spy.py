"""Everything of a training run that something beside it could disturb."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer


class Spy:
    """Everything of a run that a probe could disturb."""

    def __init__(self, trainer: Trainer) -> None:
        model = trainer.model
        self.seen = {
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "has_grad": [p.grad is not None for p in model.parameters()],
            "grad": [p.grad.clone() for p in model.parameters() if p.grad is not None],
            "values": [p.detach().clone() for p in model.parameters()],
            "buffers": [b.clone() for b in model.buffers()],
            "modes": [m.training for m in model.modules()],
            "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
            "dropouts": [m.p for m in model.modules() if isinstance(m, nn.Dropout)],
            "attention_dropout": getattr(model.config, "attention_dropout", None),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state(),
            "loaders": list(trainer.accelerator._dataloaders),
            "references": list(trainer.accelerator.gradient_state.dataloader_references),
            "sync": trainer.accelerator.gradient_state.sync_gradients,
            "average": trainer.args.average_tokens_across_devices,
            "stance": torch._dynamo.eval_frame._stance.stance,
        }

    def assert_same(self, other: Spy, but: tuple[str, ...] = ()) -> None:
        for name, value in self.seen.items():
            if name in but:
                continue
            if isinstance(value, Tensor):
                assert torch.equal(value, other.seen[name]), name
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                assert all(torch.equal(a, b) for a, b in zip(value, other.seen[name], strict=True)), name
            else:
                assert value == other.seen[name], name
