"""A layer whose sketch kept too little is seen again: over the same samples, it alone, and nobody else notices."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from spy import Spy
from torch import Tensor
from transformers import Trainer

from lora_ga_trainer import GradientEstimate, LoRAGAConfig, estimate_gradients
from lora_ga_trainer.gradients import second_look
from lora_ga_trainer.gradients.accumulator import ExactGradient
from lora_ga_trainer.gradients.sketch import SketchedGradient, turn
from lora_ga_trainer.maths.recovery import recover


def made(shape: tuple[int, int], S: Tensor, seed: int = 0) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return a gradient with the singular values `S`, and 16 micro-batches that add up to it."""
    generator = torch.Generator().manual_seed(seed)
    U, V, mix = (torch.linalg.qr(torch.randn(n, len(S), generator=generator)).Q for n in (*shape, 1024))
    dy, x = (mix * S) @ U.T, mix @ V.T
    return (U * S) @ V.T, list(zip(x.chunk(16), dy.chunk(16), strict=True))


def true_share(G: Tensor, U: Tensor, Vt: Tensor, low: int, high: int) -> float:
    best = torch.linalg.svdvals(G)[low:high].square().sum()
    held = (U[:, low:high].T @ G).square().sum(), (G @ Vt[low:high].T).square().sum()
    return (min(held) / best).item()


