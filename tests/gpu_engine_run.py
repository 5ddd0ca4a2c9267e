"""
Train tiny Llama on one device under an engine and write down what came of it; run by `tests/test_gpu.py`.

    torchrun --standalone --nproc_per_node 1 tests/gpu_engine_run.py ENGINE DEVICE BASE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

import tiny
import torch
from peft import LoraConfig
from processes import end_processes
from transformers import AutoModelForCausalLM, TrainerCallback

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer
from lora_ga_trainer.engines.parameters import read_parameter


def zero(stage: int) -> dict[str, Any]:
    offloads = {"offload_optimizer": {"device": "cpu"}}
    if stage == 3:
        # Without a threshold of 0 ZeRO-3 would leave weights as small as these whole.
        offloads |= {"offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage, **offloads},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    }


ENGINES: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}},
    "zero2_offload": zero(2),
    "zero3_offload": zero(3),
}


class Look(TrainerCallback):
    """Keeps the start."""

    start: dict[str, torch.Tensor]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            named = [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
            self.start = {name: read_parameter(p).detach().cpu().clone() for name, p in named}


def main(engine: str, device: str, base: str, folder: Path) -> None:
    torch.set_num_threads(1)
    # Before the model: where DeepSpeed's stage is 3, `from_pretrained` then loads it in parts.
    args = tiny.arguments(folder / engine, use_cpu=device == "cpu", max_steps=4, **ENGINES[engine])
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(11)
    look = Look()
    trainer = LoRAGATrainer(
        model,
        args,
        train_dataset=tiny.causal_rows(24),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        lora_ga_config=LoRAGAConfig(num_samples=8),
        callbacks=[look],
    )
    trainer.train()
    report = trainer.lora_ga_report
    found = {
        "loss before": report.loss_before,
        "loss after": report.loss_after,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "start": look.start,
    }
    torch.save(found, folder / f"{engine}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
    end_processes()
