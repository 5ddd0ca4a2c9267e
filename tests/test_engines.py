"""
One start on every engine: two real processes (gloo, CPU) against one, under DDP, FSDP2, ZeRO-2 and ZeRO-3.

`tests/engine_run.py` trains; each of its launches computes what several tests look at.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
import transformers
from engine_run import (
    KILLED,
    PARTS,
    ROWS,
    SAVED,
    STEPS,
    Picture,
    bare_part,
    directions_part,
    embedding_part,
    frozen_part,
    main_part,
    moments_part,
    ranks_part,
    trained,
)
from optional import require
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from lora_ga_trainer import analyse_adapter
from lora_ga_trainer.adapters.find import find_lora_layers


# DeepSpeed builds its CPU optimizer at its first use, which takes more than a minute.
ZERO = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3")]
ENGINES = ["ddp", "fsdp2", *ZERO]
RESUMABLE = [
    ("ddp", "lora_pro"),
    ("ddp", "B alone"),
    ("zero2", "lora_pro"),
    ("zero2", "B alone"),
    ("zero3", "lora_pro"),
    ("zero2", "B alone, model_init"),
    ("zero3", "B alone"),
    ("zero3", "B alone, callback"),
]
SCRIPT = Path(__file__).with_name("engine_run.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def skip_what_the_libraries_lack(engine: str) -> None:
    """Both came after the oldest releases that the package runs with."""
    if engine == "fsdp2" and "fsdp_size" not in inspect.signature(DistributedConfig).parameters:
        pytest.skip(f"transformers {transformers.__version__} has no DistributedConfig(fsdp_size=...)")
    if engine == "fully_shard" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"fully_shard of torch {torch.__version__} does not run on a CPU")


def launch(engine: str, part: str, folder: Path) -> subprocess.CompletedProcess[str]:
    skip_what_the_libraries_lack(engine)
    if engine.startswith("zero"):
        require("deepspeed")
        require("ninja")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), str(SCRIPT), engine, part, str(folder)]
    places = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    places["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=places, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    place = tmp_path_factory.mktemp("engines")
    tiny.llama(hidden_size=96, intermediate_size=128).save_pretrained(place / "base")
    return place


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return main_part("single", folder)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: Any, folder: Path) -> Iterator[str]:
    ended = launch(request.param, "main", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return request.param


@pytest.fixture(scope="module")
def ranks(engine: str, folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / engine / f"main-{rank}.pt", weights_only=False) for rank in range(2)]


def test_the_engine_ran_on_two_processes(engine: str, ranks: list[dict[str, Any]]) -> None:
    kind = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}.get(engine)
    for found in ranks:
        for run in found.values():
            assert run["processes"] == 2
            assert kind is None or run["engine"] == kind
            assert run["sharded"] == (engine in ("fsdp2", "zero3")), "the base must really be in parts"


def gradients(folder: Path, engine: str) -> dict[str, Tensor]:
    return {name: G.double() for name, G in load_file(folder / f"{engine}.safetensors").items()}


def test_the_gradient_is_that_of_one_process(engine: str, folder: Path, single: Any, ranks: Any) -> None:
    ours, one = gradients(folder, engine), gradients(folder, "single")
    assert ours.keys() == one.keys()
    for name, G in one.items():
        assert (ours[name] - G).norm() <= 1e-6 * G.norm(), name


def test_the_start_is_that_of_one_process(engine: str, folder: Path, single: Any, ranks: Any) -> None:
    """`A0^T A0` and `B0 B0^T` are `c^2` times projectors, which turn by at most the error of `G` over the gap."""
    ours, one = ranks[0]["exact"]["start"], single["exact"]["start"]
    G_ours, G_one = gradients(folder, engine), gradients(folder, "single")
    r = 2
    for name, stored in one.items():
        layer = name.removeprefix("base_model.model.").split(".lora_")[0] + "|G"
        S = torch.linalg.svdvals(G_one[layer])
        gap = min(S[r - 1] - S[r], S[2 * r - 1] - S[2 * r]).item()
        error = (G_ours[layer] - G_one[layer]).norm().item()
        gram = (lambda t: t.T @ t) if "lora_A" in name else (lambda t: t @ t.T)
        c2 = gram(stored.double()).trace().item() / r
        # ||P - P'|| <= sqrt(2) ||G - G'|| / gap for each of the two subspaces that a half of 2r is made of (Wedin);
        # the factors themselves are rounded to fp32, r entries a product.
        bound = c2 * (2 * 2**0.5 * error / gap + 2**-22 * r)
        assert (gram(ours[name].double()) - gram(stored.double())).norm() <= bound, name


def test_losses_are_those_of_one_process(engine: str, single: Any, ranks: Any) -> None:
    corrections = ["lora_pro"]
    if not engine.startswith("zero"):
        corrections += ["lora_pro_adamw", "riemannian", *(["muon"] if hasattr(torch.optim, "Muon") else [])]
    for run in ("exact", *corrections):
        ours, one = ranks[0][run], single[run]
        assert ours["loss_before"] == pytest.approx(one["loss_before"], abs=1e-5)
        assert ours["loss_after"] == pytest.approx(one["loss_after"], abs=1e-5)
        assert len(ours["losses"]) == STEPS
        assert ours["losses"] == pytest.approx(one["losses"], abs=1e-5)
        moved = max(abs(a - b) for a, b in zip(one["losses"], single["exact"]["losses"], strict=True))
        assert run == "exact" or moved > 1e-3, "the correction must make a difference that this test would see"


@pytest.mark.parametrize("run", ["rate", "rate of lora_pro"])
def test_the_learning_rate_is_that_of_one_process(run: str, single: Any, ranks: Any) -> None:
    ours, one = ranks[0][run], single[run]
    # AdamW's first step is a sign, which rounding turns where the gradient is next to nothing.
    assert ours["found rate"] == pytest.approx(one["found rate"], rel=0.02)
    assert max(ours["rates"]) == ours["found rate"] == ranks[1][run]["found rate"]
    assert ours["rates"][1:] == pytest.approx(one["rates"][1:], rel=0.02)


def test_a_batch_with_repeats_counts_by_its_own_samples(folder: Path, engine: str, ranks: Any, single: Any) -> None:
    """
    11 samples in rounds of 4: `even_batches` gives the second process sample 0 again beside its own 10.

    Its micro-batch keeps its mean loss and counts for half of its items. One process repeats nothing.
    """
    rows = tiny.causal_rows(ROWS)
    labels = [int(row["labels"][1:].ne(-100).sum()) for row in rows]
    ours, one = ranks[0]["repeats"], single["repeats"]
    assert ours["samples"] == one["samples"] == ROWS
    assert one["items"] == sum(labels)
    assert ours["items"] == sum(labels[:10]) + (labels[10] + labels[0]) / 2
    batches = [([number], 1.0) for number in range(10)] + [([10, 0], 0.5)]
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    found = {name: G.double() for name, G in load_file(folder / f"{engine}-repeats.safetensors").items()}

    def weighted() -> Tensor:
        total = torch.zeros(())
        for numbers, share in batches:
            batch = {key: torch.stack([rows[n][key] for n in numbers]) for key in ("input_ids", "labels")}
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            targets = batch["labels"][:, 1:].flatten()
            total = total + share * torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total / ours["items"]

    names = {key.partition("|")[0]: key for key in found}
    for name, G in reference.whole_sample_gradient(model, list(names), weighted).items():
        assert (found[names[name]] - G).norm() < 2e-6 * G.norm(), name


@pytest.mark.parametrize("moment", ["start", "end"])
def test_every_process_holds_the_same_factors_bitwise(moment: str, ranks: Any) -> None:
    for run, found in ranks[0].items():
        for name, value in found[moment].items():
            assert torch.equal(value, ranks[1][run][moment][name]), (run, name)


def test_the_probe_leaves_no_trace(ranks: Any) -> None:
    """With dropout: the run that probed ends where the one ends that was given the same gradients in a file."""
    for found in ranks:
        probed, given = found["probing"], found["without a probe"]
        assert probed["sketched"] > 0
        assert probed["losses"] == given["losses"]
        for name, value in probed["end"].items():
            assert torch.equal(value, given["end"][name]), name


def test_sketches_are_summed_once_a_turn_and_their_bytes_are_reported(ranks: Any) -> None:
    """11 samples in rounds of 4 turn after a look at 4, after 4 and after 8: one large all-reduce each, one last."""
    found = ranks[0]["sketch"]
    *turns, last = [count for count in found["reductions"] if count > 1000]
    assert len(turns) == 3
    assert turns[0] == turns[1] == turns[2] < last, "at the end 16 columns more, and the exact gradients"
    small = 4 * sum(count for count in found["reductions"] if count <= 1000)
    shared = found["bytes_sent"] - 4 * (sum(turns) + last)  # test matrices and factors, of the process that made them
    assert 0 < small < shared < 4 * (sum(turns) + last)


def test_the_base_has_one_fingerprint(ranks: Any, single: Any) -> None:
    assert ranks[0]["exact"]["base"] == ranks[1]["exact"]["base"] == single["exact"]["base"]


def test_the_saved_folder_loads_on_a_clean_base(engine: str, folder: Path, single: Any, ranks: Any) -> None:
    ids = torch.stack([row["input_ids"] for row in tiny.causal_rows(3, seed=5)])
    logits = {}
    for which in ("single", engine):
        place = folder / which / "exact" / f"checkpoint-{STEPS}"
        assert (place / "lora_ga.json").is_file()
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), place).eval()
        with torch.no_grad():
            logits[which] = model(input_ids=ids).logits
    clean = LlamaForCausalLM.from_pretrained(folder / "base").eval()
    with torch.no_grad():
        assert (clean(input_ids=ids).logits - logits["single"]).abs().max() > 0.05, "training must have moved them"
    assert torch.allclose(logits[engine], logits["single"], atol=1e-5)
    saved = load_file(folder / engine / "exact" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    for name, value in ranks[0]["exact"]["end"].items():
        assert torch.equal(saved[name.replace(".default.", ".")], value), name


def test_second_moments_are_those_of_all_processes(folder: Path) -> None:
    """An init that asks for them gets, on two processes, what one fp64 pass over all samples gives."""
    ended = launch("ddp", "moments", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    single = moments_part("single", folder)
    model = LlamaForCausalLM.from_pretrained(folder / "base").double()
    state = load_file(folder / "ddp-moments.safetensors")
    names = sorted({key.partition("|")[0] for key in state})
    batch = {key: torch.stack([row[key] for row in tiny.causal_rows(8)]) for key in ("input_ids", "labels")}

    def summed() -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")

    true = reference.layer_inputs_and_output_gradients(model, names, summed)
    for name, (x, dy) in true.items():
        assert state[f"{name}|tokens"].item() == len(x) == 8 * 12
        for side, rows in (("input", x), ("output", dy)):
            squares = state[f"{name}|{side}_second_moments"].double()
            expected = rows.square().mean(dim=0)
            assert (squares - expected).norm() < 5e-6 * expected.norm(), (name, side)
    both = [torch.load(folder / "ddp" / f"moments-{rank}.pt", weights_only=False) for rank in range(2)]
    assert [found["processes"] for found in both] == [2, 2]
    assert sum(found["layers seen"] for found in both) == single["layers seen"] == len(names)
    for name, value in single["start"].items():
        assert torch.equal(both[0]["start"][name], both[1]["start"][name])
        gram = value.T @ value
        assert (both[0]["start"][name].T @ both[0]["start"][name] - gram).norm() <= 1e-4 * gram.norm(), name


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow), *ZERO])
def test_all_processes_turn_the_rows_alike(kind: str, folder: Path) -> None:
    """As one process does, too. Sketches turn after other samples there, so of them only lengths and zeros are."""
    ended = launch(kind, "directions", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    single = directions_part("single", folder)
    ours, other = (torch.load(folder / kind / f"directions-{rank}.pt", weights_only=False) for rank in range(2))
    for part, one in single.items():
        found = ours[part]
        assert (found["processes"], found["samples"]) == (2, 16)
        assert bool(found["sketched"]) == (part == "sketch")
        assert found["supported"] == one["supported"]
        assert part == "sketch" or sum(one["supported"]) > len(one["supported"])
        for name, value in one["start"].items():
            rows = found["start"][name]
            assert torch.equal(rows, other[part]["start"][name]), name
            if "lora_B" in name:
                assert not rows.any()
            elif kind == "ddp":
                torch.testing.assert_close(rows.norm(dim=1), value.norm(dim=1), rtol=1e-6, atol=0)
        if part == "halves" and kind == "ddp":
            names = [name for name in one["start"] if "lora_A" in name]
            for name, supported in zip(names, one["supported"], strict=True):
                rows, expected = found["start"][name].double(), one["start"][name].double()
                cosines = torch.nn.functional.cosine_similarity(rows, expected, dim=1).abs()
                assert (cosines > 1 - 1e-4).all(), name
                assert torch.equal(rows[supported:], expected[supported:]), name


@pytest.mark.parametrize("kind", ["ddp", *ZERO])
def test_convolutions_and_attention_start_and_train_as_on_one_process(kind: str, folder: Path) -> None:
    """Under ZeRO-3 without the attention, which is refused there."""
    part = "convolutions" if kind == "zero3" else "kinds"
    ended = launch(kind, part, folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    single = PARTS[part]("single", folder)
    ours, other = (torch.load(folder / kind / f"{part}-{rank}.pt", weights_only=False) for rank in range(2))
    layers = ["patches"] if kind == "zero3" else ["patches", "attention.in_proj_weight", "attention.out_proj"]
    state, one = (load_file(folder / f"{name}-{part}-exact.safetensors") for name in (kind, "single"))
    for name in (*layers, "head"):
        G, found = one[f"{name}|G"].double(), state[f"{name}|G"].double()
        assert (found - G).norm() <= 1e-6 * G.norm(), name
    for estimator in ("exact", "sketch"):
        assert ours[estimator]["processes"] == 2
        assert ours[estimator]["sketched"] == ([] if estimator == "exact" else layers[:2])
        assert ours[estimator]["losses"] == pytest.approx(single[estimator]["losses"], abs=1e-5)
        assert ours[estimator]["energy"] == pytest.approx(single[estimator]["energy"], abs=1e-4)
        for name, value in ours[estimator]["end"].items():
            assert torch.equal(value, other[estimator]["end"][name]), name
        base = {name.replace("base_layer.", ""): value for name, value in ours[estimator]["base"].items()}
        for name, value in Picture().named_parameters():
            assert torch.equal(base[f"base_model.model.{name}"], value), name


@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_second_look_sees_the_gradient_of_all_processes(kind: str, folder: Path) -> None:
    """So narrow a layer is kept whole in the second pass, which shows the exact gradient of the same samples."""
    ended = launch(kind, "second", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    ours, other = (torch.load(folder / kind / f"second-{rank}.pt", weights_only=False) for rank in range(2))
    for name, value in ours["end"].items():
        assert torch.equal(value, other["end"][name]), name
    exact = {"estimator": "exact", "probe_file": str(folder / f"{kind}-twin.safetensors")}
    trained("single", folder, "twin", exact, rows=tiny.causal_rows(40), max_steps=1)
    state, one = (load_file(folder / f"{kind}-{name}.safetensors") for name in ("second", "twin"))
    again = [key for key in state if key.endswith("|G")]
    assert len(again) == len([key for key in one if key.endswith("|G")])
    for key in again:
        G = one[key].double()
        assert (state[key].double() - G).norm() <= 1e-6 * G.norm(), key


@pytest.mark.slow
def test_attention_whose_weights_are_spread_is_refused_by_name(folder: Path) -> None:
    ended = launch("zero3", "kinds", folder)
    assert ended.returncode != 0
    assert re.search(
        r"ValueError: attention\.in_proj_weight: this engine spreads the weight.*keeps it whole", ended.stderr
    )


@pytest.fixture(scope="module")
def embedding_alone(folder: Path) -> dict[str, Any]:
    return embedding_part("single", folder)


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow), *ZERO])
def test_an_adapted_embedding_trains_as_on_one_process(name: str, folder: Path, embedding_alone: Any) -> None:
    ended = launch(name, "embedding", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    both = [torch.load(folder / name / f"embedding-{rank}.pt", weights_only=False) for rank in range(2)]
    ours, alone = (load_file(folder / f"{engine}-embedding.safetensors") for engine in (name, "single"))
    assert "model.embed_tokens|G" in alone
    for key, G in alone.items():
        assert (ours[key] - G).double().norm() <= 1e-6 * G.double().norm(), key
    assert both[0]["processes"] == 2
    assert both[0]["losses"] == pytest.approx(embedding_alone["losses"], abs=1e-4)
    assert both[0]["loss_after"] == pytest.approx(embedding_alone["loss_before"], abs=1e-5)
    for key, end in both[0]["end"].items():
        assert torch.equal(end, both[1]["end"][key])
        if "lora_embedding" in key:
            start, is_A = both[0]["start"][key], "embedding_A" in key
            moved = end - start
            assert moved.any()
            first, second = moved.chunk(2, dim=0 if is_A else 1)
            torch.testing.assert_close(second, first if is_A else torch.zeros_like(first), rtol=0, atol=1e-6)


REFUSALS = {
    "lora_pro_adamw": r"correction='lora_pro_adamw'.*DEEPSPEED shows an optimizer flat partitions only.*'lora_pro'",
    "riemannian": r"riemannian_reg=0.01.*DEEPSPEED shows an optimizer flat partitions only",
    "muon": r"correction='muon'.*DEEPSPEED shows an optimizer flat partitions",
    "resume": r"no optimizer state, so a resume would start AdamW anew.*load_adapter",
    "ranks": r"planned before training begins, and (FSDP|DEEPSPEED) is not ready.*one process or under DDP",
    "full checkpoints": r"Resuming is not supported for models sharded at load time",
}


def test_ranks_are_planned_as_on_one_process(folder: Path) -> None:
    """Under DDP. `gelora` takes the mean of what each process finds, so there they agree with each other alone."""
    ended = launch("ddp", "ranks", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    both = [torch.load(folder / "ddp" / f"ranks-{rank}.pt", weights_only=False) for rank in range(2)]
    single = ranks_part("single", folder)
    assert [found["processes"] for found in both] == [2, 2]
    assert both[0]["plans"] == both[1]["plans"]
    for rule in ("uniform", "energy", "gora", "signal"):
        assert both[0]["plans"][rule] == single["plans"][rule], rule
    assert both[0]["trained"] == both[1]["trained"] == single["trained"]
    assert both[0]["losses"] == pytest.approx(single["losses"], abs=1e-4)
    for name, value in both[0]["end"].items():
        assert torch.equal(value, both[1]["end"][name]), name


def test_what_is_impossible_is_refused_by_name(engine: str, folder: Path, ranks: Any) -> None:
    messages = torch.load(folder / engine / "refused-0.pt", weights_only=False)
    expected = {"ddp": set(), "fsdp2": {"resume", "full checkpoints", "ranks"}}
    assert set(messages) == expected.get(engine, {"lora_pro_adamw", "riemannian", "ranks", "muon"})
    for name, message in messages.items():
        assert re.search(REFUSALS[name], message), message


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return bare_part("single", folder)


@pytest.fixture(scope="module")
def fully_sharded(folder: Path) -> list[dict[str, Any]]:
    ended = launch("fully_shard", "bare", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [torch.load(folder / "fully_shard" / f"bare-{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_start_is_written_into_sharded_adapters(by_hand: Any, fully_sharded: Any) -> None:
    for found in fully_sharded:
        assert found["sharded"]
        assert not by_hand["sharded"]
        for name, factors in by_hand["start"].items():
            assert all(torch.equal(*pair) for pair in zip(found["start"][name], factors, strict=True)), name


def test_a_start_is_written_into_flattened_adapters(by_hand: Any, folder: Path) -> None:
    ended = launch("fsdp1", "bare", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    for rank in range(2):
        found = torch.load(folder / "fsdp1" / f"bare-{rank}.pt", weights_only=False)
        assert found["start"].keys() == by_hand["start"].keys()
        for name, factors in by_hand["start"].items():
            assert all(torch.equal(*pair) for pair in zip(found["start"][name], factors, strict=True)), name


@pytest.mark.parametrize("optimizer", ["wrapper", "adamw"])
def test_lora_pro_steps_sharded_adapters_as_whole_ones(optimizer: str, by_hand: Any, fully_sharded: Any) -> None:
    for name, factors in by_hand[optimizer].items():
        moved = max((a - b).abs().max() for a, b in zip(factors, by_hand["start"][name], strict=True))
        assert moved > 1e-3
        for rank in range(2):
            for ours, one in zip(fully_sharded[rank][optimizer][name], factors, strict=True):
                # Gradients of two processes are summed in another order: 2^-23 of their size, which the inverse Gram
                # matrices of factors this well conditioned and Adam's division carry to some 1e-5 of the step.
                assert (ours - one).abs().max() < 2e-4 * moved


def test_the_moments_of_lora_pro_adamw_are_sharded_like_the_base(by_hand: Any, fully_sharded: Any) -> None:
    whole = by_hand["adamw state"]
    assert whole > 0
    assert [found["adamw state"] for found in fully_sharded] == [whole // 2, whole // 2]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "run"), RESUMABLE)
def test_a_killed_run_resumes_bitwise(kind: str, run: str, folder: Path) -> None:
    ended = launch(kind, f"killed {run}", folder)
    assert ended.returncode != 0
    assert f"Signal {signal.SIGKILL.value}" in ended.stderr or "-9" in ended.stderr, ended.stderr[-2000:]
    place = folder / kind / f"killed {run}"
    assert [path.name for path in place.glob("checkpoint-*")] == [f"checkpoint-{SAVED}"]
    assert SAVED < KILLED < STEPS
    ended = launch(kind, f"resumed {run}", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    for rank in range(2):
        found = torch.load(folder / kind / f"resumed {run}-{rank}.pt", weights_only=False)
        assert not found["probed again"]
        for name, value in found["whole"].items():
            assert torch.equal(found["resumed"][name], value), name
        saved = load_file(folder / kind / f"whole {run}" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
        assert {name.replace(".default.", ".") for name in found["whole"]} == saved.keys()
        for name, value in found["whole"].items():
            assert torch.equal(saved[name.replace(".default.", ".")], value), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_checkpoints_are_analysed_as_their_folders_are(kind: str, folder: Path) -> None:
    """A base in parts is gathered by all processes together, so all must see the folder, or none begins."""
    ended = launch(kind, "analysed", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    ours, other = (torch.load(folder / kind / f"analysed-{rank}.pt", weights_only=False) for rank in range(2))
    gathers = kind in ("fsdp2", "zero3")
    assert list(ours["reports"]) == [SAVED, STEPS]
    assert list(other["reports"]) == ([SAVED, STEPS] if gathers else [])
    for step, report in ours["reports"].items():
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        place = folder / kind / "analysed" / f"checkpoint-{step}"
        expected = analyse_adapter(base, place, k=4, eps=0.6).to_dict()
        assert report["layers"] == expected["layers"]
        assert json.loads((place / "adapter_report.json").read_text())["layers"] == json.loads(
            json.dumps(expected["layers"])
        )
    assert ours["steps"] == STEPS
    assert (ours["alone"], other["alone"]) == (([], []) if gathers else ([SAVED, STEPS], []))
    assert ("every process has to read these files" in ended.stderr) == gathers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_b_alone_is_trained_as_on_one_process(kind: str, folder: Path) -> None:
    ended = launch(kind, "frozen", folder)
    assert ended.returncode == 0, ended.stderr[-4000:]
    single = frozen_part("single", folder)
    ours, other = (torch.load(folder / kind / f"frozen-{rank}.pt", weights_only=False) for rank in range(2))
    assert len(ours["losses"]) == STEPS
    assert ours["losses"] == pytest.approx(single["losses"], abs=1e-5)
    for name, (A, B) in ours["end"].items():
        assert torch.equal(A, ours["start"][name][0])
        assert torch.equal(A, other["end"][name][0])
        assert torch.equal(B, other["end"][name][1])
        assert not ours["start"][name][1].any()
        assert B.any()
    place = folder / kind / "frozen" / f"checkpoint-{STEPS}"
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), place)
    for layer in find_lora_layers(model):
        A, B = ours["end"][layer.name]
        assert torch.equal(layer.stored_A, A)
        assert torch.equal(layer.stored_B, B)
