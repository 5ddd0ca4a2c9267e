"""
Measure what a learning rate that was found costs against the best one of a sweep.

    python recipes/studies/learning_rates.py --results learning_rates.json

A Llama of 0.3 million parameters is trained on the bytes of Python sources (asyncio's, of the standard library); its
adapter then learns the standard library's reference manual (pydoc_data/topics.py), or with `--task` another text. Each
cell is an init, a rank and an optimizer, trained at eleven rates from 1e-4 to 3e-2 for 120 steps of 16 rows of 64
bytes, with 12 warm-up steps and a linear decay. The score is the loss on 300 held-out rows (18,900 bytes).

Printed for each cell and seed: the best rate (of the parabola through the best three), the found one, and the regret:
the loss after training with the found rate less the least of the sweep. The last lines compare with one rate for all
cells, and with `--rivals`, each with its cost. Their losses are read off the sweep, on the straight line between
neighbours, which lies above the true loss; the found rate's is printed that way, too. `factors` (rate times the step
that the start's norms give) and `sqrt(s r)` (rate times it, arXiv 2602.06204) have constants fitted on "plain" and are
judged on the others. The sweep takes about an hour on a CPU core, rivals a quarter more. All continues from its file.

`prodigy` and the schedule-free ones train without a rate to choose. Their regret is their loss less the best of AdamW
in the same cell; LoRA+'s ratio is left out. They need libraries: `pip install --no-deps prodigyopt schedulefree`.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from byte_model import SIZES, TASKS, arguments, load_base, train_base
from peft import LoraConfig
from rival_rules import (
    FREE,
    RACE_STEPS,
    RACERS,
    RANGE_STEPS,
    Racer,
    RangeTest,
    free_settings,
    published,
    require_libraries,
    size_of_start,
    steepest,
    valley,
)
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
    "lora_plus, ratio 4": ({"init": "none", "loraplus_lr_ratio": 4.0}, {}),
    "plain, B alone": ({"init": "none", "train_A": False}, {}),
    "plain, r = 2, alpha = 64": ({"init": "none"}, {"r": 2, "lora_alpha": 64}),
    "plain, r = 16, alpha = 32": ({"init": "none"}, {"r": 16, "lora_alpha": 32}),
    "plain, r = 64": ({"init": "none"}, {"r": 64}),
    "plain, r = 64, alpha = 128": ({"init": "none"}, {"r": 64, "lora_alpha": 128}),
    "plain + muon": ({"init": "none", "correction": "muon"}, {}),
    "plain + muon, r = 64, alpha = 128": ({"init": "none", "correction": "muon"}, {"r": 64, "lora_alpha": 128}),
    "directions, whitened": ({"init": "gradient_directions", "whitening": 0.5}, {}),
    "lora_ga + lora_pro": ({"init": "lora_ga", "correction": "lora_pro"}, {}),
    "plain + lora_pro_adamw": ({"init": "none", "correction": "lora_pro_adamw"}, {}),
}


RIVALS = ("range test", "race", *FREE)
FITTED_ON = "plain"


def make_trainer(
    base: dict[str, Tensor],
    task: str,
    cell: str,
    rate: float,
    seed: int,
    steps: int,
    kind: type[LoRAGATrainer] = LoRAGATrainer,
    changes: dict[str, Any] | None = None,
    own: dict[str, Any] | None = None,
) -> LoRAGATrainer:
    """Return the trainer of a cell. `changes` are of the arguments, `own` of the trainer: an optimizer of its own."""
    start, adapter = CELLS[cell]
    if changes or own:
        start = {name: value for name, value in start.items() if name != "loraplus_lr_ratio"}
    train, held_out = TASKS[task]()
    set_seed(seed)
    return kind(
        load_base(base),
        arguments(rate, seed, steps, **(changes or {})),
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=LoraConfig(**({"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | adapter)),
        lora_ga_config=LoRAGAConfig(**start),
        **(own or {}),
    )


def try_rival(rule: str, make: Callable[..., LoRAGATrainer]) -> dict[str, float]:
    """Return what a rival chose: a rate, or the loss of a training that has none to choose."""
    if rule == "range test":
        trainer = make(1e-3, steps=RANGE_STEPS, kind=RangeTest)
        trainer.train()
        return {"steepest": steepest(trainer.tried), "valley": valley(trainer.tried)}
    if rule == "race":
        losses = {}
        for rate in RACERS:
            racer = make(rate, kind=Racer)
            racer.train()
            losses[rate] = racer.mean_loss()
        return {"race": min(losses, key=losses.__getitem__)}
    rate, changes, own = free_settings(rule)
    return {rule: loss_after_training(make(rate, changes=changes, own=own))}


def can_step(rule: str, cell: str) -> bool:
    """
    Tell whether a rival can train a cell.

    An optimizer of its own can't be corrected, and Prodigy looks at all entries at once, which anchored factors
    forbid.
    """
    start = CELLS[cell][0]
    if rule in FREE and "correction" in start:
        return False
    return rule != "prodigy" or start["init"] != "lora_ga"


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
    parser.add_argument("--task", choices=TASKS, default="manual", help="the text to learn")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=[])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training, a tenth of them warm-up")
    parser.add_argument("--base_steps", type=int, default=1500, help="of the base model's training")
    args = parser.parse_args()
    require_libraries(args.rivals)
    torch.set_num_threads(1)
    results: dict[str, float] = json.loads(args.results.read_text()) if args.results.exists() else {}
    base = train_base(args.base_steps)
    for cell in args.cells:
        for seed in args.seeds:
            key = f"{args.task}|{cell}|{seed}"
            make = partial(make_trainer, base, args.task, cell, seed=seed, steps=args.steps)
            if f"{key}|loss at found" not in results:
                trainer = make(1e-3)
                report = find_learning_rate(trainer)
                results[f"{key}|found"], results[f"{key}|passes"] = report.learning_rate, report.forward_passes
                # The adapter has its start now.
                results[f"{key}|size"] = size_of_start(trainer, CELLS[cell][0].get("loraplus_lr_ratio", 1.0))
                results[f"{key}|loss at found"] = loss_after_training(make(report.learning_rate))
                args.results.write_text(json.dumps(results, indent=1))
            for rate in args.rates:
                if f"{key}|{rate:.3e}" not in results:
                    results[f"{key}|{rate:.3e}"] = loss_after_training(make(rate))
                    args.results.write_text(json.dumps(results, indent=1))
            for rule in filter(lambda rule: can_step(rule, cell), args.rivals):
                kept = f"{key}|{'steepest' if rule == 'range test' else rule}"
                if kept not in results:
                    chosen = try_rival(rule, make)
                    results.update({f"{key}|{name}": value for name, value in chosen.items()})
                    args.results.write_text(json.dumps(results, indent=1))
    print_table(results, args.task, args.cells, args.seeds, args.rates)


def print_table(results: dict[str, float], task: str, cells: list[str], seeds: list[int], rates: list[float]) -> None:
    print("| cell | seed | best rate | its loss | found rate | forward passes | regret |")
    print("|---|---|---|---|---|---|---|")
    regrets: dict[str, list[float]] = {
        name: [] for name in ("found", "found, read off the sweep", *(f"{rate:g}" for rate in CONSTANTS))
    }
    spreads = []
    for cell in cells:
        lowest = []
        for seed in seeds:
            of_run = lambda what: results[f"{task}|{cell}|{seed}|{what}"]  # noqa: B023 - called in this round only
            losses = {rate: of_run(f"{rate:.3e}") for rate in rates}
            rate, loss = best_of(losses)
            lowest.append(loss)
            regrets["found"].append(of_run("loss at found") - loss)
            regrets["found, read off the sweep"].append(loss_at(losses, of_run("found")) - loss)
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

    print_rivals(results, task, cells, seeds, rates)


def print_rivals(results: dict[str, float], task: str, cells: list[str], seeds: list[int], rates: list[float]) -> None:
    """Print the regrets of the rules, over the cells that each has been tried in."""
    keys = [(cell, seed) for cell in cells for seed in seeds]
    name_of = lambda key, what: f"{task}|{key[0]}|{key[1]}|{what}"
    swept = {key: {rate: results[name_of(key, f"{rate:.3e}")] for rate in rates} for key in keys}
    of = lambda what: {key: results[name_of(key, what)] for key in keys if name_of(key, what) in results}
    rules: dict[str, tuple[str, dict[tuple[str, int], float]]] = {
        "published, by hidden size": ("nothing", dict.fromkeys(keys, published(SIZES["hidden_size"]))),
        "range test, steepest": (f"{RANGE_STEPS} steps", of("steepest")),
        "range test, valley": (f"{RANGE_STEPS} steps", of("valley")),
        "race of three": (f"{(len(RACERS) - 1) * RACE_STEPS} steps", of("race")),
    }
    fitted_on = [key for key in keys if key[0] == FITTED_ON]
    root = lambda cell: math.sqrt(({"r": 8, "lora_alpha": 16} | CELLS[cell][1])["lora_alpha"])  # s r = alpha
    laws = {"factors": of("size"), "sqrt(s r)": {key: root(key[0]) for key in keys}}
    for law, sizes in laws.items() if fitted_on else ():
        constant = statistics.geometric_mean([best_of(swept[key])[0] * sizes[key] for key in fitted_on])
        others = {key: constant / size for key, size in sizes.items() if key[0] != FITTED_ON}
        rules[law] = (f"a sweep of {FITTED_ON!r}", others)
    print("\n| rule | cost before training | cells | median regret | worst |\n|---|---|---|---|---|")
    for rule, (cost, chosen) in rules.items():
        print_rule(rule, cost, [loss_at(swept[key], rate) - best_of(swept[key])[1] for key, rate in chosen.items()])
    for rule in FREE:
        print_rule(rule, "nothing", [loss - best_of(swept[key])[1] for key, loss in of(rule).items()])


def print_rule(rule: str, cost: str, regrets: list[float]) -> None:
    if regrets:
        print(f"| {rule} | {cost} | {len(regrets)} | {statistics.median(regrets):.4f} | {max(regrets):.4f} |")


if __name__ == "__main__":
    main()
