"""A checkpoint that was cut short is recognised, whatever is missing or damaged (complete.py)."""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch import Tensor
from transformers import Trainer, TrainerCallback

from lora_ga_trainer import LoRAGACallback, LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.saving.intact import _fault, newest_complete_checkpoint


BINARY = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
JSON = ("adapter_config.json", "trainer_state.json", "lora_ga.json")
FILES = BINARY + JSON


class From(TrainerCallback):
    """Notes where a run begins."""

    step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def make_trainer(folder: Path, steps: int = 4, bare: bool = False, **changes: Any) -> Trainer:
    config = LoRAGAConfig(num_samples=4)
    args = tiny.arguments(folder, max_steps=steps, save_strategy="steps", save_steps=1, **changes)
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}
    torch.manual_seed(11)
    settings = {"args": args, "train_dataset": tiny.causal_rows(12)}
    if not bare:
        return LoRAGATrainer(tiny.llama(), peft_config=LoraConfig(**lora), lora_ga_config=config, **settings)
    trainer = Trainer(tiny.with_lora(tiny.llama(), **lora), **settings)
    trainer.add_callback(LoRAGACallback(trainer, config))
    return trainer


def resumed(folder: Path, resume: Any = True, **changes: Any) -> tuple[int, dict[str, Tensor]]:
    """Return the step that a run went on from and the adapter it ended with."""
    trainer, begin = make_trainer(folder, **changes), From()
    trainer.add_callback(begin)
    trainer.train(resume_from_checkpoint=resume)
    return begin.step, adapter_of(trainer)


