"""
What the table of engines claims and a CPU can't show.

Every test runs on a GPU. Those whose set-up a CPU has, too, run on both, so that a test is known to work before it
meets a GPU. Models are tiny. Nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optional
import pytest
import reference
import tiny
import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel
from test_probe import assert_equal_gradients, causal_loss, exact
from test_quantised import BASES, BF16, FP32, base_bits, dense_twin
from test_trainer import adapter_of, assert_bitwise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, LoRAProAdamW, LoRAProOptimizer, estimate_gradients


pytestmark = pytest.mark.usefixtures("unpacked_codes")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SCRIPT = Path(__file__).with_name("gpu_engine_run.py")
SIZES = {"hidden_size": 64, "intermediate_size": 96}
FP16 = 2**-9  # as BF16 of test_quantised.py, with roundings of 2^-11


@dataclass(frozen=True)
class SetUp:
    """How a user loads the model and what the user gives the Trainer."""

    error: float = FP32  # relative, of G against an fp64 twin
    load: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    quantiser: Callable[[], Any] | None = None
    on_cpu: bool = True
    deterministic: bool = True

    def model(self, folder: Path, device: str) -> nn.Module:
        if self.load.get("attn_implementation") == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
            pytest.skip("needs the package flash_attn")
        where = {"device_map": {"": 0}} if device == "cuda" else {}
        quantised = {"quantization_config": self.quantiser()} if self.quantiser else {}
        return AutoModelForCausalLM.from_pretrained(folder, **(where | self.load | quantised))

    def training_arguments(self, output: Path, device: str, **changes: Any) -> Any:
        return tiny.arguments(output, use_cpu=device == "cpu", **(self.arguments | changes))


SET_UPS = {
    "fp32": SetUp(),
    "bf16 weights": SetUp(BF16, {"dtype": torch.bfloat16}),
    "bf16 autocast": SetUp(BF16, arguments={"bf16": True}),
    "fp16 autocast with its scaler": SetUp(FP16, arguments={"fp16": True}, on_cpu=False),
    "sdpa": SetUp(load={"attn_implementation": "sdpa"}),
    "eager attention": SetUp(load={"attn_implementation": "eager"}),
    "flash attention": SetUp(
        BF16, {"attn_implementation": "flash_attention_2", "dtype": torch.bfloat16}, on_cpu=False, deterministic=False
    ),
    "compiled": SetUp(arguments={"torch_compile": True}, on_cpu=False, deterministic=False),
    "pinned, non-blocking loader": SetUp(
        arguments={
            "dataloader_pin_memory": True,
            "dataloader_num_workers": 2,
            "accelerator_config": {"non_blocking": True},
        },
        on_cpu=False,
    ),
    "checkpointing": SetUp(arguments={"gradient_checkpointing": True}),
    "device_map auto": SetUp(load={"device_map": "auto"}, on_cpu=False),
    "nf4, double quantisation": SetUp(BF16, quantiser=BASES["nf4-double-bf16"]),
    "bitsandbytes int8": SetUp(FP16, quantiser=BASES["bitsandbytes-int8"], on_cpu=False),
    "torchao int8": SetUp(FP32, quantiser=BASES["torchao-int8"]),
}
QUICK = {"fp32", "bf16 autocast"}


def cases() -> list[Any]:
    found = [pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-cuda") for name in SET_UPS]
    for name, set_up in SET_UPS.items():
        if set_up.on_cpu:
            marks = [] if name in QUICK else [pytest.mark.slow]
            found.append(pytest.param(name, "cpu", marks=marks, id=f"{name}-cpu"))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    tiny.llama(**SIZES).save_pretrained(place)
    return place


def logits_of(model: nn.Module) -> Tensor:
    """In the model's own dtype: mixed precision is the Trainer's, which leaves its wrapper on the model."""
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False, keep_torch_compile=False).eval()
    ids = torch.stack([row["input_ids"] for row in tiny.causal_rows(3, seed=5)])
    with torch.no_grad():
        return model(input_ids=ids.to(next(model.parameters()).device)).logits


def swap(set_up: SetUp, folder: Path, output: Path, device: str, **changes: Any) -> LoRAGATrainer:
    lora_ga = {"num_samples": 8} | changes.pop("lora_ga", {})
    model = set_up.model(folder, device)
    torch.manual_seed(11)
    return LoRAGATrainer(
        model,
        set_up.training_arguments(output, device, **changes),
        train_dataset=tiny.causal_rows(24),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        lora_ga_config=LoRAGAConfig(**lora_ga),
    )


@pytest.mark.parametrize(("name", "device"), cases())
def test_g_is_the_gradient_of_a_fp64_twin(name: str, device: str, folder: Path, tmp_path: Path) -> None:
    set_up, rows = SET_UPS[name], tiny.causal_rows(9)
    model = set_up.model(folder, device)
    twin = dense_twin(folder, model)
    with torch.no_grad():  # what isn't quantised has the dtype of the model
        for key, parameter in model.named_parameters():
            if type(parameter) is nn.Parameter:
                twin.get_parameter(key).copy_(parameter)
    settings = set_up.training_arguments(tmp_path, device, train_sampling_strategy="sequential")
    trainer = Trainer(tiny.with_lora(model), settings, train_dataset=rows)
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    found = estimate_gradients(trainer, exact()).estimators
    assert {estimator.state()["G"].device.type for estimator in found.values()} == {device}
    true = reference.whole_sample_gradient(twin, list(found), lambda: causal_loss(twin, rows))
    assert_equal_gradients({key: each.state()["G"].double().cpu() for key, each in found.items()}, true, set_up.error)


@pytest.mark.parametrize(("name", "device"), cases())
def test_step_0_the_base_loading_resuming_and_the_adapter_off(
    name: str, device: str, folder: Path, tmp_path: Path
) -> None:
    set_up = SET_UPS[name]
    saves = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer = swap(set_up, folder, tmp_path / "run", device, **saves)
    base = trainer.model.get_base_model()
    clean, before = _adapter_off(trainer.model), base_bits(base)
    trainer.train()
    # The product B A - B0 A0 is zero, and so is every term of it.
    assert trainer.lora_ga_report.loss_after == trainer.lora_ga_report.loss_before
    trained = logits_of(trainer.model)
    assert not torch.equal(trained, clean)
    assert torch.equal(_adapter_off(trainer.model), clean)
    assert_bitwise(before, base_bits(base))

    loaded = PeftModel.from_pretrained(set_up.model(folder, device), tmp_path / "run" / "checkpoint-6")
    torch.testing.assert_close(logits_of(loaded), trained, rtol=0, atol=0 if set_up.deterministic else 1e-2)

    again = swap(set_up, folder, tmp_path / "run", device, **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    atol, resumed = (0 if set_up.deterministic else 1e-4), adapter_of(again)
    for key, value in adapter_of(trainer).items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=atol)


def _adapter_off(model: nn.Module) -> Tensor:
    with model.disable_adapter():
        return logits_of(model)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_probe_waits_for_the_gpu_once_a_batch_at_most(device: str, folder: Path, tmp_path: Path) -> None:
    """A host that reads a number from the GPU in every layer would leave it idle between kernels."""
    waits: list[str] = []
    trainer = swap(SetUp(), folder, tmp_path, device, lora_ga={"num_samples": 16, "estimator": "exact"})
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    read = Tensor.item

    def counted(self: Tensor) -> Any:
        waits.append(self.device.type)
        return read(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "item", counted)
        estimate_gradients(trainer, LoRAGAConfig(num_samples=16, estimator="exact"))
    batches, layers = 16 // 4, 14
    assert len(waits) < batches * layers


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("correction", ["lora_pro", "lora_pro_adamw"])
def test_a_corrected_run_on_the_gpu_is_that_on_the_cpu(
    correction: str, device: str, folder: Path, tmp_path: Path
) -> None:
    runs = {}
    for where in ("cpu", device):
        trainer = swap(SetUp(), folder, tmp_path / where, where, lora_ga={"correction": correction}, max_steps=3)
        trainer.train()
        kind = LoRAProOptimizer if correction == "lora_pro" else LoRAProAdamW
        assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), kind)
        runs[where] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert runs[device] == pytest.approx(runs["cpu"], abs=1e-4)


@pytest.mark.gpu
def test_a_model_partly_in_host_memory_trains_where_plain_peft_does(folder: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    set_up = SetUp(load={"device_map": places | {"model.norm": 0, "lm_head": 0}})
    plain = swap(set_up, folder, tmp_path / "plain", "cuda", lora_ga={"init": "none"})
    try:
        plain.train()
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"plain LoRA does not train so either: {error}")
    trainer = swap(set_up, folder, tmp_path / "ours", "cuda")
    trainer.train()
    assert {layer.action for layer in trainer.lora_ga_report.layers} == {"initialised"}
    assert trainer.lora_ga_report.loss_after == trainer.lora_ga_report.loss_before


ENGINES = ["fsdp2", "zero2_offload", "zero3_offload"]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_on_one_gpu_starts_and_trains_as_without_it(
    engine: str, device: str, folder: Path, tmp_path: Path
) -> None:
    if engine.startswith("zero"):
        optional.require("deepspeed")
    elif device == "cpu":
        pytest.skip("Accelerate's FSDP2 asks for an accelerator")
    found = {}
    for name in ("none", engine):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        command += [str(SCRIPT), name, device, str(folder), str(tmp_path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
        ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
        assert ended.returncode == 0, ended.stderr[-4000:]
        found[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    assert found[engine]["loss after"] == found[engine]["loss before"]
    assert found[engine]["losses"] == pytest.approx(found["none"]["losses"], abs=1e-4)
    for key, value in found["none"]["start"].items():
        torch.testing.assert_close(found[engine]["start"][key], value, rtol=1e-3, atol=1e-4)
