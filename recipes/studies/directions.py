"""
Ask whether there is room above tuned LoRA, and whether any directions of `A0` take it.

    python recipes/studies/directions.py --results directions.json

A byte-level Llama that knows Python sources learns Python's reference manual, or with `--task news` the BBC's news.
Every arm is trained at its own best rate. The sweep, on seed 0, goes on until the best rate has worse ones on either
side; then the best rate and its two neighbours are run on all seeds, and the best mean counts. Seeds fix the order of
the data and the random `A0`, so differences are paired. All but `full` and `lora_ga` start from `B = 0`, and the other
directions have rows of `A0` as long as plain LoRA's:

* `full`: full fine-tuning; `plain`: LoRA with alpha = 2r;
* `rslora`, `alpha16`, `alpha256`: plain LoRA scaled by 16 / sqrt(r), 16 / r and 256 / sqrt(r) (2606.12883);
* `orthogonal`: random orthonormal rows;
* `oracle`: the top right singular vectors of what full fine-tuning changed, with another seed, at its best rate;
* `w=0`, `w=.25`, `w=.5`: the top right singular vectors of `(P + l)^-w G (Q + l)^-w`. `G` is the gradient of 64 rows,
  `P` and `Q` are the mean squares of output-gradients and inputs by feature, divided by their means, and l is .01;
* `lora_da`: the rows of LoRA-DA (2510.24561) without its `B0`: the lowest eigenvectors of
  `-D^T D + .03 (tr P^-1 / N) Q^-1`, with `D = P^-1 G Q^-1`, `Q` the mean of `x x^T`, `P` the diagonal of that of
  `dy dy^T` a row at a time, both damped by l, and N training rows. .03 is the setting of the authors' code;
* `lora_ga`: LoRA-GA's own start.

Takes about 2 hours on one CPU core and continues from its file.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from byte_model import BATCH, TASKS, arguments, load_base, train_base
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, default_data_collator, set_seed

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, find_adapted_layers


ARMS = ("plain", "rslora", "alpha16", "alpha256", "orthogonal", "oracle", "w=0", "w=.25", "w=.5", "lora_da", "lora_ga")
RATES = [10 ** (-4.5 + index / 4) for index in range(15)]
SAMPLES, DAMPING, ORACLE_SEED = 64, 0.01, 100
Directions = dict[str, Tensor]  # by layer, (in, r): unit columns


def with_lora(model: nn.Module, r: int, arm: str) -> PeftModel:
    alpha = {"rslora": 16 * r**0.5, "alpha16": 16, "alpha256": 256 * r**0.5}.get(arm, 2 * r)
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear"))


def right_vectors(matrix: Tensor, r: int) -> Tensor:  # (out, in) -> (in, r)
    return torch.linalg.svd(matrix.double(), full_matrices=False)[2][:r].T


def rows_of_lora_da(G: Tensor, of_x: Tensor, of_dy: Tensor, count: int, r: int) -> Tensor:  # (in, r)
    """Return what LoRA-DA takes for `A0`, from means `(out, in)`, `(in, in)`, `(out,)` of samples of `count` rows."""
    P = of_dy + DAMPING * of_dy.mean()
    Q = of_x + DAMPING * of_x.diagonal().mean() * torch.eye(len(of_x), dtype=of_x.dtype)
    D = torch.linalg.solve(Q, (G / P[:, None]).T).T
    guidance = 0.03 * (1 / P).sum() / count * torch.linalg.inv(Q) - D.T @ D
    return torch.linalg.eigh(guidance).eigenvectors[:, :r]


class Study:
    """The trainings of all arms, of which each is run once and kept."""

    def __init__(self, results: Path, task: str, base_steps: int, steps: int) -> None:
        self.path, self.task, self.steps = results, task, steps
        self.losses: dict[str, float] = json.loads(results.read_text()) if results.exists() else {}
        self.base = train_base(base_steps)
        self.train_rows, self.held_out = TASKS[task]()
        self.linear = [layer.name for layer in find_adapted_layers(with_lora(self.model(), 1, "plain"))]
        self.rate_of_full = math.nan  # until it is swept
        self.change: dict[str, Tensor] | None = None

    def model(self) -> LlamaForCausalLM:
        return load_base(self.base)

    def loss(self, arm: str, r: int, rate: float, seed: int) -> float:
        """Return the held-out loss after training."""
        key = f"{self.task}|{arm}|{r}|{rate:.3e}|{seed}"
        if key not in self.losses:
            trainer = self._trainer(arm, r, rate, seed)
            trainer.train()
            loss = trainer.evaluate()["eval_loss"]
            self.losses[key] = loss if math.isfinite(loss) else 1e9
            self.path.write_text(json.dumps(self.losses, indent=1))
        return self.losses[key]

    def _trainer(self, arm: str, r: int, rate: float, seed: int) -> Trainer:
        set_seed(seed)
        data = {"train_dataset": self.train_rows, "eval_dataset": self.held_out}
        settings = arguments(rate, seed, self.steps)
        if arm == "full":
            return Trainer(self.model(), settings, **data)
        model = with_lora(self.model(), r, arm)
        if arm == "lora_ga":
            return LoRAGATrainer(model, settings, lora_ga_config=LoRAGAConfig(probe_seed=seed), **data)
        directions = self._directions(arm, r, seed)
        if directions is not None:
            write_rows(model, directions)
        return Trainer(model, settings, **data)

    def _directions(self, arm: str, r: int, seed: int) -> Directions | None:
        if arm == "oracle":
            return {name: right_vectors(change, r) for name, change in self._change_of_full().items()}
        if arm == "orthogonal":
            generator = torch.Generator().manual_seed(seed)
            shapes = {name: self.model().get_submodule(name).weight.shape for name in self.linear}
            draw = lambda size: torch.linalg.qr(torch.randn(size, r, generator=generator))[0]
            return {name: draw(shape[1]) for name, shape in shapes.items()}
        if arm.startswith("w="):
            exponent = float(arm.removeprefix("w="))
            whitened = {}
            for name, (G, of_x, of_dy) in self._statistics(seed).items():
                left, right = ((m / m.mean() + DAMPING) ** -exponent for m in (of_dy, of_x.diagonal()))
                whitened[name] = right_vectors(left[:, None] * G * right, r)
            return whitened
        if arm == "lora_da":
            return {
                name: rows_of_lora_da(*found, len(self.train_rows), r) for name, found in self._means(seed).items()
            }
        return None

    def _change_of_full(self) -> dict[str, Tensor]:
        """Train all weights at their best rate, and return by how much each layer has changed."""
        if self.change is None:
            set_seed(ORACLE_SEED)
            model = self.model()
            Trainer(
                model, arguments(self.rate_of_full, ORACLE_SEED, self.steps), train_dataset=self.train_rows
            ).train()
            before = self.model()
            of = lambda name: model.get_submodule(name).weight - before.get_submodule(name).weight
            self.change = {name: of(name).detach() for name in self.linear}
        return self.change

    def _statistics(self, seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return of each layer `G (out, in)`, the sum of `x x^T (in, in)` and that of the squares of `dy` `(out,)`."""
        model = self.model()
        found = {name: [0.0, 0.0, 0.0] for name in self.linear}

        def hook(name: str) -> Callable[..., None]:
            def after(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
                x = args[0].detach().flatten(0, -2).double()

                def add(dy: Tensor) -> None:
                    dy = dy.flatten(0, -2).double()
                    for index, value in enumerate((dy.T @ x, x.T @ x, dy.square().sum(0))):
                        found[name][index] = found[name][index] + value

                y.register_hook(add)

            return after

        handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in self.linear]
        order = torch.randperm(len(self.train_rows), generator=torch.Generator().manual_seed(seed)).tolist()
        for begin in range(0, SAMPLES, BATCH):
            rows = [self.train_rows[index] for index in order[begin : begin + BATCH]]
            model(**default_data_collator(rows)).loss.backward()
        for handle in handles:
            handle.remove()
        return {name: tuple(sums) for name, sums in found.items()}

    def _means(self, seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return `G` of the mean loss, the mean of `x x^T` and that of the squares of `dy`, the loss of one row's."""
        tokens = SAMPLES * len(self.train_rows[0]["input_ids"])
        return {
            name: (G * BATCH / SAMPLES, of_x / tokens, of_dy * BATCH**2 / tokens)
            for name, (G, of_x, of_dy) in self._statistics(seed).items()
        }

    def at_best_rate(self, arm: str, r: int, seeds: list[int]) -> tuple[float, list[float]]:
        """Sweep until the best rate is inside, and return it with the losses of all seeds."""
        losses = {index: self.loss(arm, r, RATES[index], seeds[0]) for index in range(2, len(RATES), 2)}
        while True:
            best = min(losses, key=losses.__getitem__)
            missing = [index for index in (best - 1, best + 1) if 0 <= index < len(RATES) and index not in losses]
            if not missing:
                break
            losses |= {index: self.loss(arm, r, RATES[index], seeds[0]) for index in missing}
        near = [index for index in (best - 1, best, best + 1) if 0 <= index < len(RATES)]
        of_seeds = {index: [self.loss(arm, r, RATES[index], seed) for seed in seeds] for index in near}
        best = min(of_seeds, key=lambda index: statistics.mean(of_seeds[index]))
        return RATES[best], of_seeds[best]


@torch.no_grad()
def write_rows(model: PeftModel, directions: Directions) -> None:
    """Point the rows of every `A` along directions. They keep their lengths."""
    for layer in find_adapted_layers(model):
        rows = directions[layer.name].T.to(layer.stored_A.dtype)
        lengths = layer.stored_A.norm(dim=1, keepdim=True)[: len(rows)]
        layer.stored_A[: len(rows)] = rows / rows.norm(dim=1, keepdim=True) * lengths


def paired(losses: list[float], others: list[float]) -> str:
    """Say by how much losses are above others, seed by seed, with the standard error of the mean."""
    gaps = [loss - other for loss, other in zip(losses, others, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan
    return f"{statistics.mean(gaps):+.4f} ({error:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("directions.json"), help="continued, if it is there")
    parser.add_argument("--task", choices=TASKS, default="manual", help="the text to learn")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=250, help="of each training, a tenth of them warm-up")
    parser.add_argument("--base_steps", type=int, default=1500, help="of the base model's training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args.results, args.task, args.base_steps, args.steps)
    study.rate_of_full, full = study.at_best_rate("full", 0, args.seeds)
    print("| rank | arm | best rate | loss (range) | less plain LoRA's (s.e.) | less full fine-tuning's (s.e.) |")
    print("|---|---|---|---|---|---|", flush=True)
    print(f"| | full | {study.rate_of_full:.1e} | {spread(full)} | | |", flush=True)
    for r in args.ranks:
        _, plain = study.at_best_rate("plain", r, args.seeds)
        for arm in args.arms:
            rate, losses = study.at_best_rate(arm, r, args.seeds)
            gaps = f"{paired(losses, plain)} | {paired(losses, full)}"
            print(f"| {r} | {arm} | {rate:.1e} | {spread(losses)} | {gaps} |", flush=True)


def spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f} ({min(losses):.4f}-{max(losses):.4f})"


if __name__ == "__main__":
    main()