def adapter_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> tuple[Path, dict[str, Tensor]]:
    """A run of four steps with a checkpoint each, and where it ended."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    trainer = make_trainer(folder)
    trainer.train()
    return folder, adapter_of(trainer)


@pytest.fixture
def run(whole: Any, tmp_path: Path) -> Path:
    """The same run, killed after its third checkpoint."""
    for step in (1, 2, 3):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def cut(path: Path, left: float) -> None:
    os.truncate(path, int(path.stat().st_size * left))


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: cut(path, 0),
    "half": lambda path: cut(path, 0.5),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),  # a file system's answer to a power cut
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_the_error_names_the_folder_and_the_file(name: str, damage: str, run: Path) -> None:
    trainer = make_trainer(run)
    before = adapter_of(trainer)
    DAMAGES[damage](run / "checkpoint-3" / name)
    what = f"{name} is {'missing' if damage == 'missing' else 'damaged'}"
    if name == "lora_ga.json":
        what = "has no lora_ga.json" if damage == "missing" else "lora_ga.json is not a record"
    with pytest.raises(ValueError, match=rf"checkpoint-3 can't be resumed: .*{what}.*resume_from_checkpoint=True"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert same(adapter_of(trainer), before)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", FILES)
def test_the_newest_complete_one_is_resumed_with_a_warning(name: str, run: Path, whole: Any, caplog: Any) -> None:
    DAMAGES["missing" if name == "lora_ga.json" else "half"](run / "checkpoint-3" / name)
    with caplog.at_level(logging.WARNING, "lora_ga_trainer"):
        begin, end = resumed(run)
    assert begin == 2
    assert same(end, whole[1])
    said = [entry.getMessage() for entry in caplog.records if entry.name == "lora_ga_trainer.saving.intact"]
    assert len(said) == 1
    assert f"{run / 'checkpoint-3'} was cut short or damaged and is skipped" in said[0]
    assert name in said[0]


@pytest.mark.parametrize("name", BINARY)
def test_a_cut_at_any_byte_is_recognised(name: str, whole: Any, tmp_path: Path) -> None:
    content = (whole[0] / "checkpoint-3" / name).read_bytes()
    path = tmp_path / name
    lengths = torch.randint(len(content), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for length in [0, 1, 7, 8, 9, *lengths, *range(len(content) - 30, len(content))]:
        path.write_bytes(content[:length])
        assert "is damaged" in str(_fault(path)), length
    path.write_bytes(content)
    assert _fault(path) is None


def test_a_json_file_cut_at_any_byte_is_recognised(whole: Any, tmp_path: Path) -> None:
    content = (whole[0] / "checkpoint-3" / "trainer_state.json").read_bytes().rstrip()
    path = tmp_path / "trainer_state.json"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert "is damaged" in str(_fault(path)), length


def test_a_whole_checkpoint_is_taken_without_a_word(run: Path, whole: Any, caplog: Any) -> None:
    (run / "checkpoint-final").mkdir()
    (run / "checkpoint-9").write_text("a file")
    with caplog.at_level(logging.WARNING, "lora_ga_trainer"):
        begin, end = resumed(run)
    assert begin == 3
    assert same(end, whole[1])
    assert not [entry for entry in caplog.records if entry.name == "lora_ga_trainer.saving.intact"]


def test_several_are_skipped_in_the_order_of_their_steps(run: Path, whole: Any, caplog: Any) -> None:
    """Newest by number: 10 comes after 3."""
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-10")
    (run / "checkpoint-10" / "trainer_state.json").unlink()
    cut(run / "checkpoint-3" / "optimizer.pt", 0.9)
    with caplog.at_level(logging.WARNING, "lora_ga_trainer"):
        begin, end = resumed(run, bare=True)
    assert begin == 2
    assert same(end, bare_end(whole))
    said = [entry.getMessage().split(" was cut")[0] for entry in caplog.records if " was cut" in entry.getMessage()]
    assert [Path(folder).name for folder in said] == ["checkpoint-10", "checkpoint-3"]


def bare_end(whole: Any) -> dict[str, Tensor]:
    """Where the bare callback goes from the second checkpoint: it counts tied halves twice in the clipping norm."""
    return resumed(whole[0].parent / "bare", str(whole[0] / "checkpoint-2"), bare=True)[1]


def test_without_a_complete_one_the_error_says_so(run: Path, caplog: Any) -> None:
    for step in (1, 2, 3):
        (run / f"checkpoint-{step}" / "trainer_state.json").unlink()
    trainer = make_trainer(run)
    with (
        caplog.at_level(logging.WARNING, "lora_ga_trainer"),
        pytest.raises(ValueError, match=rf"No valid checkpoint found .*{run.name}.*none that was written to its end"),
    ):
        trainer.train(resume_from_checkpoint=True)
    assert [f"checkpoint-{step} was cut short" in caplog.text for step in (1, 2, 3)] == [True] * 3
    trainer.train()  # what the message says
    assert trainer.state.global_step == 4


def test_a_checkpoint_of_weights_only_needs_save_only_model(run: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-3" / name).unlink()
    assert resumed(run, save_only_model=True)[0] == 3
    assert newest_complete_checkpoint(make_trainer(run, save_only_model=True)) == str(run / "checkpoint-4")
    shutil.rmtree(run / "checkpoint-4")
    assert resumed(run)[0] == 2


def test_a_checkpoint_of_several_processes_is_resumed_on_one_with_a_warning(run: Path, caplog: Any) -> None:
    last = run / "checkpoint-3"
    shutil.copy(last / "rng_state.pth", last / "rng_state_1.pth")
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    with caplog.at_level(logging.WARNING, "lora_ga_trainer"):
        assert resumed(run)[0] == 3
    assert "checkpoint-3 has no rng_state.pth: it was written by another number of processes" in caplog.text


def test_an_adapter_of_another_name_is_looked_for_in_its_folder(tmp_path: Path) -> None:
    def named() -> LoRAGATrainer:
        model = tiny.with_lora(tiny.llama())
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("second")
        args = tiny.arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
        config = LoRAGAConfig(num_samples=4)
        return LoRAGATrainer(model, args, train_dataset=tiny.causal_rows(8), lora_ga_config=config)

    named().train()
    last = tmp_path / "checkpoint-1"
    assert newest_complete_checkpoint(named()) == str(last)
    cut(last / "second" / "adapter_model.safetensors", 0.5)
    with pytest.raises(
        ValueError, match=r"checkpoint-1 can't be resumed: second/adapter_model.safetensors is damaged"
    ):
        named().train(resume_from_checkpoint=str(last))


def test_a_whole_model_is_looked_into_too(tmp_path: Path) -> None:
    """`newest_complete_checkpoint` serves any Trainer, full fine-tuning included."""
    args = tiny.arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = Trainer(tiny.llama(), args, train_dataset=tiny.causal_rows(8))
    trainer.train()
    assert newest_complete_checkpoint(trainer) == str(tmp_path / "checkpoint-2")
    cut(tmp_path / "checkpoint-2" / "model.safetensors", 0.9)
    assert newest_complete_checkpoint(trainer) == str(tmp_path / "checkpoint-1")


def test_the_parts_of_deepspeed_are_looked_into(run: Path, monkeypatch: Any) -> None:
    """The layout alone; real ZeRO runs are resumed in test_engines.py."""
    trainer = make_trainer(run)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    last, before = run / "checkpoint-3", str(run / "checkpoint-2")
    for step in (2, 3):
        folder = run / f"checkpoint-{step}"
        (folder / "optimizer.pt").unlink()
        (folder / "latest").write_text(f"global_step{step}")
        (folder / f"global_step{step}").mkdir()
        torch.save({}, folder / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert newest_complete_checkpoint(trainer) == str(last)
    part = last / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    cut(part, 0.5)
    assert newest_complete_checkpoint(trainer) == before
    part.unlink()
    assert newest_complete_checkpoint(trainer) == before
    torch.save({}, part)
    for damage in ("empty", "missing"):
        DAMAGES[damage](last / "latest")
        assert newest_complete_checkpoint(trainer) == before


RANKS = """
import json, os, pathlib, sys
import torch
torch.set_num_threads(1)
from test_complete import From, cut, make_trainer
folder = pathlib.Path({folder!r})
make_trainer(folder, steps=2).train()
torch.distributed.barrier()
if os.environ["RANK"] == "0":
    cut(folder / "checkpoint-2" / "rng_state_1.pth", 0.5)
torch.distributed.barrier()
trainer, begin = make_trainer(folder, steps=2), From()
error = ""
try:
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
except ValueError as caught:
    error = str(caught)
trainer.add_callback(begin)
trainer.train(resume_from_checkpoint=True)
(folder / ("seen" + os.environ["RANK"])).write_text(json.dumps([begin.step, error]))
from processes import end_processes
end_processes()
"""


# transformers 5.3 maps an optimizer's state to the device of the process group, `cpu:0`, which torch does not know.
LOADS_TO_CPU_0 = "= self.args.device if self.args.world_size > 1" in inspect.getsource(
    Trainer._load_optimizer_and_scheduler
)


@pytest.mark.skipif(
    LOADS_TO_CPU_0, reason=f"transformers {transformers.__version__} resumes no Trainer of two processes on CPUs"
)
def test_two_processes_choose_alike_though_one_alone_sees_the_damage(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RANKS.format(folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    seen = [json.loads((tmp_path / f"seen{rank}").read_text()) for rank in range(2)]
    assert seen[0] == seen[1]
    step, error = seen[0]
    assert step == 1
    assert "checkpoint-2 can't be resumed: process 1: rng_state_1.pth is damaged" in error
