"""
Measure what finding the singular vectors of one layer costs, by shape.

    python tests/benchmarks/factorise.py --output factorise.json
    python tests/benchmarks/factorise.py --quick                       # small shapes, seconds: shows it works

It stands with the tests because it times two routines that are not public; the benchmarks of recipes/ time what a user
can call.

For `--layers` layers of each shape, in turns within each round: `turn`, what a turning point does, and `recover`, what
the end of the probe does, each for all layers in one call and layer by layer; and `peft`, PEFT's `svd_lowrank` of the
whole gradient. Milliseconds a layer, medians of the rounds. A GPU is used where there is one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"))

import torch
from comparison.environment import environment
from cost_models import clock
from torch import Tensor

from lora_ga_trainer import LoRAGAConfig
from lora_ga_trainer.gradients.accumulator import Accumulator
from lora_ga_trainer.gradients.sketch import make_accumulators, top_svds, turn


# (out, in): SmolLM2-135M's MLP, an expert of Qwen3-MoE, a Llama of hidden size 2048, Llama-2-7B.
SHAPES = [(1536, 576), (768, 2048), (512, 2048), (2048, 2048), (5632, 2048), (4096, 4096), (11008, 4096)]


def make_gradient(shape: tuple[int, int], generator: torch.Generator, device: str) -> Tensor:
    """Make a `G (out, in)` whose singular values decay as 1, 1/2, 1/3, ..."""
    left, right = (torch.randn(n, 128, generator=generator).to(device) for n in shape)
    return (left / torch.arange(1, 129, device=device)) @ right.T


def sketch_gradient(G: Tensor, rank: int) -> Accumulator:
    (accumulator,) = make_accumulators([("layer", tuple(G.shape))], LoRAGAConfig(), rank).values()
    accumulator.move_to(G.device)
    accumulator.add_gradient(G, 1.0)
    return accumulator


def make_ways(G: list[Tensor], rank: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, each over all layers."""
    layers = {str(index): sketch_gradient(matrix, rank) for index, matrix in enumerate(G)}
    wanted, q = dict.fromkeys(layers, 2 * rank), min(4 * rank, *G[0].shape)
    return {
        "turn": lambda: turn(list(layers.values())),
        "turn, layer by layer": lambda: [turn([layer]) for layer in layers.values()],
        "recover": lambda: list(top_svds(layers, wanted).values()),
        "recover, layer by layer": lambda: [layer.svd(2 * rank) for layer in layers.values()],
        "peft": lambda: [torch.svd_lowrank(matrix, q=q, niter=4) for matrix in G],
    }


def time_round(G: list[Tensor], rank: int, backwards: bool) -> dict[str, float]:
    """Return seconds a layer of every way."""
    ways, found = make_ways(G, rank), {}
    for name in sorted(ways, reverse=backwards):
        begin = clock()
        ways[name]()
        found[name] = (clock() - begin) / len(G)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of each shape")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two small shapes, two rounds")
    parser.add_argument("--output", help="a JSON file for the figures")
    args = parser.parse_args()
    shapes = [(512, 1024), (1024, 1024)] if args.quick else SHAPES
    args.rounds = 2 if args.quick else args.rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, results = torch.Generator().manual_seed(args.seed), {}
    for shape in shapes:
        G = [make_gradient(shape, generator, device) for _ in range(args.layers)]
        time_round(G, args.rank, backwards=False)  # allocates
        found = [time_round(G, args.rank, number % 2 == 1) for number in range(args.rounds)]
        results["x".join(map(str, shape))] = found
        medians = {name: statistics.median(row[name] for row in found) for name in found[0]}
        print(shape, ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in medians.items()), flush=True)
    if args.output:
        result = {"arguments": vars(args), **environment(), "rounds": results}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
