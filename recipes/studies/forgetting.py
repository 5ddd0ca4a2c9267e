"""
Measure what an adapter has forgotten, and what it costs to win that back by removing intruder dimensions.

    python recipes/studies/forgetting.py

A Llama of 0.3 million parameters is trained on the bytes of Python sources (asyncio's, of the standard library); its
adapter then learns text of another kind, the standard library's reference manual (pydoc_data/topics.py), at a large
and at a small rate. Measured before and after: the loss on held-out sources, of other modules than those the base was
trained on, and the loss on held-out pages of the manual. What the first one rises by is what was forgotten.

Printed: both losses of the base, of the adapter, of the adapter with its intruders scaled down to each strength, and,
for comparison, of the adapter with its whole change made smaller. Takes about 4 minutes of one CPU core.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from byte_model import arguments, load_base, manual, rows_of, train_base
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import set_seed

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, average_adapters, remove_intruders


SHARES = (0.95, 0.9, 0.75)  # of the whole change, for comparison
Losses = tuple[float, float]  # on held-out sources, on held-out pages of the manual


@torch.no_grad()
def losses(model: nn.Module) -> Losses:
    """Return the mean loss on text of the base's kind and of the adapter's, both held out."""
    found = []
    for rows in (rows_of("email/*.py", 40_000), manual()[1]):
        ids = torch.stack([row["input_ids"] for row in rows])
        parts = [model(input_ids=part, labels=part).loss * len(part) for part in ids.split(100)]
        found.append((sum(parts) / len(ids)).item())
    return found[0], found[1]


def train_adapter(base: dict[str, Tensor], init: str, rate: float, rank: int, steps: int, folder: str) -> None:
    """Train an adapter on the manual and save it."""
    set_seed(0)
    trainer = LoRAGATrainer(
        load_base(base),
        arguments(rate, 0, steps),
        train_dataset=manual()[0],
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
        lora_ga_config=LoRAGAConfig(init=init),
    )
    trainer.train()
    trainer.save_model(folder)


def measure(
    base: dict[str, Tensor], init: str, rate: float, rank: int, steps: int, strengths: list[float], k: int, eps: float
) -> tuple[int, dict[str, Losses]]:
    """Return the number of intruders, and the losses of the base, the adapter, and the adapter at each strength."""
    load = lambda folder: PeftModel.from_pretrained(load_base(base), folder).eval()
    with tempfile.TemporaryDirectory() as place:
        adapter, mended = str(Path(place) / "adapter"), str(Path(place) / "mended")
        train_adapter(base, init, rate, rank, steps, adapter)
        found, count = {"base": losses(load_base(base).eval()), "adapter": losses(load(adapter))}, 0
        for strength in strengths:
            count = remove_intruders(load_base(base), adapter, mended, strength=strength, k=k, eps=eps).intruders
            found[f"strength {strength:g}"] = losses(load(mended))
        for share in SHARES:
            average_adapters([adapter], mended, weights=[share])
            found[f"whole change times {share:g}"] = losses(load(mended))
    return count, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inits", nargs="+", default=["none", "lora_ga"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-2, 2e-3])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.9, 0.75, 0.5, 0.0])
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--eps", type=float, default=0.5)
    args = parser.parse_args()
    base = train_base(args.base_steps)
    print("| init | rate | intruders | model | loss, sources | loss, manual |\n|---|---|---|---|---|---|", flush=True)
    for init in args.inits:
        for rate in args.rates:
            count, found = measure(base, init, rate, args.rank, args.steps, args.strengths, args.k, args.eps)
            for name, (sources, pages) in found.items():
                print(f"| {init} | {rate:g} | {count} | {name} | {sources:.4f} | {pages:.4f} |", flush=True)


if __name__ == "__main__":
    main()
