"""
Measure the rates of a start's parts on one layer: its passes, the products of its sketch, a turn and the recovery.

    python tests/benchmarks/products.py --dtype bfloat16 --output products.json
    ONEDNN_MAX_CPU_ISA=AVX2 python tests/benchmarks/products.py --dtype bfloat16 --shapes 2048x2048   # without AVX-512
    python tests/benchmarks/products.py --quick                             # a small shape, seconds: shows it works

It stands with the tests because it times routines that are not public. `passes` are `x W^T` and `dy W`. `sketch` is
what a micro-batch costs a sketch. `bare` are its four products as torch multiplies them, which is slow where a CPU has
no bf16 instructions. `exact` adds to a whole gradient. `turn` and `recover` as in factorise.py, of one layer.
Medians of the rounds, and the rates of what has a number of operations of its own.
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

from lora_ga_trainer import LoRAGAConfig
from lora_ga_trainer.gradients.accumulator import ExactGradient
from lora_ga_trainer.gradients.sketch import make_accumulators, turn


HELD_OUT = 16


def make_ways(shape: tuple[int, int], tokens: int, rank: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return what is timed."""
    out, of_in = shape
    x, dy, W = (torch.randn(*sizes).to(dtype) for sizes in ((tokens, of_in), (tokens, out), shape))
    (sketch,) = make_accumulators([("layer", shape)], LoRAGAConfig(), rank).values()
    exact = ExactGradient(shape)
    sketch.add(x, dy, 1.0)
    state = sketch.state()
    Omega, Psi = state["Omega"], state["Psi"]
    return {
        "passes": lambda: (x @ W.T, dy @ W),
        "bare": lambda: (dy.T @ (x @ Omega), x.T @ (dy @ Psi)),
        "sketch": lambda: sketch.add(x, dy, 1.0),
        "exact": lambda: exact.add(x, dy, 1.0),
        "turn": lambda: turn([sketch]),
        # With something to recover: a turn has put all into `S`.
        "recover": lambda: (sketch.add(x, dy, 1.0), sketch.svd(2 * rank)),
    }


def operations(shape: tuple[int, int], tokens: int, rank: int) -> dict[str, int]:
    """Return the operations of those ways that have a number of their own."""
    out, of_in = shape
    of_sketch = 4 * (8 * rank + HELD_OUT) * (out + of_in) * tokens
    whole = 2 * out * of_in * tokens
    return {"passes": 2 * whole, "bare": of_sketch, "sketch": of_sketch, "exact": whole}


def timed(way: Callable[[], object]) -> float:
    begin = clock()
    way()
    return clock() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "5632x2048", "4096x4096", "11008x4096"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one small shape, two rounds")
    parser.add_argument("--output", help="a JSON file for the figures")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.rounds, args.tokens = ["1024x512"], 2, 16
    torch.manual_seed(args.seed)
    results = {}
    for name in args.shapes:
        out, of_in = map(int, name.split("x"))
        ways = make_ways((out, of_in), args.tokens, args.rank, getattr(torch, args.dtype))
        rounds = [{way: timed(run) for way, run in ways.items()} for _ in range(args.rounds + 1)][1:]
        results[name] = rounds
        for way, count in (dict.fromkeys(ways) | operations((out, of_in), args.tokens, args.rank)).items():
            seconds = [row[way] for row in rounds]
            rate = f", {count / statistics.median(seconds) / 1e9:.0f} GFLOP/s" if count else ""
            spread = f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}"
            print(f"{name} {way:8s} {1e3 * statistics.median(seconds):8.1f} ms ({spread}){rate}", flush=True)
    if args.output:
        result = {"arguments": vars(args), **environment(), "rounds": results}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
