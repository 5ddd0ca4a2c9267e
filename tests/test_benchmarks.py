"""The benchmarks: they time what they say they time, and their figures follow from what they timed."""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # as the programs themselves do
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import anchored
import arm_memory
import at_scale
import factorise
import fidelity
import gpu
import lora_pro
import order
import rounds
import spectra
import whitened
from cost_models import MODELS
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lora_ga_trainer import LoRAGAConfig, LoRAProAdamW, find_adapted_layers


FOLDER = Path(anchored.__file__).parent
INTERNAL = Path(factorise.__file__).parent


def run(program: Path, output: Path) -> dict[str, Any]:
    command = [sys.executable, str(program), "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text(encoding="utf-8"))


# --- rounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "median", "middle_half", "disagree"),
    [
        ([1.2], 1.2, [1.2, 1.2], False),
        ([1.0, 1.09], 1.045, [1.0, 1.09], False),
        ([1.0, 2.33, 1.1], 1.1, [1.0, 2.33], True),
        # From four rounds on a single outlier on each side tells of a neighbour, not of what is measured.
        ([1.1, 2.33, 1.12, 0.5], 1.11, [1.1, 1.12], False),
        ([1.0, 1.0, 1.3, 1.3, 1.0, 1.3, 1.0, 1.3], 1.15, [1.0, 1.3], True),
    ],
)
def test_rounds_disagree_where_the_middle_half_is_wider_than_a_tenth(ratios, median, middle_half, disagree):
    assert rounds.spread(ratios) == {
        "median": pytest.approx(median),
        "least": min(ratios),
        "most": max(ratios),
        "middle_half": middle_half,
        "rounds": len(ratios),
        "disagree": disagree,
    }


def test_rounds_are_repeated_until_they_agree_or_there_are_enough(capsys):
    def run_them(figures: list[float], least: int, most: int) -> tuple[list[float], list[str]]:
        ratios_of = lambda found: {"steady": [1.0] * len(found), "ours / floor": found}
        found = rounds.run_rounds(figures.__getitem__, ratios_of, least, most)
        return found, capsys.readouterr().out.splitlines()

    quiet = [1.1, 1.12, 1.09, 1.1, 1.1, 1.1]
    assert run_them(quiet, 3, 6) == (quiet[:3], [])
    one_neighbour = [1.1, 2.33, 1.09, 1.1, 1.1, 1.1]
    found, said = run_them(one_neighbour, 3, 6)
    assert found == one_neighbour[:4]
    said_once = "After 3 rounds there is disagreement: ours / floor 1.100 (3 rounds, 1.090 to 2.330, they disagree)."
    assert said == [f"{said_once} One more round."]
    found, said = run_them([1.0, 2.0] * 3, 3, 6)
    assert len(found) == 6
    assert len(said) == 4
    assert said[-1] == (
        "After 6 rounds, the most allowed, there is disagreement: ours / floor 1.500 (6 rounds, 1.000 to "
        "2.000, middle half 1.000 to 2.000, they disagree)."
    )


# --- the cost of a start -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_starts_hold_the_whole_gradients_of_tiny_layers_and_ratios_are_those_of_one_round(tmp_path):
    found = run(FOLDER / "probe.py", tmp_path / "found.json")
    (row,) = found["rounds"]
    layers = [m for m in MODELS["tiny"]().model.layers.modules() if isinstance(m, nn.Linear)]
    whole = sum(4 * layer.weight.numel() for layer in layers)  # fp32
    assert row["ours"]["state"] == row["peft"]["state"] == whole
    assert (row["ours"]["layers"], row["ours"]["sketched"], row["floor"]["state"]) == (len(layers), 0, 0)
    for name, of in (("ours", "floor"), ("peft", "floor"), ("peft", "ours")):
        ratio = row[name]["seconds"] / row[of]["seconds"]
        assert found["summary"][f"{name} / {of}"] == rounds.spread([ratio])
    # the whole start has the passes and the rest in it
    assert all(row[name]["seconds"] > row[name]["init_seconds"] for name in ("ours", "peft"))


# --- the cost of an anchored step ----------------------------------------------------------------------------------


