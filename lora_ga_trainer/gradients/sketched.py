"""A gradient that is known by its products with thin test matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engines.devices import to_fp32, to_fp64
from ..engines.products import product
from ..maths.fidelity import HELD_OUT
from ..maths.recovery import TopSVD, recover
from ..maths.rounding import round_to_bf16
from .accumulator import Accumulator, add_product, cast, computed_in, drawn_columns, stack, to_one_dtype
from .rows import OneHot


class SketchedGradient(Accumulator):
    """
    `Y = G [Omega, w] (out, k + 16)`, `Z = G^T [Psi, z] (in, k + 16)` and `S (k,)`.

    The first k columns are those of the samples since the last turning point; those before are known as
    `Psi diag(S) Omega^T`. The 16 columns of `w` and `z` stay Gaussian, gather all samples, and measure what the
    recovery misses. Layers of a shape share them.

    All is in fp32. Where products are in bf16, so are `Omega` and `Psi`, and so are `Y` and `Z` between two additions,
    which are in fp32. Rounding them has no bias (see [`round_to_bf16`]). Each leaves an error of variance `ulp^2 / 6`,
    where a unit is 2^-8 to 2^-7 of a number: together .0014 sqrt(m) of a column's length after m additions whose sum
    grows steadily, .011 after 64. Each number has an error of its own, so hardly any of it lies in the directions
    that are looked for. Products of bf16 factors are rounded, too.
    """

    sketched = True

    def __init__(self, shape: tuple[int, int], k: int, seed: int = 0) -> None:
        out_features, in_features = shape
        self.k, self.seed = k, seed
        self.dtype = torch.float32
        self.turned = False
        self.additions = 0
        self._draw(out_features, in_features, torch.device("cpu"))
        self.S = torch.zeros(k)
        self.Y, self.Z = torch.zeros(out_features, k + HELD_OUT), torch.zeros(in_features, k + HELD_OUT)

    def _draw(self, out_features: int, in_features: int, device: torch.device) -> None:
        """Take the Gaussian matrices, which layers of one shape share."""
        self.Omega, self.w = drawn_columns(in_features, self.k, self.seed, device)
        self.Psi, self.z = drawn_columns(out_features, self.k, self.seed + 1, device)

    def move_to(self, device: torch.device) -> None:
        if self.Y.device == device:
            return
        if self.turned:
            self.Omega, self.Psi = self.Omega.to(device), self.Psi.to(device)
            self.w, self.z = cast(self.w, device), cast(self.z, device)
        else:
            self._draw(self.Psi.shape[0], self.Omega.shape[0], device)
        self.S, self.Y, self.Z = self.S.to(device), self.Y.to(device), self.Z.to(device)

    def add(self, x: Tensor | OneHot, dy: Tensor, weight: float) -> None:
        x, dy = to_one_dtype(x, dy)
        self.compute_in(computed_in(dy))
        Omega, Psi = self._columns()
        of_x = x @ Omega if isinstance(x, OneHot) else product(x, Omega)
        self._sum(self.Y, lambda Y: add_product(Y, dy, of_x, weight))  # G Omega = sum dy^T (x Omega)
        self._sum(self.Z, lambda Z: add_product(Z, x, product(dy, Psi), weight))  # G^T Psi = sum x^T (dy Psi)

    def add_gradient(self, G: Tensor, weight: float) -> None:
        G = G.float()
        Omega, Psi = (columns.float() for columns in self._columns())
        self._sum(self.Y, lambda Y: Y.addmm_(G, Omega, alpha=weight))
        self._sum(self.Z, lambda Z: Z.addmm_(G.T, Psi, alpha=weight))

    def _columns(self) -> tuple[Tensor, Tensor]:  # (in, k + 16), (out, k + 16)
        return torch.cat([self.Omega, self.w], dim=1), torch.cat([self.Psi, self.z], dim=1)

    def _sum(self, total: Tensor, add: Callable[[Tensor], object]) -> None:
        """Let `add` change `total` in fp32."""
        if total.dtype is torch.float32:
            add(total)
            return
        self.additions += 1
        wide = total.float()
        add(wide)
        total.copy_(round_to_bf16(wide, self.additions))

    def compute_in(self, dtype: torch.dtype) -> None:
        """Round the test matrices once: the rounded ones are what the recovery uses."""
        self.dtype = dtype
        if self.Omega.dtype != dtype:
            self.Omega, self.w, self.Psi, self.z = (
                cast(columns, dtype) for columns in (self.Omega, self.w, self.Psi, self.z)
            )
            kept_in = dtype if dtype is torch.bfloat16 else torch.float32
            self.Y, self.Z = self.Y.to(kept_in), self.Z.to(kept_in)

    @property
    def directions(self) -> int:
        return self.k

    def sums(self) -> list[Tensor]:
        return [self.Y, self.Z]

    def since_last_turn(self) -> list[Tensor]:
        """Return what processes add up at a turning point."""
        return [self.Y[:, : self.k], self.Z[:, : self.k]]

    def known(self) -> list[Tensor]:
        """Return what a turning point changes, which one process computes for all."""
        return [self.Omega, self.Psi, self.S]

    def start_anew(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        """Store `U diag(S) V^T` as the current estimate and sketch later samples with `U (out, k)` and `V (in, k)`."""
        self.compute_in(self.dtype)
        # Where the next samples' gradients lie in these directions, and most of their energy does, the sketch shows
        # them without error. New tensors, since layers of a shape share the Gaussian ones.
        self.Omega, self.Psi, self.S = V.to(self.Omega), U.to(self.Psi), S.to(self.S)
        self.turned = True
        # The held-out columns go on: they measure the whole gradient at the end.
        for part in self.since_last_turn():
            part.zero_()

    def await_owner(self) -> None:
        """Make room for what another process computes at this turning point."""
        self.start_anew(*(torch.empty_like(part) for part in (self.Psi, self.S, self.Omega)))

    def held(self) -> list[Tensor]:
        return [self.Omega, self.w, self.Psi, self.z, self.S, self.Y, self.Z]

    def divide(self, items: float) -> None:
        for part in (self.S, self.Y, self.Z):
            part.div_(items)

    def state(self) -> dict[str, Tensor]:
        Omega, Psi = self._columns()
        return {"Omega": Omega, "Psi": Psi, "S": self.S, "Y": self.Y, "Z": self.Z}

    @staticmethod
    def svds(some: Sequence[SketchedGradient], k: int) -> list[TopSVD]:
        states = zip(*(sketch.state().values() for sketch in some), strict=True)
        # Sums that were rounded to bf16 hold nothing that fp32 would lose, and it takes half as long.
        widen = to_fp32 if some[0].Y.dtype is torch.bfloat16 else to_fp64
        T, L, S, Y, Z = (stack([widen(tensor) for tensor in part]) for part in states)
        return recover(T, L, S, Y, Z, k)
