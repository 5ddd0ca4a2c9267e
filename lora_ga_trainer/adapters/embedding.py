"""Embeddings that carry LoRA: linear layers whose inputs are one-hot, one entry of 1 for each id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from .layer import AdaptedLayer
from .storage import AnchoredA, AnchoredB


class _Factors(nn.ParameterDict):
    """
    One factor of an embedding, by adapter; those in `anchored` are in delta form.

    PEFT keeps bare parameters and multiplies by them itself. So reading gives the tied or frozen half while
    [`AnchoredEmbedding`] runs, and the parameter to everybody else: for saving, loading, copying and `get_parameter`
    this is a plain `nn.ParameterDict`.
    """

    runs = False
    anchored: frozenset[str] = frozenset()

    def hold(self, weight: Tensor) -> Tensor:
        """Return a view of a factor in delta form whose gradient is that of the start."""
        raise NotImplementedError

    def held(self) -> dict[str, Tensor]:
        return {name: cast(Tensor, self._parameters[name]) for name in sorted(self.anchored)}

    def __getitem__(self, key: str) -> Any:
        stored = super().__getitem__(key)
        return self.hold(stored) if self.runs and key in self.anchored and torch.is_grad_enabled() else stored

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.anchored = self.anchored - {key}  # a later adapter may have the name of a deleted one


class AnchoredEmbeddingA(_Factors, AnchoredA):
    """`lora_embedding_A`, `[A; A - A0] (2r, in)` of each anchored adapter."""

    hold = AnchoredA.tie


class AnchoredEmbeddingB(_Factors, AnchoredB):
    """`lora_embedding_B`, `[B - B0, B0] (out, 2r)` of each anchored adapter."""

    hold = AnchoredB.freeze


class AnchoredEmbedding(Embedding):
    """PEFT's adapter of an embedding, whose forward pass reads tied halves where its factors are anchored."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._running():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _running(self) -> Iterator[None]:
        factors = [cast(_Factors, self.lora_embedding_A), cast(_Factors, self.lora_embedding_B)]
        for factor in factors:
            factor.runs = True
        try:
            yield
        finally:
            for factor in factors:
                factor.runs = False


@dataclass(frozen=True)
class AdaptedEmbedding(AdaptedLayer):
    """
    An embedding, seen as the linear layer that maps one-hot vectors to `embedding_dim` numbers.

    Its `G` is `(embedding_dim, num_embeddings)`, the gradient of the weight transposed: column `id` is the sum of the
    output's gradients where `id` stood.
    """

    factor_names = ("lora_embedding_A", "lora_embedding_B")

    @property
    def is_anchored(self) -> bool:
        factors = self.module.lora_embedding_A
        return isinstance(factors, AnchoredEmbeddingA) and self.adapter in factors.anchored

    @property
    def stored_A(self) -> nn.Parameter:  # (stored_rank, in)
        return cast(nn.Parameter, self.module.lora_embedding_A._parameters[self.adapter])

    @property
    def stored_B(self) -> nn.Parameter:  # (out, stored_rank)
        return cast(nn.Parameter, self.module.lora_embedding_B._parameters[self.adapter])

    @property
    def lora_bias(self) -> None:
        return None

    def put_factors(self, A: nn.Parameter, B: nn.Parameter) -> None:
        """Hold these parameters from now on, `(stored_rank, in)` and `(out, stored_rank)`."""
        self.module.lora_embedding_A[self.adapter] = A
        self.module.lora_embedding_B[self.adapter] = B

    def anchor(self) -> None:
        """Read the factors that are held as ones in delta form from now on."""
        self.module.__class__ = AnchoredEmbedding
        kinds: list[tuple[Any, type[_Factors]]] = [
            (self.module.lora_embedding_A, AnchoredEmbeddingA),
            (self.module.lora_embedding_B, AnchoredEmbeddingB),
        ]
        for factors, kind in kinds:
            factors.__class__ = kind
            factors.anchored = factors.anchored | {self.adapter}

    def require_whole(self, copies: int) -> None:
        if copies > 1:
            raise ValueError(
                f"{self.name}: nn.DataParallel, which the Trainer uses on {copies} GPUs without a launcher, can't "
                "copy the parameters of an adapted embedding. Start with `accelerate launch`, which gives each GPU a "
                "process, or show one GPU with CUDA_VISIBLE_DEVICES."
            )


def require_plain_embedding(name: str, module: nn.Module) -> None:
    """
    Refuse an embedding whose gradient or adapter is not that of a linear layer.

    Args:
        name: of the layer.
        module: PEFT's layer.

    Raises:
        `ValueError`: naming the layer and the option.
    """
    base = cast(Any, module).get_base_layer()
    own_forward = type(base).forward is not nn.Embedding.forward
    odd = {
        # It rewrites rows of the weight, those of `lora_embedding_A` as well, while it looks them up.
        f"max_norm={base.max_norm}": base.max_norm is not None,
        "scale_grad_by_freq=True": base.scale_grad_by_freq,
        "sparse=True": base.sparse,
        # A factor `embed_scale` is known to PEFT, which gives it to the adapter, too.
        "a forward pass of its own": own_forward and cast(Any, module)._get_embed_scale() is None,
    }
    for option, found in odd.items():
        if found:
            raise ValueError(
                f"Layer {name}: {type(base).__name__} has {option}, so that its adapter does not train as a change "
                "`B A` of the weight. Leave the layer out of `target_modules`, or use LoRAGAConfig(init='none')."
            )
