"""
Measure what a sketch keeps of the directions of the whitened gradient (`LoRAGAConfig(whitening=...)`).

    python tests/benchmarks/whitened.py --output whitened.json     # SmolLM2-135M, 10 minutes on a busy CPU core
    python tests/benchmarks/whitened.py --quick                    # tiny, seconds: shows it works

It stands with the tests because it calls routines that are not public. The samples are rows of Python's reference
manual. Looked at are q, o, v, gate and down of the first, the middle and the last block.
`init="gradient_directions"` takes r right singular vectors of the whitened gradient: X of the whole one, V of a sketch
with each number of columns (`exact` where a sketch is not worth it). Told are the overlap `||V^T X||^2 / r` and the
energy that V holds of the whitened gradient relative to X, mean and worst. The last row has the directions of the
gradient that is not whitened.
"""

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "benchmarks"))

import torch
from comparison.environment import environment
from cost_models import random_llama, smollm2_and_tokenizer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainingArguments

from lora_ga_trainer import GradientEstimate, LoRAGAConfig, LoRAGATrainer, estimate_gradients, find_adapted_layers
from lora_ga_trainer.maths.whitening import whiten, whiteners
from lora_ga_trainer.starts.directions import find_directions


KINDS = ("q_proj", "o_proj", "v_proj", "gate_proj", "down_proj")
Rows = list[dict[str, Tensor]]
Found = dict[str, list[tuple[float, float]]]  # by the columns: overlap and energy of each layer


def rows_of(ids: Tensor, samples: int, length: int) -> Rows:
    rows = ids[: samples * length].view(samples, length)
    return [{"input_ids": row.clone(), "labels": row.clone()} for row in rows]


def model_and_rows(quick: bool, samples: int, length: int) -> tuple[nn.Module, Rows]:
    if quick:
        torch.manual_seed(0)
        return random_llama(160, 192, 1, 4), rows_of(torch.randint(0, 4096, (samples * length,)), samples, length)
    model, tokenizer = smollm2_and_tokenizer()
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    text = path.read_text(encoding="utf-8")[: 20 * samples * length]
    return model, rows_of(torch.tensor(tokenizer(text).input_ids), samples, length)


def compare(model: nn.Module, rows: Rows, w: float, columns: list[int], r: int) -> Found:
    blocks = sorted({0, model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 1})
    adapted = get_peft_model(
        model, LoraConfig(r=r, target_modules=list(KINDS), layers_to_transform=blocks, layers_pattern="layers")
    )
    config = LoRAGAConfig(init="gradient_directions", whitening=w, num_samples=len(rows), min_energy_kept=None)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, per_device_train_batch_size=1, report_to=[], disable_tqdm=True)
        trainer = LoRAGATrainer(adapted, settings, train_dataset=rows, lora_ga_config=LoRAGAConfig(init="none"))
        trainer.model_wrapped = trainer.model
        estimate = lambda **changes: estimate_gradients(trainer, LoRAGAConfig(**{**config.to_dict(), **changes}))
        whole = estimate(estimator="exact")
        sketches = {k: estimate(sketch_size=k) for k in columns}
    layers = find_adapted_layers(adapted)
    best = find_directions(config, layers, whole)
    found: Found = {str(k): [] for k in columns} | {"not whitened": []}
    of_sketches = {k: find_directions(config, layers, sketch) for k, sketch in sketches.items()}
    for layer in layers:
        G, name = whitened(whole, layer.name, w), layer.name
        X = best[name].top.Vt[:r]
        raw = torch.linalg.svd(whole.estimators[name].G, full_matrices=False)[2][:r]
        tried = {"not whitened": raw}
        for k, found_by in of_sketches.items():
            if sketches[k].estimators[name].sketched:
                tried[str(k)] = found_by[name].top.Vt[:r]
        for key, V in tried.items():
            energy = (G @ V.T).square().sum() / (G @ X.T).square().sum()
            found[key].append(((V @ X.T).square().sum().item() / r, energy.item()))
    adapted.unload()
    return found


def whitened(whole: GradientEstimate, name: str, w: float) -> Tensor:
    moments = whole.moments[name]
    by = whiteners(moments.output_second_moments, moments.input_second_moments, w)
    return whiten(whole.estimators[name].G, by)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of a row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--columns", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--whitening", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--quick", action="store_true", help="a tiny model, 16 rows of 8 tokens, rank 2")
    parser.add_argument("--output", help="a JSON file for the figures of every layer")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.tokens, args.rank, args.columns = 16, 8, 2, [8, 16]
    model, rows = model_and_rows(args.quick, args.samples, args.tokens)
    found = {w: compare(model, rows, w, args.columns, args.rank) for w in args.whitening}
    for w, by_columns in found.items():
        for key, figures in by_columns.items():
            words = []
            for name, values in zip(("overlap", "energy"), zip(*figures, strict=True), strict=bool(figures)):
                words.append(f"{name} {statistics.mean(values):.3f} ({min(values):.3f})")
            print(f"w={w:g} {key:>12s}: {', '.join(words) or 'exact'}, {len(figures)} layers")
    if args.output:
        result = {"arguments": vars(args), **environment(), "found": found}
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
