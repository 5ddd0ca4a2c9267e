"""The wheel and the sdist hold the package, whole and alone, and the installed wheel trains without the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import lora_ga_trainer


ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "lora_ga_trainer").rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
)
BUILT_FROM = ["CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.cfg"]

TRAIN_ONE_STEP = """
import importlib, pkgutil, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import lora_ga_trainer
from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer

for module in pkgutil.walk_packages(lora_ga_trainer.__path__, "lora_ga_trainer."):
    importlib.import_module(module.name)
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "lora_ga_trainer":
        assert folder in Path(module.__file__).parents, module.__file__

torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=31)
ids = torch.randint(0, 31, (4, 6))
trainer = LoRAGATrainer(
    LlamaForCausalLM(LlamaConfig(**sizes)),
    TrainingArguments(sys.argv[2], max_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=2),
    train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    lora_ga_config=LoRAGAConfig(num_samples=4),
)
trainer.train()
assert trainer.state.global_step == 1
assert trainer.lora_ga_report.samples == 4
trainer.save_model()
print(lora_ga_trainer.__version__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from it, in a copy: an old `build/` of the checkout must not be read."""
    copy = tmp_path_factory.mktemp("copy")
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("lora_ga_trainer", "recipes", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=leave)
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, copy / name)
    # Without isolation nothing is downloaded: setuptools comes with the test extra.
    program = [sys.executable, "-m", "build", "--no-isolation", str(copy)]
    finished = subprocess.run(program, cwd=copy, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = sorted(name for name in archive.namelist() if ".dist-info/" not in name)
    assert "lora_ga_trainer/py.typed" in SOURCES
    assert held == SOURCES


def test_its_metadata_name_the_version_the_licence_the_pythons_and_the_papers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    assert metadata["Version"] == lora_ga_trainer.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(metadata.get_all("Classifier")))
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    papers = [link.rpartition("/")[2] for link in metadata.get_all("Project-URL")]
    assert papers == ["2407.05000", "2502.01235", "2407.18242"]


def test_the_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {*SOURCES, *BUILT_FROM} <= names
    assert not [name for name in names if name.startswith(("tests/", "recipes/"))]


def test_the_installed_wheel_trains_a_step_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([*pip, str(wheel)], check=True)
    # -I: neither PYTHONPATH nor the working folder, through which the checkout would be found.
    program = [sys.executable, "-I", "-c", TRAIN_ONE_STEP, str(installed), str(tmp_path / "run")]
    finished = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == lora_ga_trainer.__version__
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_the_citation_is_of_this_version_and_of_the_papers_of_the_methods() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == lora_ga_trainer.__version__
    papers = [reference["url"].rpartition("/")[2] for reference in citation["references"]]
    assert papers == ["2407.05000", "2502.01235", "2407.18242"]