@pytest.mark.parametrize(("power", "room"), [(0.35, 0.04), (0.5, 0.04), (1.0, 0.02), (2.0, 0.01)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimate_is_the_truth_of_both_halves(power: float, room: float, seed: int) -> None:
    shape, r = (448, 384), 4
    G, data = made(shape, torch.arange(1.0, 385) ** -power, seed)
    sketch = SketchedGradient(shape, 8 * r, seed)
    for number, (x, dy) in enumerate(data):
        if number in (1, 4, 8):
            turn([sketch])
        sketch.add(x, dy, 1.0)
    top = sketch.svd(2 * r)
    for low, high in ((0, r), (r, 2 * r)):
        assert top.kept(low, high) == pytest.approx(true_share(G, top.U, top.Vt, low, high), abs=room)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_flat_spectrum_is_not_flattered(seed: int) -> None:
    """An estimate that trusts what the sketch says of itself would be above by .3."""
    shape, r = (448, 384), 4
    generator = torch.Generator().manual_seed(seed)
    data = [[torch.randn(64, n, generator=generator) for n in reversed(shape)] for _ in range(64)]
    sketch = SketchedGradient(shape, 8 * r, seed)
    for number, (x, dy) in enumerate(data):
        if number in (4, 16, 32):
            turn([sketch])
        sketch.add(x, dy, 1.0)
    top, G = sketch.svd(2 * r), sum(dy.T @ x for x, dy in data)
    assert top.kept(0, 2 * r) < true_share(G, top.U, top.Vt, 0, 2 * r) + 0.1 < 0.7


def make(folder: Any) -> Trainer:
    args = tiny.arguments(folder)
    trainer = Trainer(tiny.with_lora(tiny.llama(hidden_size=64), r=1), args, train_dataset=tiny.causal_rows(24))
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    return trainer


def probed(folder: Any, **config: Any) -> tuple[Any, int]:
    """Return the estimate, and how many samples passed through the model."""
    trainer, passed = make(folder), [0]
    compute, before = trainer.compute_loss, Spy(trainer)

    def counted(*args: Any, **kwargs: Any) -> Any:
        passed[0] += len(args[1]["input_ids"])
        return compute(*args, **kwargs)

    trainer.compute_loss = counted
    estimate = estimate_gradients(trainer, LoRAGAConfig(num_samples=16, **config))
    before.assert_same(Spy(trainer))
    return estimate, passed[0]


@pytest.mark.parametrize("wide", [True, False])
def test_failing_layers_are_seen_whole_with_their_own_directions(wide: bool, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(second_look, "is_sketched", lambda shape, k: wide)
    monkeypatch.setattr(second_look, "_ROOM", 0)
    exact, _ = probed(tmp_path, estimator="exact")
    first, alone = probed(tmp_path, sketch_size=2, min_energy_kept=None)
    again, both = probed(tmp_path, sketch_size=2)
    assert not first.seen_twice
    assert again.seen_twice
    assert both == 2 * alone, "one more pass, for all of them"
    assert (again.samples, again.items, again.loss) == (exact.samples, exact.items, exact.loss)
    for name, found in again.estimators.items():
        G, state = exact.estimators[name].G, found.state()
        if name not in again.seen_twice:
            for key, value in first.estimators[name].state().items():
                assert torch.equal(value, state[key]), name
        elif wide:
            assert found.directions == 4
            assert not state["S"].any()
            torch.testing.assert_close(state["Y"], G @ state["Omega"], rtol=1e-4, atol=1e-6 * G.norm().item())
            torch.testing.assert_close(state["Z"], G.T @ state["Psi"], rtol=1e-4, atol=1e-6 * G.norm().item())
            assert not torch.equal(state["Omega"][:, 4:], first.estimators[name].Omega[:, 2:])
        else:
            assert isinstance(found, ExactGradient)
            torch.testing.assert_close(found.G, G, rtol=1e-4, atol=1e-7 * G.norm().item())


def test_where_there_is_room_whole_gradients_are_kept(tmp_path: Any, monkeypatch: Any) -> None:
    """Also of layers that a second sketch would be worth it for: on flat spectra it would not be enough."""
    monkeypatch.setattr(second_look, "is_sketched", lambda shape, k: True)
    monkeypatch.setattr(second_look, "_ROOM", 1000)
    exact, _ = probed(tmp_path, estimator="exact")
    again, _ = probed(tmp_path, sketch_size=2)
    assert again.seen_twice
    for name in again.seen_twice:
        torch.testing.assert_close(
            again.estimators[name].state(), exact.estimators[name].state(), rtol=1e-4, atol=1e-8
        )


def test_what_a_second_sketch_is_not_worth_it_for_is_kept_whole_without_room_too(monkeypatch: Any) -> None:
    monkeypatch.setattr(second_look, "_ROOM", 0)
    shapes = {"wide": (512, 640), "narrow": (512, 150)}  # the second is less than 12 k wide
    accumulators = {name: SketchedGradient(shape, 16) for name, shape in shapes.items()}
    layers = [SimpleNamespace(name=name, shape=shape, matrices=[name]) for name, shape in shapes.items()]
    assert second_look.kept_whole(layers, GradientEstimate(accumulators)) == {"narrow"}


def test_the_worst_layers_come_first(tmp_path: Any, monkeypatch: Any) -> None:
    order: list[str] = []
    choose = second_look.kept_whole

    def watched(layers: Any, estimate: GradientEstimate) -> set[str]:
        order.extend(layer.name for layer in layers)
        return choose(layers, estimate)

    monkeypatch.setattr(second_look, "kept_whole", watched)
    probed(tmp_path, sketch_size=2)
    first, _ = probed(tmp_path, sketch_size=2, min_energy_kept=None)
    shares = [min(second_look.energy_kept(first.estimators[name].svd(2), 1)) for name in order]
    assert len(set(shares)) > 2
    # Shares go from process to process as millionths.
    assert all(before < after + 2e-6 for before, after in itertools.pairwise(shares))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [2, 3, 4, 6, 8])
def test_a_second_look_never_takes_more_than_its_room(room: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(second_look, "_ROOM", room)
    shape, count = (2048, 2048), 10
    accumulators = {f"layer {i}": SketchedGradient(shape, 32) for i in range(count)}
    for sketch in accumulators.values():
        sketch.compute_in(dtype)
    layers = [SimpleNamespace(name=name, shape=shape, matrices=[name]) for name in reversed(accumulators)]
    whole = second_look.kept_whole(layers, GradientEstimate(accumulators))
    bytes_of = lambda e: sum(part.numel() * part.element_size() for part in e.held() if part is not e.S)
    first, again = bytes_of(accumulators["layer 0"]), SketchedGradient(shape, 64)
    again.compute_in(dtype)
    taken = 4 * 2048**2 * len(whole) + bytes_of(again) * (count - len(whole))
    assert taken <= room * count * first
    assert len(whole) == count or taken + 4 * 2048**2 > (room - 0.5) * count * first, "no more could have been kept"
    assert whole == {layer.name for layer in layers[: len(whole)]}, "the worst come first"


def test_without_need_of_it_there_is_no_second_pass(tmp_path: Any) -> None:
    estimate, passed = probed(tmp_path, sketch_size=2, min_energy_kept=1e-6)
    assert passed == probed(tmp_path, sketch_size=2, min_energy_kept=None)[1]
    assert not estimate.seen_twice
    assert estimate.tops, "the triplets that were looked at are kept for the start"


def test_a_second_look_is_nearer_to_the_best_directions() -> None:
    shape, r = (448, 384), 4
    G, _ = made(shape, torch.arange(1.0, 385) ** -0.35)
    generator = torch.Generator().manual_seed(3)
    U = torch.linalg.qr(G @ G.T @ torch.randn(448, 64, generator=generator)).Q
    V = torch.linalg.qr(G.T @ U).Q
    w, z = torch.randn(384, 16, generator=generator), torch.randn(448, 16, generator=generator)
    Omega, Psi = torch.cat([V, w], 1), torch.cat([U, z], 1)
    parts = [part[None].double() for part in (Omega, Psi, torch.zeros(64), G @ Omega, G.T @ Psi)]
    (top,) = recover(*parts, 2 * r)
    assert top.measured is not None
    assert top.measured.settled
    for low, high in ((0, r), (r, 2 * r)):
        true = true_share(G, top.U, top.Vt, low, high)
        assert true > 0.95
        assert top.kept(low, high) == pytest.approx(true, abs=0.03)


@pytest.mark.parametrize("value", [0, 1.5, -0.1, "0.9", True])
def test_a_share_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="min_energy_kept"):
        LoRAGAConfig(min_energy_kept=value)
