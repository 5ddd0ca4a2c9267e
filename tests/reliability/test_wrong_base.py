"""
An adapter goes on with the base that it was started on, or is refused: real runs, and what telling the bases apart
costs. What goes into the fingerprint is tested in test_record.py.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, load_adapter
from lora_ga_trainer.saving.fingerprint import fingerprint_base


TARGETS = ["q_proj", "down_proj"]
CHANGED = "model.layers.1.mlp.down_proj"
FEW = {"num_samples": 4}


def make_trainer(base: nn.Module, folder: Path, init: str = "lora_ga", steps: int = 3) -> LoRAGATrainer:
    return LoRAGATrainer(
        base,
        tiny.arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, learning_rate=1e-2),
        train_dataset=tiny.causal_rows(8),
        peft_config=LoraConfig(r=2, target_modules=TARGETS),
        lora_ga_config=LoRAGAConfig(init=init, **FEW),
    )


@pytest.fixture(scope="module", params=["lora_ga", "lora_one"])
def run(request: Any, tmp_path_factory: Any) -> tuple[str, Path]:
    """The checkpoint of a real run of two steps."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    make_trainer(tiny.llama(), folder, request.param, steps=2).train()
    return request.param, folder / "checkpoint-2"


def other_weights(_: Path) -> nn.Module:
    return tiny.llama(seed=1)


def one_changed_layer(_: Path) -> nn.Module:
    base = tiny.llama()
    with torch.no_grad():
        base.get_submodule(CHANGED).weight.mul_(1 + 2**-10)
    return base


def other_config(_: Path) -> nn.Module:
    return tiny.llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})


def merged(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny.llama(), folder).merge_and_unload()


WRONG = {
    "other weights": other_weights,
    "one changed layer": one_changed_layer,
    "other config": other_config,
    "merged": merged,
}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("resume", ["named", "newest"])
@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_a_resume_on_another_base_is_refused_before_anything_is_loaded(
    make: Any, resume: str, run: Any, tmp_path: Path
) -> None:
    init, checkpoint = run
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    trainer = make_trainer(make(checkpoint), tmp_path, init)
    before = weights(trainer.model)
    where = str(tmp_path / "checkpoint-2") if resume == "named" else True
    with pytest.raises(ValueError, match=r"checkpoint-2 was trained with base='\w{32}', this run has base='\w{32}'"):
        trainer.train(resume_from_checkpoint=where)
    assert_same(weights(trainer.model), before)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_load_adapter_refuses_another_base_and_names_plain_peft(make: Any, run: Any) -> None:
    with pytest.raises(ValueError, match=r"started on a base with fingerprint.*or load it with plain PEFT"):
        load_adapter(make(run[1]), run[1])


def test_the_right_base_is_resumed_and_loaded(run: Any, tmp_path: Path) -> None:
    """The counterpart: a base made anew, and one that went through a file."""
    init, checkpoint = run
    tiny.llama().save_pretrained(tmp_path / "base")
    for base in (tiny.llama(), type(tiny.llama()).from_pretrained(tmp_path / "base")):
        trainer = make_trainer(base, tmp_path, init)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 3
    load_adapter(tiny.llama(), checkpoint)


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
def test_plain_peft_loads_it_on_any_base_of_its_shapes(make: Any, run: Any) -> None:
    """It adds there what it adds to its own: the weight that plain PEFT merges moves by the same delta."""
    checkpoint = run[1]
    moved = 0.0
    own, other = tiny.llama(), make(checkpoint)
    before = [weights(model) for model in (own, other)]
    after = [weights(PeftModel.from_pretrained(model, checkpoint).merge_and_unload()) for model in (own, other)]
    for name in before[0]:
        here, there = (late[name] - early[name] for early, late in zip(before, after, strict=True))
        # Both are differences of two fp32 weights of some .1, each rounded to 2^-24 of that.
        torch.testing.assert_close(here, there, rtol=0, atol=4e-8)
        moved = max(moved, here.abs().max().item())
    assert moved > 1e-3


def resident_bytes(weight: Tensor) -> int:
    """Bytes of a tensor that lies in a mapped file of its own which the process has touched."""
    begin = weight.untyped_storage().data_ptr()
    maps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{begin:08x}-.*?^Rss:\s+(\d+) kB", maps, re.MULTILINE | re.DOTALL)
    assert found is not None
    return int(found[1]) * 1024


def fingerprint_of_mapped(path: Path, shape: tuple[int, int], transposed: bool) -> tuple[str, int]:
    """Fingerprint a bf16 base with one layer in a sparse file, which takes no room on the disk."""
    path.touch()
    weight = torch.from_file(str(path), shared=True, size=shape[0] * shape[1], dtype=torch.bfloat16).view(shape)
    stored = weight.T if transposed else weight
    layer = SimpleNamespace(name="layer", stored_weight=lambda: [stored])
    model = tiny.with_lora(nn.Sequential(nn.Linear(2, 2)), target_modules=["0"])  # its base has no config
    assert resident_bytes(weight) == 0
    return fingerprint_base(model, [layer]), resident_bytes(weight)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_read_of_a_layer_does_not_grow_with_it(transposed: bool, tmp_path: Path) -> None:
    """
    64 numbers, each of which brings in what the system maps at once: at most 64 KiB. So 4 MiB a layer, whatever its
    size; a 70B model in bf16 has layers of 8192 x 28672, 448 MiB.
    """
    digests = {}
    for number, shape in enumerate([(1024, 4096), (8192, 4096), (8192, 28672)]):
        digests[shape], read = fingerprint_of_mapped(tmp_path / str(number), shape, transposed)
        assert 0 < read <= 64 * 64 * 1024, shape
    assert len(set(digests.values())) == 3  # the shape counts, too
