"""
Measure what a probe keeps of gradients whose singular values are known, and whether its estimate of that is true.

    python recipes/benchmarks/spectra.py --output spectra.json       # 72 layers, 90 seconds on a CPU core
    python recipes/benchmarks/spectra.py --quick

A model of linear layers is made, one for each spectrum, and 64 samples whose gradients add up to it. The probe of a
trainer looks at them, once with one pass alone and once with a second look where its own estimate asks for one
(`min_energy_kept`). Printed for each spectrum, over shapes, seeds, and the directions 1 to r and r + 1 to 2r:

* *kept*: energy of the best directions that the found ones hold, of the worse side of the weight, the least of all;
* *estimate less truth*: the lowest and the highest, of what the report says about it.

Spectra: `i^-p`, where 0 means that all are equal; those of independent entries, spread evenly over the samples;
and `tokens`, where inputs and output-gradients of every token are independent.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison.environment import environment
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

from lora_ga_trainer import GradientEstimate, LoRAGAConfig, LoRAGATrainer, estimate_gradients


SAMPLES = 64
POWERS = (0.0, 0.2, 0.35, 0.5, 1.0, 2.0)
SPECTRA = ("tokens", "entries", *(f"i^-{power:g}" for power in POWERS))


class Setup(NamedTuple):
    out_features: int
    in_features: int
    r: int


SETUPS = (Setup(896, 768, 8), Setup(640, 512, 4), Setup(1024, 1024, 4))


class Layers(nn.Module):
    """Linear layers whose loss is such that the gradient of each is `dy^T x` of what it is given."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False) for _ in SPECTRA])

    def forward(self, x: Tensor, dy: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Take `x (layers, tokens, in)` and `dy (layers, tokens, out)`."""
        parts = [(layer(rows) * dy[i]).sum() for i, (layer, rows) in enumerate(zip(self.layers, x, strict=True))]
        return {"loss": torch.stack(parts).sum() / labels.numel()}


def make_pairs(spectrum: str, setup: Setup, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `x (tokens, in)` and `dy (tokens, out)` whose `dy^T x` has the singular values asked for."""
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    tokens = 16 * SAMPLES
    if spectrum == "tokens":
        return draw(4 * tokens, setup.in_features), draw(4 * tokens, setup.out_features)
    count = min(setup.out_features, setup.in_features)
    if spectrum == "entries":
        S = torch.linalg.svdvals(draw(setup.out_features, setup.in_features))
    else:
        S = torch.arange(1.0, count + 1) ** -float(spectrum.removeprefix("i^-"))
    U, V, mix = (torch.linalg.qr(draw(n, count)).Q for n in (setup.out_features, setup.in_features, tokens))
    return mix @ V.T, (mix * S) @ U.T


def make_samples(
    setup: Setup, seed: int
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:  # (out, in) each; one micro-batch each
    """Return the gradient of each layer, and the samples that add up to them."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for spectrum in SPECTRA:
        x, dy = (part.reshape(SAMPLES, -1, part.shape[-1]) for part in make_pairs(spectrum, setup, generator))
        missing = 64 - x.shape[1]  # zeros, so that all layers have as many tokens
        pairs.append(tuple(nn.functional.pad(part, (0, 0, 0, missing)) for part in (x, dy)))
    gradients = [dy.flatten(0, 1).T @ x.flatten(0, 1) for x, dy in pairs]
    samples = [
        {
            "x": torch.stack([x[i] for x, _ in pairs]),
            "dy": torch.stack([dy[i] for _, dy in pairs]),
            "labels": torch.zeros(1, 64, dtype=torch.long),
        }
        for i in range(SAMPLES)
    ]
    return gradients, samples


def probe(setup: Setup, samples: list[dict[str, Tensor]], least: float | None) -> GradientEstimate:
    model = Layers((setup.out_features, setup.in_features))
    adapted = get_peft_model(model, LoraConfig(r=setup.r, target_modules=[f"layers.{i}" for i in range(len(SPECTRA))]))
    config = LoRAGAConfig(num_samples=SAMPLES, min_energy_kept=least)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=False,
        )
        trainer = LoRAGATrainer(
            adapted, args, train_dataset=samples, data_collator=lambda rows: rows[0], lora_ga_config=config
        )
        trainer.model_wrapped = trainer.model
        return estimate_gradients(trainer, config)


def compare(gradients: list[Tensor], setup: Setup, estimate: GradientEstimate) -> dict[str, list[dict[str, float]]]:
    """Return by spectrum, for the directions 1 to r and r + 1 to 2r, the share kept and what the estimate says."""
    found = {}
    for number, (spectrum, G) in enumerate(zip(SPECTRA, gradients, strict=True)):
        name = f"layers.{number}"
        top, best = estimate.estimators[name].svd(2 * setup.r), torch.linalg.svdvals(G).square()
        found[spectrum] = []
        for low, high in ((0, setup.r), (setup.r, 2 * setup.r)):
            held = (top.U[:, low:high].T @ G).square().sum(), (G @ top.Vt[low:high].T).square().sum()
            truth = min(part.item() for part in held) / best[low:high].sum().item()
            twice = float(name in estimate.seen_twice)
            found[spectrum].append({"kept": truth, "estimate": top.kept(low, high), "twice": twice})
    return found


def measure(setups: list[Setup], seeds: int, least: float) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Return by way (one pass, or as a trainer does) and spectrum what was kept in all set-ups."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        way: {spectrum: [] for spectrum in SPECTRA} for way in ("one pass", "with a second look")
    }
    for setup in setups:
        for seed in range(seeds):
            gradients, samples = make_samples(setup, seed)
            for way, asked in zip(found, (None, least), strict=True):
                for spectrum, rows in compare(gradients, setup, probe(setup, samples, asked)).items():
                    found[way][spectrum] += rows
            print(f"{setup.out_features} x {setup.in_features}, r = {setup.r}, seed {seed}: done", flush=True)
    return found


def table(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    lines = ["| way | spectrum | kept, at least | estimate less truth | seen twice |", "|---|---|---|---|---|"]
    for way, by_spectrum in found.items():
        for spectrum, rows in by_spectrum.items():
            gaps = [row["estimate"] - row["kept"] for row in rows]
            twice, least = sum(row["twice"] for row in rows) // 2, min(row["kept"] for row in rows)
            lines.append(
                f"| {way} | {spectrum} | {least:.3f} | {min(gaps):+.3f} to {max(gaps):+.3f} "
                f"| {twice:.0f} of {len(rows) // 2} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--min_energy_kept", type=float, default=LoRAGAConfig().min_energy_kept)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, one seed")
    parser.add_argument("--output", help="a JSON file for the figures of every layer")
    args = parser.parse_args()
    setups, seeds = ([SETUPS[1]], 1) if args.quick else (list(SETUPS), args.seeds)
    found = measure(setups, seeds, args.min_energy_kept)
    print(table(found))
    if args.output:
        result = {"arguments": vars(args), **environment(), "found": found}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
