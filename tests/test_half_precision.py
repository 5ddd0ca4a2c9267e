"""Half precision: products where a CPU has no instructions for it, and sums that are kept in bf16."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import arguments, causal_rows, llama, with_lora
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.engines import products
from lora_ga_trainer.engines.collectives import sum_over_processes
from lora_ga_trainer.gradients import second_look
from lora_ga_trainer.gradients.accumulator import ExactGradient, forget_shared_matrices
from lora_ga_trainer.gradients.estimate import GradientEstimate
from lora_ga_trainer.gradients.moments import MomentSums
from lora_ga_trainer.gradients.rows import OneHot
from lora_ga_trainer.gradients.sketch import SketchedGradient, make_accumulators, turn
from lora_ga_trainer.maths.rounding import round_to_bf16


PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "matmul", "linear", "mv", "addmv"}
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CPU has no instructions for half precision."""
    monkeypatch.setattr(products, "lacks_instructions", lambda dtype, device: dtype in HALF)


class Copies(TorchDispatchMode):
    """Watches the fp32 copies that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref] = []
        self.most = self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy":
            self.count += 1
            self.alive = [found for found in self.alive if found() is not None] + [weakref.ref(out)]
            self.most = max(self.most, sum(found().nbytes for found in self.alive))
        return out


@pytest.mark.parametrize("dtypes", [HALF[:1] * 2, HALF[1:] * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize(("n", "a", "b"), [(100, 70, 12), (3, 500, 300), (1000, 4, 4), (1, 1, 1), (0, 5, 3)])
def test_products_in_blocks_are_fp32_products_within_their_bound(dtypes, n, a, b, without_instructions, monkeypatch):
    monkeypatch.setattr(products, "BLOCK_BYTES", 4096)
    generator = torch.Generator().manual_seed(0)
    left, right, other = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape, dtype in zip(((n, a), (a, b), (n, b)), (*dtypes, dtypes[0]), strict=True)
    )
    total = torch.full((a, b), 0.5)
    with Copies() as copies:
        found = products.product(left, right)
    with Copies() as more_copies:
        products.add_transposed_product(total, left, other, 0.25)
    error = lambda true: {"rtol": 1e-6, "atol": 1e-5 * max(1.0, true.abs().max().item() if true.numel() else 1.0)}
    true = left.double() @ right.double()
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), true, **error(true))
    true = 0.5 + 0.25 * left.double().T @ other.double()
    torch.testing.assert_close(total.double(), true, **error(true))
    assert copies.most <= max(4096, 4 * (b + 1))
    assert more_copies.most <= max(4096, 2 * 4 * (a + b))
    if n * a > 4096:
        assert copies.count > 2
        assert more_copies.count > 2


def test_where_there_are_instructions_products_are_torchs_to_the_bit(monkeypatch):
    monkeypatch.setattr(products, "lacks_instructions", lambda dtype, device: False)
    left, right, other = (torch.randn(*shape).bfloat16() for shape in ((40, 30), (30, 20), (40, 20)))
    total = torch.zeros(30, 20)
    with Copies() as copies:
        assert torch.equal(products.product(left, right), left @ right)
        products.add_transposed_product(total, left, other, 0.5)
    assert torch.equal(total, torch.zeros(30, 20).add_(left.T @ other, alpha=0.5))
    assert copies.count == 0


def test_fp32_and_other_devices_never_go_through_blocks():
    for dtype in (torch.float32, torch.float64):
        assert not products.lacks_instructions(dtype, torch.device("cpu"))
    for dtype in HALF:
        assert not products.lacks_instructions(dtype, torch.device("cuda"))


def test_a_cpu_without_the_instructions_is_found():
    """oneDNN takes the instructions it may use from the environment."""
    load = (
        "import importlib.util as u, torch\n"
        f"spec = u.spec_from_file_location('products', {products.__file__!r})\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.lacks_instructions(torch.bfloat16, torch.device('cpu')))"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "True"


def test_a_torch_without_onednn_counts_as_lacking_them(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products.lacks_instructions(torch.bfloat16, torch.device("cpu"))


def pairs(dtype: torch.dtype, batches: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    spectrum = 1 / (1 + torch.arange(200.0))
    U, V = torch.linalg.qr(draw(256, 200)).Q, torch.linalg.qr(draw(320, 200)).Q
    return [((draw(64, 200) @ V.T).to(dtype), ((draw(64, 200) * spectrum) @ U.T).to(dtype)) for _ in range(batches)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("one_hot", [False, True])
def test_accumulators_sum_the_same_without_instructions(dtype, one_hot, without_instructions):
    """Against fp64 sums of the rounded rows and the rounded test matrices."""
    sketch, exact = SketchedGradient((256, 320), k=32), ExactGradient((256, 320))
    moments = MomentSums((256, 320), frozenset({"second_moments", "covariance_directions"}), 2, 0)
    G = torch.zeros(256, 320, dtype=torch.float64)
    squares = torch.zeros(320, dtype=torch.float64)
    for number, (x, dy) in enumerate(pairs(dtype)):
        rows = OneHot(torch.arange(64) + 5 * number) if one_hot else x
        whole = torch.eye(320, dtype=torch.float64)[rows.ids] if one_hot else x.double()
        for accumulator in (sketch, exact):
            accumulator.add(rows, dy, 0.5)
        moments.add(rows, dy, 0.5, 1.0)
        G += 0.5 * dy.double().T @ whole
        squares += whole.square().sum(dim=0)
    torch.testing.assert_close(exact.G.double(), G, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.squares[1].double(), squares, rtol=1e-5, atol=1e-5)
    state = {name: tensor.double() for name, tensor in sketch.state().items()}
    # fp32 sums, or those of bf16: eight roundings of 2^-8 at most.
    error = 1e-6 if dtype is torch.float16 else 0.01
    for found, true in ((state["Y"], G @ state["Omega"]), (state["Z"], G.T @ state["Psi"])):
        assert (found - true).norm() < error * true.norm()


class OurProducts(TorchDispatchMode):
    """Notes products of half precision that the package itself asks for, not the passes of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if func.overloadpacket.__name__ in PRODUCTS and any(tensor.dtype in HALF for tensor in tensors):
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename and "run_backward" not in frame.f_code.co_name:
                frame = frame.f_back
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            # The layers of adapters are part of the model's passes, and `sharing` looks on while the model computes.
            passes = any(name in place for name in ("/adapters/storage.py", "/gradients/sharing.py"))
            if "/lora_ga_trainer/" in place and not passes:
                self.found.add(place.partition("/lora_ga_trainer/")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {"sketch_size": 2, "min_energy_kept": None},
        {"estimator": "exact"},
        {"sketch_size": 2, "min_energy_kept": 1.0},
        {"sketch_size": 2, "min_energy_kept": None, "correction": "lora_pro"},
        {"sketch_size": 2, "min_energy_kept": None, "correction": "lora_pro_adamw"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("lacking", [True, False])
def test_no_product_of_ours_is_of_half_precision_where_that_is_slow(settings, lacking, tmp_path, monkeypatch):
    """Where it is not slow some are, or the test could not fail."""
    monkeypatch.setattr(products, "lacks_instructions", lambda dtype, device: lacking and dtype in HALF)
    # So a second look sketches again, and keeps no whole gradient.
    monkeypatch.setattr(second_look, "_ROOM", 0)
    monkeypatch.setattr(second_look, "is_sketched", lambda shape, k: True)
    model = with_lora(llama().bfloat16(), r=1)
    rows = causal_rows(8)
    config = LoRAGAConfig(num_samples=8, **settings)
    trainer = LoRAGATrainer(model, arguments(tmp_path, max_steps=2), train_dataset=rows, lora_ga_config=config)
    with OurProducts() as seen:
        trainer.train()
    assert any(layer.sketched for layer in trainer.lora_ga_report.layers) == ("sketch_size" in settings)
    assert bool(seen.found) != lacking, seen.found


@pytest.mark.parametrize("value", [1.0, -3.3, 1.1e-30, 2.7e30, 0.0])
def test_rounding_is_right_in_the_mean(value):
    number = torch.tensor([value])
    found = torch.stack([round_to_bf16(number.clone(), step) for step in range(1, 1025)])
    assert torch.equal(found, found.bfloat16().float())
    unit = max(2.0**-7 * number.abs().item(), 1e-45)
    assert (found - number).abs().max() < unit
    assert abs((found.double() - number.double()).mean().item()) < unit / 200
    # One number for each part.
    parts = round_to_bf16(number.repeat(3, 1), torch.arange(1, 4, dtype=torch.int32)[:, None])
    assert torch.equal(parts, found[:3])


def test_rounding_keeps_what_is_not_finite():
    """The bits of a NaN may be all ones, to which nothing can be added."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32)
    for step in range(1, 50):
        assert not round_to_bf16(bits.clone().view(torch.float32), step).isfinite().any()


def test_sums_that_are_kept_in_bf16_do_not_stall():
    """1,024 equal contributions: to nearest, a bf16 running sum stalls at 256 of them."""
    x, dy = (torch.ones(1, n, dtype=torch.bfloat16) for n in (320, 256))
    sketch = SketchedGradient((256, 320), k=32)
    for _ in range(1024):
        sketch.add(x, dy, 1.0)
    assert sketch.Y.dtype is sketch.Z.dtype is torch.bfloat16
    state = {name: tensor.double() for name, tensor in sketch.state().items()}
    # One product is rounded to bf16 each time, 2^-8 of it, alike.
    true = 1024 * state["Omega"].sum(dim=0).expand(256, -1)
    torch.testing.assert_close(state["Y"], true, rtol=0.02, atol=0)


def test_bf16_sums_keep_what_fp32_sums_do(monkeypatch):
    """What rounding the sums adds is far below what the sketch misses: the same data, sums in bf16 and in fp32."""
    data = pairs(torch.bfloat16, batches=64)
    G = sum(dy.double().T @ x.double() for x, dy in data).float()
    best = torch.linalg.svdvals(G).square()
    kept = []
    for wide in (False, True):
        sketch = SketchedGradient((256, 320), k=32)
        if wide:
            monkeypatch.setattr(sketch, "compute_in", lambda dtype, self=sketch: compute_in_and_widen(self, dtype))
        for number, (x, dy) in enumerate(data):
            if number in (4, 16, 32):
                turn([sketch])
            sketch.add(x, dy, 1.0)
        assert sketch.Y.dtype is (torch.float32 if wide else torch.bfloat16)
        top = sketch.svd(8)
        held = [(top.U[:, i : i + 4].T @ G).square().sum() / best[i : i + 4].sum() for i in (0, 4)]
        kept.append((*(share.item() for share in held), top.kept(0, 4), top.kept(4, 8)))
    assert min(kept[1]) > 0.9
    assert kept[0] == pytest.approx(kept[1], abs=2e-3)


def compute_in_and_widen(sketch: SketchedGradient, dtype: torch.dtype) -> None:
    SketchedGradient.compute_in(sketch, dtype)
    sketch.Y, sketch.Z = sketch.Y.float(), sketch.Z.float()


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_state_at_hidden_size_2048_is_an_eighth_of_the_gradients(dtype, bytes_each):
    """Llama's layers with a quarter as many key and value heads; each holds `2 k + 16` numbers a row and a column."""
    shapes = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]
    layers = [(f"{block}.{number}", shape) for block in range(4) for number, shape in enumerate(shapes)]
    forget_shared_matrices()
    accumulators = make_accumulators(layers, LoRAGAConfig(), rank=8)
    for sketch in accumulators.values():
        sketch.compute_in(dtype)
        sketch.await_owner()
    whole = sum(out * of_in for _, (out, of_in) in layers) * bytes_each
    found = GradientEstimate(estimators=accumulators).nbytes
    sides = sum(out + of_in for _, (out, of_in) in layers)
    shared = 16 * (2048 + 5632 + 512 + 2048 + 5632)  # one for each width of an input, and of an output
    assert found == bytes_each * (sides * (2 * 64 + 16) + shared) + len(layers) * 64 * 4
    assert found < whole / 8


def test_processes_add_up_in_fp32_what_they_keep_in_less(monkeypatch):
    """A process without samples keeps zeros in fp32 where others have bf16; both send fp32."""
    sent = []

    def add_twice(flat: Tensor) -> None:
        sent.append(flat.dtype)
        flat.add_(flat.clone())

    monkeypatch.setattr(torch.distributed, "all_reduce", add_twice)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=2, device=torch.device("cpu")))
    tensors = [torch.ones(3, dtype=torch.bfloat16), torch.ones(2), torch.ones((), dtype=torch.float64)]
    assert sum_over_processes(trainer, tensors) == 5 * 4 + 8
    assert sent == [torch.float32, torch.float64]
    assert [tensor.dtype for tensor in tensors] == [torch.bfloat16, torch.float32, torch.float64]
    assert all((tensor == 2).all() for tensor in tensors)
