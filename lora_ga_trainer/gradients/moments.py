"""Second moments of what a layer takes in and of what comes back, for inits that ask for more than `G`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..adapters.layer import AdaptedLayer
from ..config import LoRAGAConfig
from ..engines.devices import to_fp64
from ..engines.products import fp32_blocks
from ..maths.inits import INITS
from ..maths.recovery import leading_directions
from .accumulator import add_product, gaussian
from .rows import OneHot


# Columns of the sketch of a covariance, for each unit of rank.
COLUMNS = 4
# Added to the probe's seed: the test matrices are not those of the sketches of `G`.
_SEEDS = 2


@dataclass
class LayerMoments:
    """
    Second moments of one linear layer over the N tokens that it saw: of its input `x (N, in)`, and of `dy (N, out)`,
    the gradient of the *summed* loss with respect to its output.

    Tokens are rows as the layer sees them, padding included; an embedding leaves out its `padding_idx`. What the init
    did not ask for is `None`.

    Args:
        tokens: N, over all processes. Rows of a micro-batch that counts in part count in part.
        input_second_moments: `sum x_j^2 / N`, `(in,)`.
        output_second_moments: `sum dy_i^2 / N`, `(out,)`.
        input_directions: leading eigenvectors of `x^T x / N`, orthonormal columns `(in, k)`, `k = min(4r, in)`.
        input_eigenvalues: theirs, descending, `(k,)`.
        output_directions: leading eigenvectors of `dy^T dy / N`, `(out, k)`, `k = min(4r, out)`.
        output_eigenvalues: theirs, `(k,)`.
    """

    tokens: float
    input_second_moments: Tensor | None = None
    output_second_moments: Tensor | None = None
    input_directions: Tensor | None = None
    input_eigenvalues: Tensor | None = None
    output_directions: Tensor | None = None
    output_eigenvalues: Tensor | None = None

    @property
    def holds(self) -> frozenset[str]:
        """What there is, of `lora_ga_trainer.maths.inits.NEEDS`."""
        found = {"second_moments": self.input_second_moments, "covariance_directions": self.input_directions}
        return frozenset(name for name, value in found.items() if value is not None)

    def state(self) -> dict[str, Tensor]:
        """Return what there is as tensors, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        tokens = torch.tensor(self.tokens, dtype=torch.float64)
        return {"tokens": tokens, **{name: value for name, value in found.items() if value is not None}}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> LayerMoments:
        return cls(state["tokens"].item(), **{name: value for name, value in state.items() if name != "tokens"})


class MomentSums:
    """
    The running sums that [`LayerMoments`] come of, in fp32.

    Args:
        shape: `(out, in)` of the layer.
        needs: of `lora_ga_trainer.maths.inits.NEEDS`.
        rank: r of the layer.
        seed: of the test matrices.
    """

    def __init__(self, shape: tuple[int, int], needs: frozenset[str], rank: int, seed: int) -> None:
        self.shape, self.needs, self.seed = shape, needs, seed
        self.columns = [min(COLUMNS * rank, features) for features in shape]  # of the output, of the input
        self.tokens = torch.zeros((), dtype=torch.float64)
        self.squares = [torch.zeros(features) for features in shape] if "second_moments" in needs else []
        self.sketches: list[Tensor] = []
        if "covariance_directions" in needs:
            self.sketches = [torch.zeros(features, k) for features, k in zip(shape, self.columns, strict=True)]

    def add(self, x: Tensor | OneHot, dy: Tensor, weight: float, share: float) -> None:
        """
        Add the tokens of one pass.

        Args:
            x, dy: `(N, in)` and `(N, out)`, `dy` of the mean loss.
            weight: items of the loss, which make `weight * dy` the gradient of the summed loss; 0 for a pass whose
                samples have no label, of which only the inputs are known.
            share: of the pass that counts.
        """
        self.tokens += share * len(x)
        for (part,) in ((x,),) if isinstance(x, OneHot) else fp32_blocks(x):
            self._add(1, part, share)
        if weight > 0:
            for (part,) in fp32_blocks(dy):
                # The summed loss does not depend on the micro-batch that a token is in; the mean does.
                self._add(0, part * weight, share)

    def _add(self, side: int, rows: Tensor | OneHot, share: float) -> None:
        if self.squares:
            total = self.squares[side] = self.squares[side].to(rows.device)
            squares = rows.counts(len(total)) if isinstance(rows, OneHot) else rows.square().sum(dim=0)
            total.add_(squares, alpha=share)
        if self.sketches:
            # rows^T (rows Omega): the covariance itself would be `features` squared.
            total = self.sketches[side] = self.sketches[side].to(rows.device)
            add_product(total, rows, rows @ self._test_matrix(side, rows.device), share)

    def _test_matrix(self, side: int, device: torch.device) -> Tensor:
        return gaussian(self.shape[side], self.columns[side], self.seed + _SEEDS + side, device)

    def sums(self) -> list[Tensor]:
        """Return what processes add up at the end."""
        return [self.tokens, *self.squares, *self.sketches]

    def finish(self) -> LayerMoments:
        """Turn the sums into means."""
        tokens = self.tokens.item()
        found = LayerMoments(tokens)
        if tokens == 0:  # the loss never reached the layer
            tokens = 1.0
        if self.squares:
            found.output_second_moments, found.input_second_moments = (total / tokens for total in self.squares)
        if self.sketches:
            of_sides = []
            for side, total in enumerate(self.sketches):
                Omega = self._test_matrix(side, total.device)
                of_sides.append(leading_directions(to_fp64(Omega), to_fp64(total) / tokens))
            (found.output_directions, found.output_eigenvalues), (found.input_directions, found.input_eigenvalues) = (
                (vectors.float(), values.float()) for vectors, values in of_sides
            )
        return found


def needs_of(config: LoRAGAConfig) -> frozenset[str]:
    """Return what the init of `config`, or its whitening, asks for beside singular pairs."""
    needs = INITS[config.init].needs if config.init in INITS else frozenset()
    return needs | {"second_moments"} if config.whitening > 0 else needs


def make_moment_sums(config: LoRAGAConfig, layers: Sequence[AdaptedLayer]) -> dict[str, MomentSums]:
    """
    Make empty sums of what the init of `config` asks for, one a layer; none if it asks for nothing.

    Raises:
        `ValueError`: naming a layer that has no input and output of its own.
    """
    needs = needs_of(config)
    if not needs:
        return {}
    require_inputs(config, layers)
    return {layer.name: MomentSums(layer.shape, needs, layer.rank, config.probe_seed) for layer in layers}


def require_inputs(config: LoRAGAConfig, layers: Sequence[AdaptedLayer]) -> None:
    """
    Refuse layers of which only `dL/dW` can be seen, for an init that asks for more.

    Raises:
        `ValueError`: naming the first such layer.
    """
    needs = needs_of(config)
    bare = [layer.name for layer in layers if not layer.has_inputs]
    if needs and bare:
        whitened = f" with whitening={config.whitening}" if config.whitening > 0 else ""
        raise ValueError(
            f"init={config.init!r}{whitened} needs {' and '.join(sorted(needs))} of a layer's input and "
            f"output-gradient. Of {bare[0]}, whose weight PEFT adapts itself, only the gradient can be seen. Leave it "
            f"out of `target_parameters` or `target_modules`, or choose another {'whitening' if whitened else 'init'}."
        )
