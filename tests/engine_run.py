"""
Train tiny Llama on one engine and write down what came of it; run by `tests/test_engines.py` in two processes.

    torchrun --nproc_per_node 2 tests/engine_run.py ENGINE PART FOLDER

`FOLDER/base` holds the model. Each process writes `FOLDER/ENGINE/PART-RANK.pt`. In the test's own process `run_part`
with the engine `single` computes the same on one process with batches of the same samples.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM, TrainerCallback

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.engines import read_parameter


STEPS, SAVED, KILLED = 10, 5, 7
ROWS = 11  # no multiple of the 4 samples of a step: the last batch does not divide
SKETCH = {"sketch_size": 8, "estimator": "sketch"}


def zero(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


ENGINES: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "fsdp2": {"save_only_model": True},
    "zero2": {"deepspeed": zero(2)},
    "zero3": {"deepspeed": zero(3)},
}


def make_trainer(engine: str, folder: Path, name: str, lora_ga: dict[str, Any], **changes: Any) -> LoRAGATrainer:
    """`changes` go to the training arguments, but for `dropout`, `rows` and `callbacks`."""
    dropout, rows = changes.pop("dropout", 0.0), changes.pop("rows", None) or tiny.causal_rows(ROWS)
    callbacks = changes.pop("callbacks", None)
    per_device = 4 if engine == "single" else 2
    settings = {"max_steps": STEPS, "per_device_train_batch_size": per_device, "lr_scheduler_type": "constant"}
    place = folder / engine / name
    args = tiny.arguments(place, **(settings | ENGINES[engine] | changes))  # before the model: ZeRO-3 loads in parts
    kwargs = {}
    if engine == "fsdp2":
        from transformers.distributed import DistributedConfig

        kwargs["distributed_config"] = DistributedConfig(fsdp_size=2)
    model = LlamaForCausalLM.from_pretrained(folder / "base", **kwargs)
    torch.manual_seed(11)
    return LoRAGATrainer(
        model,
        args,
        train_dataset=rows,
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=dropout),
        lora_ga_config=LoRAGAConfig(**({"num_samples": 10} | lora_ga)),
        callbacks=callbacks,
    )


def adapter_of(trainer: LoRAGATrainer) -> dict[str, torch.Tensor]:
    return {
        name: read_parameter(parameter).clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }


def losses(trainer: LoRAGATrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


class Look(TrainerCallback):
    """Keeps the start, before the first step."""

    def __init__(self) -> None:
        self.start: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.start:
            self.start = adapter_of(self.trainer)


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def trained(engine: str, folder: Path, name: str, lora_ga: dict[str, Any], **changes: Any) -> dict[str, Any]:
    look = Look()
    trainer = make_trainer(engine, folder, name, lora_ga, callbacks=[look], **changes)
    look.trainer = trainer
    trainer.train()
    report = trainer.lora_ga_report
    return {
        "start": look.start,
        "end": adapter_of(trainer),
        "losses": losses(trainer),
        "loss_after": report.loss_after,
        "bytes_sent": report.bytes_sent,
        "samples": report.samples,
        "items": report.items,
        "sketched": [layer.sketched for layer in report.layers],
        "shapes": [layer.shape for layer in report.layers],
        "processes": trainer.accelerator.num_processes,
    }


def main_part(engine: str, folder: Path) -> dict[str, Any]:
    rows = tiny.causal_rows(4 * STEPS)
    run = functools.partial(trained, engine, folder)
    exact = {"estimator": "exact"}
    found = {
        "exact": run("exact", exact, rows=rows, save_strategy="steps", save_steps=SAVED),
        # No multiple of the 4 samples of a round, so processes repeat some; the two halves of an accumulation differ.
        "sketch": run("sketch", {"num_samples": ROWS, **SKETCH}, gradient_accumulation_steps=2, max_steps=1),
        "lora_pro": run("lora_pro", {"correction": "lora_pro", **exact}, rows=rows),
    }
    if not engine.startswith("zero"):
        adamw = {"correction": "lora_pro_adamw", **exact}
        found["lora_pro_adamw"] = run("lora_pro_adamw", adamw, rows=rows, weight_decay=0.1, learning_rate=1e-4)
    return found


PARTS = {"main": main_part}


def run_part(engine: str, part: str, folder: Path) -> dict[str, Any]:
    return PARTS[part](engine, folder)


if __name__ == "__main__":
    engine, part, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if engine != "single":
        assert os.environ.get("WORLD_SIZE") == "2", "an engine is tested on two processes"
    torch.set_num_threads(1)
    found = run_part(engine, part, folder)
    rank = os.environ.get("RANK", "0")
    (folder / engine).mkdir(exist_ok=True)
    torch.save(found, folder / engine / f"{part}-{rank}.pt")
