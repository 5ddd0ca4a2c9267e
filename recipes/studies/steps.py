"""
Ask whether another step of the factors needs fewer of them than AdamW's.

    python recipes/studies/steps.py --results steps.json

A byte-level Llama learns a text (see byte_model.py) from plain LoRA's start, alpha = 2r, with each optimizer:

* `adamw`, and `lora_plus`: the same with a rate of B that is 16 times that of A;
* `exact_muon`, `soap`, `polora`: see factor_steps.py;
* `muon`, `lora_pro`, `lora_pro_adamw`: the package's own.

The rate is swept on seed 0 until the best one has worse ones on either side. It and its neighbours are run on all
seeds, and the best mean counts. Seeds fix the data order and the random `A0`, so differences are paired. Printed are
the loss, its difference to AdamW's, and how many times fewer steps reach AdamW's: the training is repeated with
shorter schedules, down to their ends, until the mean loss is above AdamW's at full length.

A training takes about 12 s on one quiet CPU core, and an optimizer about 12 of them at each rank: 40 minutes for all.
Continues from its file.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from byte_model import TASKS, arguments, load_base, train_base
from directions import paired, spread, with_lora
from factor_steps import ENTRIES
from transformers import set_seed

from lora_ga_trainer import OPTIMIZERS, LoRAGAConfig, LoRAGATrainer


# Settings of the config, and the rate that the sweep begins at.
ARMS = {
    "adamw": ({}, 1e-2),
    "lora_plus": ({"loraplus_lr_ratio": 16.0}, 3e-3),
    "muon": ({"correction": "muon"}, 1e-2),
    "exact_muon": ({"correction": "exact_muon"}, 3e-3),
    "soap": ({"correction": "soap"}, 1e-2),
    "polora": ({"correction": "polora"}, 1e-1),
    "lora_pro": ({"correction": "lora_pro"}, 1e-2),
    "lora_pro_adamw": ({"correction": "lora_pro_adamw"}, 3e-3),
}
SHORTER = (1.1, 1.2, 1.5, 2.0)
DIVERGED = 1e9


def rate_of(index: int) -> float:
    return 10 ** (index / 4)


class Study:
    """The trainings of all optimizers on one task, of which each is run once and kept."""

    def __init__(self, results: Path, task: str, base_steps: int, steps: int) -> None:
        OPTIMIZERS.update(ENTRIES)
        self.path, self.task, self.steps = results, task, steps
        self.losses: dict[str, float] = json.loads(results.read_text()) if results.exists() else {}
        self.base = train_base(base_steps)
        self.train_rows, self.held_out = TASKS[task]()

    def loss(self, arm: str, r: int, index: int, seed: int, steps: int | None = None) -> float:
        """Return the held-out loss after training at a rate of the grid."""
        steps = steps or self.steps
        key = f"{self.task}|{arm}|{r}|{rate_of(index):.3e}|{seed}|{steps}"
        if key not in self.losses:
            loss = self._train(arm, r, rate_of(index), seed, steps)
            self.losses[key] = loss if math.isfinite(loss) else DIVERGED
            self.path.write_text(json.dumps(self.losses, indent=1))
        return self.losses[key]

    def _train(self, arm: str, r: int, rate: float, seed: int, steps: int) -> float:
        set_seed(seed)
        trainer = LoRAGATrainer(
            with_lora(load_base(self.base), r, "plain"),
            arguments(rate, seed, steps),
            train_dataset=self.train_rows,
            eval_dataset=self.held_out,
            lora_ga_config=LoRAGAConfig(init="none", **ARMS[arm][0]),
        )
        try:
            trainer.train()
        except torch.linalg.LinAlgError:  # a factor that is not finite any more has no eigenvalues
            return math.inf
        return trainer.evaluate()["eval_loss"]

    def at_best_rate(self, arm: str, r: int, seeds: list[int]) -> tuple[int, list[float]]:
        """Sweep until the best rate is inside, in half decades and then in quarters, and return the losses there."""
        begin = round(4 * math.log10(ARMS[arm][1]))
        losses = {index: self.loss(arm, r, index, seeds[0]) for index in (begin - 2, begin, begin + 2)}
        for stride in (2, 1):
            while True:
                best = min(losses, key=losses.__getitem__)
                missing = [index for index in (best - stride, best + stride) if index not in losses]
                if not missing:
                    break
                losses |= {index: self.loss(arm, r, index, seeds[0]) for index in missing}
        of_seeds = {i: [self.loss(arm, r, i, seed) for seed in seeds] for i in (best - 1, best, best + 1)}
        best = min(of_seeds, key=lambda index: statistics.mean(of_seeds[index]))
        return best, of_seeds[best]

    def times_fewer(self, arm: str, r: int, index: int, seeds: list[int], wanted: float) -> float | None:
        """Return by how much the schedule can be shortened with a mean loss of at most `wanted`, or `None`."""
        found = None
        for factor in SHORTER:
            shorter = round(self.steps / factor)
            if statistics.mean(self.loss(arm, r, index, seed, shorter) for seed in seeds) > wanted:
                break
            found = factor
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("steps.json"), help="continued, if it is there")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--task", choices=TASKS, default="manual", help="the text that is learned")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250, help="of each training, a tenth of them warm-up")
    parser.add_argument("--base_steps", type=int, default=1500, help="of the base model's training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args.results, args.task, args.base_steps, args.steps)
    print("| rank | optimizer | best rate | loss (range) | less AdamW's (s.e.) | times fewer steps |")
    print("|---|---|---|---|---|---|", flush=True)
    for r in args.ranks:
        _, plain = study.at_best_rate("adamw", r, args.seeds)
        for arm in args.arms:
            index, losses = study.at_best_rate(arm, r, args.seeds)
            wanted = statistics.mean(plain)
            fewer = None if arm == "adamw" else study.times_fewer(arm, r, index, args.seeds, wanted)
            shown = "" if arm == "adamw" else f"below {SHORTER[0]}" if fewer is None else f"{fewer}"
            cells = f"{rate_of(index):.1e} | {spread(losses)} | {paired(losses, plain)} | {shown}"
            print(f"| {r} | {arm} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
