"""LoRA-Pro's own optimizer: AdamW on the equivalent gradient of the full weight, stepped by the factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..adapters.layer import AdaptedLayer
from ..engines.parameters import row_shard
from ..maths.lora_pro import FLOOR, GramEigen
from .batches import PairBatch, batch_pairs, each_corrected, require_finite, require_floor
from .moments import equivalent_gradient, project_step, store_moment
from .pairs import pairs_with_gradients, trained_pairs


# What the moments of pairs can be kept in, by the name that a config gives it.
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Entries of W that are worked on at once. Large enough that a launch costs nothing beside its work, small enough that
# the three fp32 buffers of a step are 200 MB.
_CHUNK = 2**24
_MOMENTS = ("exp_avg", "exp_avg_sq")


class LoRAProAdamW(Optimizer):
    """
    Move `W + s B A` as AdamW would move `W`, as closely as the rank allows (LoRA-Pro, arXiv 2407.18242, Algorithm 1).

        optimizer = LoRAProAdamW(model.parameters(), model, lr=2e-5)

    Its state is two buffers of the shape of `W` for every adapted layer: 8 bytes for each entry of `W` in fp32, 4 in
    bf16, on the device or (`offload_state`) in the host's memory. Where that is too much use [`LoRAProOptimizer`],
    which keeps nothing. A step needs a further 200 MB, or three fp32 copies of the largest layer if that is more.
    Its learning rate is one of full fine-tuning, not of LoRA.

    In each step, for every pair: `G~ = s (B dA + dB A)`, the equivalent gradient of the corrected gradients; Adam's
    moments of `G~` and its step `U`, with the bias corrections of a step count that starts at 1; the weight decay
    `U + weight_decay * s B A`, of the net update and not of `A` and `B` each (in an anchored adapter
    `s (B A - B0 A0)`; the frozen `W` is never decayed); and the factors' step along the nearest `s (B dA + dB A)`
    to that. Near `B = 0` both are damped, see [`correct_gradients`], so `A` moves in proportion to the rate from the
    first step. Parameters outside pairs (a head, biases, DoRA's magnitude) get torch's AdamW.

    Clip before the step; see [`LoRAProOptimizer`]. A pair of which a factor has no gradient is skipped.

    Args:
        params: parameters or groups of them; `A` and `B` of a pair belong to one group or to groups of equal options.
        model: the model that holds the factors.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`, with no decay by default.
        state_dtype: of the moments of pairs, `torch.float32` or `torch.bfloat16`. bf16 is rounded up or down with a
            probability (of a fixed sequence in the step count), or a change of 0.1% in a step would always be lost.
        offload_state: keep the moments of pairs in the host's memory.
        error_if_nonfinite: raise on gradients that are not finite instead of passing them on, as torch does.
        floor: of [`correct_gradients`]. 0 is the theorem as it stands, whose first step from `B = 0` rewrites `A`.

    Raises:
        `ValueError`: naming an option out of range, or a parameter that can't be corrected.
    """

    def __init__(
        self,
        params: Any,
        model: nn.Module,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
        offload_state: bool = False,
        error_if_nonfinite: bool = False,
        floor: float = FLOOR,
    ) -> None:
        require_floor(floor, "LoRAProAdamW")
        if state_dtype not in STATE_DTYPES.values():
            raise ValueError(f"LoRAProAdamW: state_dtype={state_dtype} is not one of torch.float32, torch.bfloat16.")
        self.model = model
        self.state_dtype = state_dtype
        self.offload_state = offload_state
        self.error_if_nonfinite = error_if_nonfinite
        self.floor = floor
        self.pairs: list[AdaptedLayer] = []  # until all groups have been added
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._find_pairs()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and look for pairs again; a group that can't be stepped is not added."""
        super().add_param_group(param_group)
        try:
            _require_options(self.param_groups[-1])
            if self.pairs:
                self._find_pairs()
        except ValueError:
            self.param_groups.pop()
            raise

    def _find_pairs(self) -> None:
        self.pairs = trained_pairs(self.model, self.param_groups, "LoRAProAdamW")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Load a state. The moments take this optimizer's `state_dtype`, on the device where it keeps them.

        Raises:
            `ValueError`: naming the pair whose moments have the shape of another optimizer's.
        """
        saved_groups = [group["params"] for group in state_dict["param_groups"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = dict(zip(map(id, own), (key for group in saved_groups for key in group), strict=False))
        moments: dict[Tensor, dict[str, Tensor]] = {}
        for pair in self.pairs:
            state = state_dict["state"].get(saved.get(id(pair.lora_A.weight)), {})
            for key in _MOMENTS:
                if key in state:
                    _require_shape(pair, key, state[key])
                    moments.setdefault(pair.lora_A.weight, {})[key] = state[key]
        super().load_state_dict(state_dict)
        # torch has cast them to the dtype and device of lora_A, which rounds fp32 moments of bf16 factors. So they are
        # taken from the state that was passed.
        for parameter, state in moments.items():
            for key, value in state.items():
                self.state[parameter][key] = value.detach().to(**self._moment_options(parameter), copy=True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step. A `closure` is called once, before anything else."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        device = self.pairs[0].lora_A.weight.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            self._step_pairs()
            self._step_others()
        return loss

    def _step_pairs(self) -> None:
        ready = pairs_with_gradients(self.pairs, "LoRAProAdamW")
        batches: list[PairBatch] = []
        groups: dict[int, dict[str, Any]] = {}
        for group in self.param_groups:
            members = {id(parameter) for parameter in group["params"]}
            found = batch_pairs((pair for pair in ready if id(pair.lora_A.weight) in members), most=_CHUNK)
            batches += found
            groups.update((id(batch), group) for batch in found)
        if self.error_if_nonfinite:
            require_finite(batches, "LoRAProAdamW")
        for batch, steps_A, steps_B in each_corrected(
            batches, lambda b, eigen: self._step_of(b, eigen, groups[id(b)]), self.floor
        ):
            torch._foreach_sub_(tuple(batch.weights_A), tuple(steps_A))
            torch._foreach_sub_(tuple(batch.weights_B), tuple(steps_B))

    def _step_of(
        self, batch: PairBatch, eigen: GramEigen, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:  # lr dA (L, r, in), lr dB (L, out, r)
        dA, dB = self._correct_moments(batch, eigen, group)
        lr = float(group["lr"])
        return lr * dA, lr * dB

    def _correct_moments(
        self, batch: PairBatch, eigen: GramEigen, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:  # dA (L, r, in), dB (L, out, r)
        beta1, beta2 = group["betas"]
        counts = self._count(batch)
        bias1, bias2 = (
            torch.tensor([1 - beta**t for t in counts], dtype=batch.A.dtype, device=batch.A.device).view(-1, 1, 1)
            for beta in (beta1, beta2)
        )
        first, second = (self._stacked(batch, key) for key in _MOMENTS)
        shard = row_shard(batch.pairs[0].weight)
        G = equivalent_gradient(batch, eigen, None if shard is None else shard.mine)
        # m <- beta1 m + (1 - beta1) G~, v <- beta2 v + (1 - beta2) G~^2
        m = first.to(G.device, G.dtype, non_blocking=True).lerp_(G, 1 - beta1)
        v = second.to(G.device, G.dtype, non_blocking=True).lerp_(G.mul_(G), 1 - beta2)
        # U = (m / bias1) / (sqrt(v / bias2) + eps), into the buffer of G, which is free by now. What is the same all
        # over a layer, sqrt(bias2) / bias1, is left to the small factors: one pass over U less.
        U = torch.div(m, torch.sqrt(v, out=G).add_(group["eps"] * bias2.sqrt()), out=G)
        for kept, value in ((first, m), (second, v)):
            # `to` made a copy only where the dtype or the device is another one. Else the update was in place.
            if kept is not value:
                store_moment(kept, value, counts)
        return project_step(batch, eigen, U, bias2.sqrt() / bias1, group["weight_decay"], shard)

    def _count(self, batch: PairBatch) -> list[float]:
        """Count this step for every pair. Pairs may have missed some, so each has a count of its own."""
        for A in batch.weights_A:
            if "step" not in self.state[A]:
                self.state[A]["step"] = torch.tensor(0.0)
        counts = [self.state[A]["step"] for A in batch.weights_A]
        torch._foreach_add_(counts, 1.0)
        return [count.item() for count in counts]

    def _moment_options(self, parameter: Tensor) -> dict[str, Any]:
        """Return dtype and device of a pair's moments. fp64 factors keep theirs in fp64 where fp32 is asked for."""
        keep = parameter.dtype == torch.float64 and self.state_dtype == torch.float32
        return {
            "dtype": torch.float64 if keep else self.state_dtype,
            "device": torch.device("cpu") if self.offload_state else parameter.device,
        }

    def _stacked(self, batch: PairBatch, key: str) -> Tensor:  # (L, out, in)
        """
        Return one moment of a batch as a single buffer, of which the entries of `state` are slices.

        Where the base weight is spread over processes by rows, so is its moment: the buffer holds this process's rows.
        """
        factors = batch.weights_A
        slices = [self.state[A].get(key) for A in factors]
        shape = (len(slices), *_moment_shape(batch.pairs[0]))
        # torch keeps state by parameter, a step wants one tensor for all layers of a shape. Stacking would copy both
        # moments, the largest tensors here, twice in every step. So the buffer is the memory, and `state` holds views
        # of it: `state_dict` and whoever else reads the state see a moment for each parameter as usual.
        buffer = _buffer_of(slices, shape)
        if buffer is not None:
            return buffer
        # In the first step there are no moments yet. Later the views are gone whenever a state was loaded, or when the
        # batch has other members than before (a pair without a gradient): gather what there is into a new buffer.
        options = self._moment_options(factors[0])
        # Copies between a GPU and the host overlap with the computation only from pinned memory.
        pin = options["device"].type == "cpu" and factors[0].is_cuda
        buffer = torch.zeros(shape, **options, pin_memory=pin)
        for i, (A, part) in enumerate(zip(factors, slices, strict=True)):
            if part is not None:
                buffer[i].copy_(part)
            self.state[A][key] = buffer[i]
        return buffer

    def _step_others(self) -> None:
        # Looked up in each step: an engine may have put other parameters into the model.
        factors = {p for pair in self.pairs for p in (pair.lora_A.weight, pair.lora_B.weight)}
        for group in self.param_groups:
            others = [p for p in group["params"] if p.grad is not None and p not in factors]
            for p in others:
                if not self.state[p]:
                    self.state[p].update(step=torch.tensor(0.0), **{key: torch.zeros_like(p) for key in _MOMENTS})
            beta1, beta2 = group["betas"]
            first, second = ([self.state[p][key] for p in others] for key in _MOMENTS)
            adamw(
                others,
                [p.grad for p in others],
                first,
                second,
                max_exp_avg_sqs=[],
                state_steps=[self.state[p]["step"] for p in others],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _buffer_of(slices: list[Tensor | None], shape: tuple[int, ...]) -> Tensor | None:
    """Return the buffer of this shape whose entries, in this order, are exactly these slices; `None` if none is."""
    first = slices[0]
    if first is None or first._base is None or first._base.shape != shape:
        return None
    buffer = first._base
    # Being a view of the buffer is not enough: the slices of a batch that lost a member, or changed the order, are
    # views of an older one.
    in_place = (part is not None and part.data_ptr() == buffer[i].data_ptr() for i, part in enumerate(slices))
    return buffer if all(in_place) else None


def _moment_shape(pair: AdaptedLayer) -> tuple[int, int]:
    """Return `(out, in)`, or the part of it that this process keeps."""
    (out_features, in_features), shard = pair.shape, row_shard(pair.weight)
    return (out_features if shard is None else len(range(out_features)[shard.mine])), in_features


def _require_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ValueError(f"LoRAProAdamW: {name}={group[name]} must be at least 0.")
    if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ValueError(f"LoRAProAdamW: betas={group['betas']} must be two numbers of at least 0 and below 1.")


def _require_shape(pair: AdaptedLayer, key: str, value: Tensor) -> None:
    expected = _moment_shape(pair)
    if tuple(value.shape) != expected:
        raise ValueError(
            f"LoRAProAdamW: {key} of {pair.name}, adapter {pair.adapter!r}, has shape {tuple(value.shape)} in the "
            f"state, the layer's weight (or this process's rows of it) has {expected}. The state is another "
            "optimizer's or another model's: resume with the optimizer that wrote it."
        )
