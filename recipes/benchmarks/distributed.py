"""
Measure what a start costs on several processes, next to all-reducing full gradients.

    torchrun --nproc_per_node 2 recipes/benchmarks/distributed.py --output distributed.json

A random Llama (hidden 2048, one layer unless told otherwise), the same samples in all for any number of processes.
Every process reports its bytes on the wire, seconds, probe state and peak memory (`VmHWM`, reset after a plain step).
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.utils import gather_object
from finetuning.processes import end_processes
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class PlainStep(TrainerCallback):
    """Notes the peak of the start, before the first step."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.of_start = peak_bytes()
        reset_peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/distributed.json"))
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--estimator", default="sketch", choices=("sketch", "exact"))
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 11 * args.hidden // 4, "num_hidden_layers": args.layers}
    heads = {"num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 256}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads))
    ids = torch.randint(0, 256, (args.samples, args.tokens))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    plain = PlainStep()
    with tempfile.TemporaryDirectory() as folder:
        trainer = LoRAGATrainer(
            model,
            TrainingArguments(
                folder,
                max_steps=1,
                per_device_train_batch_size=max(1, args.samples // world),
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            peft_config=LoraConfig(r=args.rank, target_modules="all-linear"),
            lora_ga_config=LoRAGAConfig(num_samples=args.samples, estimator=args.estimator),
            callbacks=[plain],
        )
        reset_peak()
        trainer.train()
    report = trainer.lora_ga_report
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    mine = {
        "bytes_sent": report.bytes_sent,
        "full_gradient_bytes": 4 * weights,
        "share": report.bytes_sent / (4 * weights),
        "seconds": report.seconds,
        "probe_bytes": report.probe_bytes,
        "peak_of_start": plain.of_start,
        "peak_of_step": peak_bytes(),
    }
    ranks = gather_object([mine])
    if trainer.is_world_process_zero():
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"processes": world, "ranks": ranks}, indent=1) + "\n")
        for rank, found in enumerate(ranks):
            print(f"rank {rank} of {world}: {json.dumps(found)}")


if __name__ == "__main__":
    main()
    end_processes()
