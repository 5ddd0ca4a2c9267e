"""
Measure what a learning rate that was found costs against the best one of a sweep.

    python recipes/studies/learning_rates.py --results learning_rates.json

A Llama of 0.3 million parameters is trained on the bytes of Python sources (asyncio's, of the standard library); its
adapter then learns the standard library's reference manual (pydoc_data/topics.py). Each cell is an init, a rank and an
optimizer, trained at eleven rates from 1e-4 to 3e-2 for 120 steps of 16 rows of 64 bytes, with 12 warm-up steps and a
linear decay. The score is the loss on 300 held-out rows (18,900 bytes).

Printed for each cell and seed: the best rate (of the parabola through the best three), the found one, and the regret:
loss at the found rate, between those of its neighbours in the sweep, less the loss at the best rate. The last lines
compare with one rate for all cells. Takes about an hour on one CPU core and continues from its file.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from byte_model import arguments, load_base, manual, train_base
from peft import LoraConfig
from torch import Tensor
from transformers import set_seed

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, find_learning_rate


STEPS = 120
RATES = [10 ** (-4 + index / 4) for index in range(11)]
CONSTANTS = (1e-3, 2e-3, 5e-3)
# Settings of the start, and of the adapter.
CELLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"init": "none"}, {}),
    "lora_ga": ({"init": "lora_ga"}, {}),
    "lora_ga, matched": ({"init": "lora_ga", "scale": "matched"}, {}),
    "lora_one": ({"init": "lora_one"}, {}),
    "lora_plus": ({"init": "none", "loraplus_lr_ratio": 16.0}, {}),
    "plain, r = 2, alpha = 64": ({"init": "none"}, {"r": 2, "lora_alpha": 64}),
    "plain, r = 64": ({"init": "none"}, {"r": 64}),
}


def make_trainer(base: dict[str, Tensor], cell: str, rate: float, seed: int, steps: int) -> LoRAGATrainer:
    start, adapter = CELLS[cell]
    train, held_out = manual()
    set_seed(seed)
    return LoRAGATrainer(
        load_base(base),
        arguments(rate, seed, steps),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=LoraConfig(**({"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | adapter)),
        lora_ga_config=LoRAGAConfig(**start),
    )


def loss_after_training(trainer: LoRAGATrainer) -> float:
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    return loss if math.isfinite(loss) else math.inf


def best_of(losses: dict[float, float]) -> tuple[float, float]:
    """Return the rate where the parabola through the best three is lowest, in its logarithm, and the best loss."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda index: losses[rates[index]])
    if best in (0, len(rates) - 1):
        return rates[best], losses[rates[best]]
    left, least, right = (losses[rates[index]] for index in (best - 1, best, best + 1))
    shift = 0.5 * (left - right) / (left - 2 * least + right)
    return rates[best] * (rates[best + 1] / rates[best]) ** shift, least


def loss_at(losses: dict[float, float], rate: float) -> float:
    """Return the loss at a rate, linear in its logarithm between those of the sweep."""
    rates = sorted(losses)
    rate = min(max(rate, rates[0]), rates[-1])
    above = next(index for index, known in enumerate(rates) if known >= rate)
    if above == 0:
        return losses[rates[0]]
    low, high = rates[above - 1], rates[above]
    share = math.log(rate / low) / math.log(high / low)
    return losses[low] * (1 - share) + losses[high] * share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("learning_rates.json"), help="continued, if it is there")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training, a tenth of them warm-up")
    parser.add_argument("--base_steps", type=int, default=1500, help="of the base model's training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, float] = json.loads(args.results.read_text()) if args.results.exists() else {}
    base = train_base(args.base_steps)
    for cell in args.cells:
        for seed in args.seeds:
            found = f"{cell}|{seed}|found"
            if found not in results:
                report = find_learning_rate(make_trainer(base, cell, 1e-3, seed, args.steps))
                results[found] = report.learning_rate
                results[f"{cell}|{seed}|passes"] = report.forward_passes
            for rate in args.rates:
                if f"{cell}|{seed}|{rate:.3e}" not in results:
                    loss = loss_after_training(make_trainer(base, cell, rate, seed, args.steps))
                    results[f"{cell}|{seed}|{rate:.3e}"] = loss
                    args.results.write_text(json.dumps(results, indent=1))
    print_table(results, args.cells, args.seeds, args.rates)


def print_table(results: dict[str, float], cells: list[str], seeds: list[int], rates: list[float]) -> None:
    print("| cell | seed | best rate | its loss | found rate | forward passes | regret |")
    print("|---|---|---|---|---|---|---|")
    regrets: dict[str, list[float]] = {"found": []} | {f"{rate:g}": [] for rate in CONSTANTS}
    spreads = []
    for cell in cells:
        lowest = []
        for seed in seeds:
            of_run = lambda what: results[f"{cell}|{seed}|{what}"]  # noqa: B023 - called in this round only
            losses = {rate: of_run(f"{rate:.3e}") for rate in rates}
            rate, loss = best_of(losses)
            lowest.append(loss)
            regrets["found"].append(loss_at(losses, of_run("found")) - loss)
            for constant in CONSTANTS:
                regrets[f"{constant:g}"].append(loss_at(losses, constant) - loss)
            print(
                f"| {cell} | {seed} | {rate:.1e} | {loss:.4f} | {of_run('found'):.1e} | {of_run('passes'):.0f} "
                f"| {regrets['found'][-1]:.4f} |"
            )
        spreads.append(statistics.stdev(lowest) if len(lowest) > 1 else math.nan)
    print(f"\nStandard deviation of the best losses over seeds, mean over cells: {statistics.mean(spreads):.4f}\n")
    print("| rate | median regret | worst |\n|---|---|---|")
    for rule, values in regrets.items():
        print(f"| {rule} | {statistics.median(values):.4f} | {max(values):.4f} |")


if __name__ == "__main__":
    main()
