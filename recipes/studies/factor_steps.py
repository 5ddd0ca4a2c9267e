"""
Optimizers of LoRA's factors that look at a factor as a matrix, as entries of the package's registry.

They are tried by steps.py. Each takes the pairs of a model whose only trained parameters are plain factors, computes
in fp64 and has no weight decay. A side of a pair is written `(r, n)`: `A` as it is, `B` transposed. `exact_muon` steps
along exact polar factors, five times as far as the package's `muon` at the same rate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_ga_trainer import OptimizerEntry, find_adapted_layers


FLOOR = 1e-12  # of eigenvalues against the largest one: a direction a millionth as long as the longest is left out
BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW
MUON_MOMENTUM = 0.95  # of Muon's authors
BASIS_BETA, BASIS_EVERY = 0.95, 10  # of SOAP's authors
POLORA_MOMENTUM, CURVATURE_BETA = 0.9, 0.99  # of PoLoRA's authors
CURVATURE_FLOOR = 0.01  # of a feature's mean square against the mean one


def inverse_root(S: Tensor) -> Tensor:  # (r, r), symmetric -> (r, r)
    """Return `S^-1/2`, which is 0 in the directions in which `S` is."""
    values, Q = torch.linalg.eigh(S)
    # No direction of a zero matrix is above the floor: it has the root 0, as the gradient of A has where B = 0.
    roots = torch.where(values > FLOOR * values[-1].clamp(min=0), values.clamp(min=1e-300).rsqrt(), 0.0)
    return (Q * roots) @ Q.T


def polar(M: Tensor) -> Tensor:  # (r, n) -> (r, n)
    """Return the factor `U V^T` of `M = U S V^T`, without the directions that `M` does not have."""
    return inverse_root(M @ M.T) @ M


def spectral_norm(M: Tensor) -> Tensor:  # (r, n) -> ()
    return torch.linalg.eigvalsh(M @ M.T)[-1].clamp(min=0).sqrt()


class FactorOptimizer(Optimizer):
    """
    Step every pair along directions of its own.

    Args:
        model: with plain LoRA adapters.
        lr: learning rate.

    Raises:
        `ValueError`: naming a trained parameter that is not a factor.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.layers = find_adapted_layers(model)
        factors = {id(p) for layer in self.layers for p in (layer.stored_A, layer.stored_B)}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in factors:
                raise ValueError(f"{type(self).__name__}: {name} is trained and not a factor. Freeze it.")
        super().__init__([{"params": [layer.stored_A, layer.stored_B]} for layer in self.layers], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for index, group in enumerate(self.param_groups):
            A, B = group["params"]
            steps = self.steps_of(index, A.double(), B.T.double(), A.grad.double(), B.grad.T.double())
            for factor, step in zip((A, B), (steps[0], steps[1].T), strict=True):
                factor.sub_((group["lr"] * step).to(factor.dtype))

    def steps_of(self, index: int, A: Tensor, Bt: Tensor, gA: Tensor, gBt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the steps of both sides, of rate 1."""
        A_state, B_state = (self.state[p] for p in self.param_groups[index]["params"])
        return self.step_of(A_state, gA), self.step_of(B_state, gBt)

    def step_of(self, state: dict[str, Any], G: Tensor) -> Tensor:  # (r, n) -> (r, n)
        raise NotImplementedError


def nesterov(state: dict[str, Any], G: Tensor, momentum: float) -> Tensor:
    """Add the gradient to the momentum, and return where the next one would lead, of a length that no step sees."""
    state["momentum"] = momentum * state.get("momentum", 0.0) + G
    return G + momentum * state["momentum"]


class ExactMuon(FactorOptimizer):
    """Step along the polar factor of the momentum, times `sqrt(n)`: its entries are of size 1, as Adam's are."""

    def step_of(self, state: dict[str, Any], G: Tensor) -> Tensor:
        return polar(nesterov(state, G, MUON_MOMENTUM)) * G.shape[1] ** 0.5


class OneSidedSOAP(FactorOptimizer):
    """Adam in the eigenbasis of the running mean of `G G^T (r, r)` (SOAP, arXiv 2409.11321, on one side)."""

    def step_of(self, state: dict[str, Any], G: Tensor) -> Tensor:
        if not state:
            state.update(t=0, moment=0.0, first=0.0, second=0.0)
        state["t"] = t = state["t"] + 1
        state["moment"] = BASIS_BETA * state["moment"] + (1 - BASIS_BETA) * G @ G.T
        # The second step too: in the first one from B = 0 the gradient of A is 0.
        if t <= 2 or t % BASIS_EVERY == 0:
            state["basis"] = self.basis_of(state["moment"])
        Q = state["basis"]
        # The first moment stays in the factor's own coordinates, so it is right in any basis.
        state["first"] = BETAS[0] * state["first"] + (1 - BETAS[0]) * G
        state["second"] = BETAS[1] * state["second"] + (1 - BETAS[1]) * (Q.T @ G).square()
        first, second = Q.T @ state["first"] / (1 - BETAS[0] ** t), state["second"] / (1 - BETAS[1] ** t)
        return Q @ (first / (second.sqrt() + EPS))

    def basis_of(self, moment: Tensor) -> Tensor:  # (r, r) -> orthonormal columns
        return torch.linalg.eigh(moment)[1]


class PoLoRA(FactorOptimizer):
    """
    PoLoRA (arXiv 2607.17620): polar factors in the metric of the layer's inputs and output-gradients.

    `P` and `Q` are running mean squares of output-gradients and inputs by feature, `C_B = B^T P B`, `C_A = A Q A^T`.
    `D_A = C_B^-1/2 polar(C_B^-1/2 M_A Q^-1/2) Q^-1/2`, `D_B` likewise, each divided by its spectral norm and by
    `|A|_2 + |B|_2`. So a step of rate `lr` moves `B A` by at most `lr` in spectral norm, to first order. `M` is
    Nesterov momentum. Not of the paper: a hundredth of their mean is added to `P` and `Q`, for features that are
    always 0, and `C^-1/2` is 0 where `C` is.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(model, lr)
        self.seen: list[dict[str, Tensor]] = [{} for _ in self.layers]  # mean squares, by "x" and "dy"
        for index, layer in enumerate(self.layers):
            layer.module.register_forward_hook(self._watch(index))

    def _watch(self, index: int) -> Callable[..., None]:
        def keep(name: str, value: Tensor) -> None:
            square = value.detach().flatten(0, -2).double().square().mean(0)
            before = self.seen[index].get(name, square)
            self.seen[index][name] = before.lerp(square, 1 - CURVATURE_BETA)

        def after(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            if module.training and y.requires_grad:
                keep("x", args[0])
                y.register_hook(lambda dy: keep("dy", dy))

        return after

    def steps_of(self, index: int, A: Tensor, Bt: Tensor, gA: Tensor, gBt: Tensor) -> tuple[Tensor, Tensor]:
        # Only the directions of P and Q count: a common factor of either leaves the steps as they are.
        P, Q = (m / m.mean().clamp(min=1e-300) + CURVATURE_FLOOR for m in (self.seen[index][k] for k in ("dy", "x")))
        A_state, B_state = (self.state[p] for p in self.param_groups[index]["params"])
        D_A = polora_direction(nesterov(A_state, gA, POLORA_MOMENTUM), Q, inverse_root(Bt * P @ Bt.T))
        D_B = polora_direction(nesterov(B_state, gBt, POLORA_MOMENTUM), P, inverse_root(A * Q @ A.T))
        length = spectral_norm(A) + spectral_norm(Bt)
        return D_A / length, D_B / length


def polora_direction(M: Tensor, metric: Tensor, root: Tensor) -> Tensor:  # (r, n), (n,), (r, r) -> (r, n)
    """Return `root polar(root M metric^-1/2) metric^-1/2`, of spectral norm 1, or 0 where that is 0."""
    D = root @ polar(root @ M * metric.rsqrt()) * metric.rsqrt()
    return D / spectral_norm(D).clamp(min=1e-300)


def entry_of(kind: type[FactorOptimizer], about: str) -> OptimizerEntry:
    return OptimizerEntry(
        about,
        build=lambda request: kind(request.model, request.trainer.args.learning_rate),
        kind=kind,
        not_anchored="whose step is one of a whole factor. Use init='none' or init='lora_one'.",
    )


ENTRIES = {
    "exact_muon": entry_of(ExactMuon, "Muon on each factor, with exact polar factors"),
    "soap": entry_of(OneSidedSOAP, "SOAP on the side of the rank, arXiv 2409.11321"),
    "polora": entry_of(PoLoRA, "PoLoRA, arXiv 2607.17620"),
}