def test_the_anchored_model_stores_twice_the_rank_and_keeps_its_start(tmp_path):
    ids = torch.randint(0, tiny.VOCABULARY, (1, 8))
    for kind, stored in (("plain", 4), ("anchored", 8)):
        training = anchored.Training(anchored.make_adapter(tiny.llama(), kind, 4))
        layers = find_adapted_layers(training.model)
        before = [(layer.stored_A.detach().clone(), layer.stored_B.detach().clone()) for layer in layers]
        for group in training.optimizer.param_groups:
            group["lr"] = 1e-2
        training.step(ids)
        for layer, (A, B) in zip(layers, before, strict=True):
            assert (layer.stored_A.shape[0], layer.stored_B.shape[1]) == (stored, stored)
            assert A.any()
            assert B.any()
            assert not torch.equal(layer.stored_A, A)
            moved = layer.stored_B - B
            assert moved[:, :4].any()
            assert not moved[:, 4:].any()  # B0 is frozen; a plain layer has no such half


def test_a_step_keeps_what_autograd_saves_and_inca_nothing_of_the_base(monkeypatch):
    """Of a linear layer whose factors learn: its input, and what lies between the factors."""
    base = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 8, bias=False))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(5, 32)
    with torch.no_grad():
        model.get_base_model()[0].lora_B["default"].weight.fill_(1.0)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return SimpleNamespace(loss=self.model(x).sum())

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert arm_memory.take_step(Wrapped(), {"x": x}, optimizer) == 4 * (5 * 32 + 5 * 2)
    args = argparse.Namespace(rank=2, rows=3, tokens=16)
    of_a_block = {}
    for name in ("lora", "inca"):
        kept = []
        for blocks in (2, 5):
            make = functools.partial(tiny.bert, num_hidden_layers=blocks)
            monkeypatch.setattr(arm_memory, "make_base", lambda args, make=make: make())
            kept.append(arm_memory.measure(args, name)["kept"])
        of_a_block[name] = (kept[1] - kept[0]) // 3
    # Of a block InCA keeps what its head does, whose query is one. LoRA keeps the inputs of six layers and more.
    assert of_a_block["lora"] > 4 * 3 * 16 * (5 * 32 + 48)
    head = arm_memory.make_step(args, "inca")[0].heads[0]
    h, kept = torch.randn(3, 16, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        head(h, None)
    parameters = {p.untyped_storage().data_ptr() for p in head.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    alone = sum(size for place, size in storages.items() if place not in parameters)
    assert of_a_block["inca"] == pytest.approx(alone, rel=0.2)
    with pytest.raises(ValueError, match="'lora_ga' is finished by its trainer"):
        arm_memory.measure(args, "lora_ga")


@pytest.mark.slow
def test_the_ratios_of_an_anchored_step_are_those_of_its_rounds(tmp_path):
    found = run(FOLDER / "anchored.py", tmp_path / "found.json")
    ratios = [row["anchored"] / row["plain"] for row in found["rounds"]]
    assert len(ratios) == 3
    assert found["summary"]["anchored / plain"] == statistics.median(ratios)
    assert found["summary"]["rounds"] == rounds.spread(ratios)


# --- the cost of LoRA-Pro ------------------------------------------------------------------------------------------


def test_a_throughput_is_that_of_plain_adamw_over_the_optimizers_in_the_same_round(monkeypatch):
    seconds = {"adamw": (1.0, 0.25), "lora_pro": (2.0, 1.25), "lora_pro_adamw": (4.0, 3.25)}
    calls: list[str] = []

    def one_round(model: Any, optimizer: str, ids: Any) -> tuple[float, float]:
        calls.append(optimizer)
        slow = 2.0 if len(calls) > 2 * len(seconds) else 1.0  # the machine slows down after the first round
        return tuple(slow * value for value in seconds[optimizer])

    monkeypatch.setattr(lora_pro, "one_round", one_round)
    monkeypatch.setattr(lora_pro, "make_optimizers", lambda model, chosen: {name: name for name in seconds})
    found = lora_pro.measure(None, None, 3)
    assert {name: row["throughput"] for name, row in found.items()} == {
        "adamw": 1.0,
        "lora_pro": 0.5,
        "lora_pro_adamw": 0.25,
    }
    for row in found.values():
        assert row["rounds"]["least"] == row["rounds"]["most"] == row["throughput"]
        assert row["rounds"]["rounds"] == 3
        assert row["passes_seconds"] == 1.5  # the median of 0.75, twice 1.5
    assert found["lora_pro"]["throughput_from_steps"] == (1.5 + 0.5) / (1.5 + 2.5)
    timed = [calls[i : i + 3] for i in range(3, len(calls), 3)]
    assert [some[0] for some in timed] == ["adamw", "lora_pro", "lora_pro_adamw"], "each goes first once"


def test_every_optimizer_of_the_benchmark_moves_both_factors_of_every_layer():
    model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.randint(0, tiny.VOCABULARY, (1, 8))
    with torch.no_grad():
        for layer in find_adapted_layers(model):
            layer.stored_B.normal_(std=0.02)
    optimizers = lora_pro.make_optimizers(model)
    assert [type(o) for o in optimizers.values()].count(LoRAProAdamW) == 2
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        before = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
        whole, step = lora_pro.one_round(model, optimizer, ids)
        assert whole >= step
        after = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name


@pytest.mark.slow
def test_the_lora_pro_benchmark_runs(tmp_path):
    found = run(FOLDER / "lora_pro.py", tmp_path / "found.json")["results"]
    assert list(found) == ["adamw", "lora_pro", "lora_pro_adamw", "lora_pro_adamw bf16"]
    passes, plain = found["adamw"]["passes_seconds"], found["adamw"]["step_seconds"]
    for row in found.values():
        assert row["rounds"]["least"] <= row["throughput"] <= row["rounds"]["most"]
        assert row["throughput_from_steps"] == pytest.approx((passes + plain) / (passes + row["step_seconds"]))


# --- what a GPU is measured with ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program_for_a_gpu_runs_every_part_on_a_cpu_and_continues(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--quick"]
    command += ["--output", str(tmp_path / "gpu.json")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert list(found) == ["tests", "start 1b", "steps 1b", "anchored 1b"]
    assert not [part for part in found.values() if "error" in part]
    assert "1 passed" in found["tests"]["said"]
    begin = time.monotonic()
    second = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert second.stdout == first.stdout
    assert time.monotonic() - begin < 60, "nothing is measured again"


def test_a_part_that_fails_or_takes_too_long_is_told_and_tried_again(tmp_path, monkeypatch, capsys):
    errors = ["exit 1: no memory", "ran longer than its 5 s"]
    said = iter({"seconds": 1.0, "error": error} for error in errors)
    monkeypatch.setattr(gpu, "run_part", lambda part, quick, limit: next(said))
    words = ["gpu.py", "--device", "cpu", "--quick", "--parts", "start 1b", "--output", str(tmp_path / "gpu.json")]
    for error in errors:
        monkeypatch.setattr(sys, "argv", words)
        gpu.main()
        assert f"| start 1b | failed | {error} |" in capsys.readouterr().out


def test_the_models_of_a_gpu_are_refused_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "Add --quick" in capsys.readouterr().err


def test_a_call_is_stopped_at_its_limit():
    assert gpu.call([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)["error"] == "ran longer than its 0 s"
    assert "boom" in gpu.call([sys.executable, "-c", "raise SystemExit('boom')"], 30)["error"]


# --- many processes ------------------------------------------------------------------------------------------------

AT_SCALE = """
import json, os, sys
sys.path.insert(0, {tests!r})
import tiny, torch
from peft import LoraConfig
from transformers import TrainerCallback
from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
torch.set_num_threads(1)
sent = {{"all_reduce": [], "broadcast": []}}
for name in sent:
    def counted(tensor, *args, call=getattr(torch.distributed, name), name=name, **kwargs):
        sent[name].append(tensor.numel() * tensor.element_size())
        return call(tensor, *args, **kwargs)
    setattr(torch.distributed, name, counted)
class Look(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        place = {folder!r} + "/sent" + os.environ["RANK"] + ".json"
        open(place, "w").write(json.dumps(sent))
        os._exit(0)
model = tiny.llama(hidden_size=128, intermediate_size=256, num_key_value_heads=2, num_hidden_layers=1)
trainer = LoRAGATrainer(
    model, tiny.arguments({folder!r}, per_device_train_batch_size=2, ddp_find_unused_parameters=False),
    train_dataset=tiny.causal_rows(64),
    peft_config=LoraConfig(r=1, target_modules="all-linear"),
    lora_ga_config=LoRAGAConfig(num_samples=32, min_energy_kept=None),
    callbacks=[Look()],
)
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_collectives_at_scale_are_those_of_real_processes(processes, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(AT_SCALE.format(tests=str(Path(tiny.__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shapes = [(128, 128), (64, 128), (64, 128), (128, 128), (256, 128), (256, 128), (128, 256)]
    start = at_scale.Start(shapes, r=1, samples=32, processes=processes, micro_batch=2)
    sent = json.loads((tmp_path / "sent0.json").read_text())
    assert [size for size in sent["all_reduce"] if size > 1000] == start.all_reduces()
    # DDP sends the weights in the beginning.
    assert sorted(sent["broadcast"])[-len(start.broadcasts()) :] == sorted(start.broadcasts())


def test_at_512_processes_every_layer_has_one_owner_and_two_rounds_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["at_scale.py", "--processes", "8", "512"])
    at_scale.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert [row["rounds, with the look"] for row in table] == ["8", "2"]
    assert [row["samples read"] for row in table] == ["64", "512"]
    # 8 samples a round: turns after 8 (past 1/16), 16 and 32. At 512 there is the look alone.
    assert [row["turns"] for row in table] == ["3", "1"]
    assert table[1]["broadcasts"] == str(2 * 7 * 32)
    sides = 32 * (4 * 8192 + 3 * 15104)
    assert float(table[1]["GB all-reduced"]) == pytest.approx(4 * (64 + 80) * sides / 1e9, abs=0.01)
    assert float(table[1]["of factorising, shared out"]) < float(table[0]["of factorising, shared out"])


# --- singular vectors, and what a sketch keeps ---------------------------------------------------------------------


def test_all_ways_to_factorise_find_the_same_directions():
    generator = torch.Generator().manual_seed(0)
    rank, shape = 2, (192, 256)
    G = [factorise.make_gradient(shape, generator, "cpu") for _ in range(2)]
    ways = factorise.make_ways(G, rank)
    ways["turn"]()
    together, apart = ways["recover"](), ways["recover, layer by layer"]()
    for matrix, ours, alone, (U, _, V) in zip(G, together, apart, ways["peft"](), strict=True):
        torch.testing.assert_close(ours.S, alone.S)
        best = torch.linalg.svdvals(matrix)[: 2 * rank].square().sum()
        for left, right in ((ours.U, ours.Vt.T), (U[:, : 2 * rank], V[:, : 2 * rank])):
            assert min((left.T @ matrix).square().sum(), (matrix @ right).square().sum()) > 0.8 * best


@pytest.mark.slow
def test_the_cost_of_singular_vectors_is_told_for_every_shape_and_way(tmp_path):
    found = run(INTERNAL / "factorise.py", tmp_path / "found.json")["rounds"]
    assert set(found) == {"512x1024", "1024x1024"}
    ways = {"turn", "turn, layer by layer", "recover", "recover, layer by layer", "peft"}
    assert all(len(rows) == 2 and all(set(row) == ways for row in rows) for rows in found.values())


@pytest.mark.slow
def test_the_rates_of_a_starts_parts_are_told_for_every_shape(tmp_path):
    found = run(INTERNAL / "products.py", tmp_path / "found.json")["rounds"]
    assert {name: len(rows) for name, rows in found.items()} == {"1024x512": 2}
    assert all(set(row) == {"passes", "bare", "sketch", "exact", "turn", "recover"} for row in found["1024x512"])


def test_fidelity_compares_a_sketch_with_autograds_gradient_of_the_same_samples():
    model = tiny.llama(hidden_size=256, intermediate_size=256)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        ids = torch.randint(0, tiny.VOCABULARY, (1, 8), generator=generator)
        batches.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(8) < 3, -100)})
    exact = fidelity.exact_gradients(model, batches, [8])
    found = fidelity.measure(model, batches, [1])
    assert list(found) == list(exact)
    sketched = [row for rows in found.values() for row in rows if "kept" in row]
    assert sketched, "some layers are large enough for a sketch"
    for (row,) in found.values():
        assert row["transfer"] == pytest.approx(1)  # all samples against all samples
        assert 0 <= row["halves"] <= 1 + 1e-5
    for row in sketched:
        assert 0.5 < row["kept"] <= 1 + 1e-5
        assert row["kept_A"] <= 1 + 1e-5
    (exact_G,) = [sum(halves[8]) for name, halves in exact.items() if name.endswith("1.self_attn.q_proj")]
    whole = fidelity.estimate_gradients
    config = LoRAGAConfig(num_samples=8, estimator="exact")
    with pytest.MonkeyPatch.context() as patch:  # the probe, asked for whole gradients, agrees with autograd
        patch.setattr(fidelity, "estimate_gradients", lambda trainer, _: whole(trainer, config))
        estimate = fidelity.sketched_gradients(model, batches, [8], 1)[8]
    (G,) = [e.state()["G"] for name, e in estimate.estimators.items() if name.endswith("1.self_attn.q_proj")]
    torch.testing.assert_close(G * estimate.items, exact_G, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "setup", [spectra.SETUPS[1], *(pytest.param(s, marks=pytest.mark.slow) for s in spectra.SETUPS[::2])]
)
def test_on_every_spectrum_the_report_tells_what_the_probe_keeps(setup):
    """From flat to i^-2, of the first and of the next r directions: the promise of `min_energy_kept`."""
    found = spectra.measure([setup], 1, LoRAGAConfig().min_energy_kept)
    assert any(row["kept"] < 0.7 for rows in found["one pass"].values() for row in rows), "one pass is not enough"
    for name, rows in found["with a second look"].items():
        for row in rows:
            assert row["estimate"] == pytest.approx(row["kept"], abs=0.03), name
            assert row["kept"] > (0.97 if row["twice"] else 0.9), name


def test_made_gradients_have_the_singular_values_they_are_named_after():
    setup = spectra.Setup(48, 40, 2)
    gradients, samples = spectra.make_samples(setup, 0)
    index = spectra.SPECTRA.index("i^-0.5")
    wanted = torch.arange(1.0, 41) ** -0.5
    torch.testing.assert_close(torch.linalg.svdvals(gradients[index]), wanted, rtol=1e-4, atol=1e-5)
    summed = sum(sample["dy"][index].T @ sample["x"][index] for sample in samples)
    torch.testing.assert_close(summed, gradients[index], rtol=1e-4, atol=1e-6)


def test_a_sketch_as_wide_as_the_rank_keeps_all_whitened_directions():
    """Two rows of five tokens make gradients of rank 8. What is not whitened holds less."""
    rows = whitened.rows_of(torch.arange(10) % tiny.VOCABULARY, 2, 5)
    found = whitened.compare(tiny.llama(hidden_size=128, intermediate_size=160), rows, 0.5, [10], 1)
    assert len(found["not whitened"]) == 10
    assert len(found["10"]) >= 6
    assert all(values == pytest.approx((1, 1), abs=1e-3) for values in found["10"])
    assert min(energy for _, energy in found["not whitened"]) < 0.99


def test_the_order_of_the_probe_decides_which_rows_it_sees(monkeypatch):
    monkeypatch.setattr(order, "SAMPLES", 16)
    rows = [
        {"input_ids": [1] * n, "attention_mask": [1] * n, "labels": i % 3} for i, n in enumerate([*range(4, 60)] * 4)
    ]
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    seen = {}
    for case in order.CASES:
        found = order.estimate(tiny.bert(), rows, tokenizer, 16, 0, case)
        seen[case] = list(order.SEEN)
        assert found.samples == len(seen[case]) == 16
        assert not any("classifier" in name for name in found.estimators)
    assert {label for _, label in seen["train, sorted"]} == {0}
    assert statistics.mean(n for n, _ in seen["train, group_by_length"]) > 45
    assert statistics.mean(n for n, _ in seen["random"]) < 45
    G = found.estimators["bert.pooler.dense"].state()["G"]
    best = torch.linalg.svdvals(G).square()[:16].sum().item()
    assert order.transfers(found, {"bert.pooler.dense": (G, best)}) == pytest.approx([1.0])
