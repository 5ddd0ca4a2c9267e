"""
Compare the rules that plan ranks, at equal parameters, each at its own best rate.

    python recipes/studies/ranks.py --results ranks.json

A byte-level Llama of 0.3 million parameters that knows the sources of asyncio learns one of two texts of the standard
library: the reference manual (pydoc_data/topics.py) or the tables of characters in encodings/. Adapters are of plain
LoRA on all linear layers with alpha = 2r, and have the parameters of a uniform r = 2 or r = 8. Each seed plans from 64
rows of its own, draws its own `A0` and reads the data in its own order, so differences are paired.

The sweep, on the first seed and with rates 10^(1/4) apart, goes on until the best rate has worse ones on either side.
The best rate and its two neighbours are then run on all seeds, and the best mean counts. The score is the loss on
18,900 held-out bytes. Takes about 8 minutes on a CPU core of its own (some 130 trainings of 40 steps) and continues
from its file.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from byte_model import arguments, load_base, manual, tables, train_base
from directions import paired
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import set_seed

from lora_ga_trainer import RULES, LoRAGAConfig, LoRAGATrainer, RankPlan, plan_ranks


TASKS = {"manual": manual, "tables": tables}
RATES = [10 ** (-4 + index / 4) for index in range(13)]
FIRST = (8, 9, 10)  # 1e-2 to 3.2e-2


class Study:
    """The trainings of all arms, of which each is run once and kept."""

    def __init__(self, results: Path, base_steps: int, steps: int) -> None:
        self.path, self.steps = results, steps
        self.found: dict[str, dict[str, float]] = json.loads(results.read_text()) if results.exists() else {}
        kept = results.with_suffix(f".{base_steps}.safetensors")
        self.base = load_file(kept) if kept.exists() else train_base(base_steps)
        save_file(self.base, kept)
        self.texts = {name: read() for name, read in TASKS.items()}
        self.plans: dict[str, RankPlan] = {}

    def trainer(self, task: str, rate: float, seed: int, lora: LoraConfig) -> LoRAGATrainer:
        train, held_out = self.texts[task]
        set_seed(seed)
        return LoRAGATrainer(
            load_base(self.base),
            arguments(rate, seed, self.steps),
            train_dataset=train,
            eval_dataset=held_out,
            peft_config=lora,
            lora_ga_config=LoRAGAConfig(init="none", probe_seed=seed),
        )

    def plan(self, task: str, r: int, rule: str, seed: int) -> RankPlan:
        """Return the plan of one seed, made once."""
        key = f"{task}|{r}|{rule}|{seed}"
        if key not in self.plans:
            self.plans[key] = plan_ranks(self.trainer(task, 1e-3, seed, uniform(r)), rule=rule)
        return self.plans[key]

    def loss(self, task: str, r: int, rule: str, rate: float, seed: int) -> float:
        """Return the held-out loss after training."""
        key = f"{task}|{r}|{rule}|{rate:.3e}|{seed}"
        if key not in self.found:
            plan = self.plan(task, r, rule, seed)
            trainer = self.trainer(task, rate, seed, plan.lora_config(uniform(r)))
            trainer.train()
            loss = trainer.evaluate()["eval_loss"]
            self.found[key] = {
                "loss": loss if math.isfinite(loss) else 1e9,
                "share": plan.spent / plan.budget,
                "missed": plan.missed,
                "least": min(plan.ranks.values()),
                "most": max(plan.ranks.values()),
            }
            self.path.write_text(json.dumps(self.found, indent=1))
        return self.found[key]["loss"]

    def at_best_rate(self, task: str, r: int, rule: str, seeds: list[int]) -> tuple[float, list[float]]:
        """Sweep on the first seed until the best rate is inside, and return it with the losses of all seeds."""
        loss = lambda index, seed: self.loss(task, r, rule, RATES[index], seed)
        losses = {index: loss(index, seeds[0]) for index in FIRST}
        while True:
            best = min(losses, key=losses.__getitem__)
            missing = [index for index in (best - 1, best + 1) if 0 <= index < len(RATES) and index not in losses]
            if not missing:
                break
            losses |= {index: loss(index, seeds[0]) for index in missing}
        near = [index for index in (best - 1, best, best + 1) if 0 <= index < len(RATES)]
        of_seeds = {index: [loss(index, seed) for seed in seeds] for index in near}
        best = min(of_seeds, key=lambda index: statistics.mean(of_seeds[index]))
        return RATES[best], of_seeds[best]


def uniform(r: int) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("ranks.json"), help="continued, if it is there")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8], help="uniform ranks whose parameters count")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=40, help="of each training, a tenth of them warm-up")
    parser.add_argument("--base_steps", type=int, default=600, help="of the base model's training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args.results, args.base_steps, args.steps)
    print("| task | budget of | rule | best rate | loss (range) | less uniform's (s.e.) | ranks | spent | missed |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for task in args.tasks:
        for r in args.ranks:
            _, plain = study.at_best_rate(task, r, "uniform", args.seeds)
            for rule in args.rules:
                rate, losses = study.at_best_rate(task, r, rule, args.seeds)
                runs = [study.found[f"{task}|{r}|{rule}|{rate:.3e}|{seed}"] for seed in args.seeds]
                ranks = f"{min(run['least'] for run in runs)}-{max(run['most'] for run in runs)}"
                spread = f"{statistics.mean(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})"
                means = [statistics.mean(run[name] for run in runs) for name in ("share", "missed")]
                print(
                    f"| {task} | r = {r} | {rule} | {rate:.1e} | {spread} | {paired(losses, plain)} | {ranks} "
                    f"| {means[0]:.1%} | {means[1]:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
