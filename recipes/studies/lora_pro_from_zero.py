"""
Train with LoRA-Pro from plain LoRA's start, where `B = 0`, and from LoRA-GA's.

    python recipes/studies/lora_pro_from_zero.py

trains a tiny random Llama on random words with each start, correction, rate and seed. It prints the loss at the end,
how far it lies from plain AdamW's with the same start, rate and seed, and how far `A` has moved. Takes 15 minutes on
one CPU core (90 trainings of 10 seconds). What is done is kept in `outputs/lora_pro_from_zero.jsonl`: the same command
goes on from there. `--inits none --seeds 0 --steps 3 --rates 1e-3 1e-9` shows the first steps in half a minute.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, find_adapted_layers


WORDS = 97
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def random_rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, WORDS, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def rows_of_A(model: PreTrainedModel) -> list[Tensor]:
    # An anchored layer stores [A; A - A0].
    return [layer.stored_A.detach()[: layer.rank].clone() for layer in find_adapted_layers(model)]


class LookAtStart(TrainerCallback):
    """Keep `A` as it is when training begins: the start is written by then."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.starts = rows_of_A(model)


def train(init: str, correction: str, rate: float, steps: int, seed: int) -> tuple[float, float]:
    """Return the mean loss of the last tenth of the steps, and `|A - A0| / |A0|`, the mean over layers."""
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, warmup_steps=steps // 10, learning_rate=rate, seed=seed, logging_steps=1,
        per_device_train_batch_size=8, report_to=[], save_strategy="no", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    look = LookAtStart()
    trainer = LoRAGATrainer(
        model,
        arguments,
        train_dataset=random_rows(64, seed),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        lora_ga_config=LoRAGAConfig(init=init, correction=correction),
        callbacks=[look],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]
    pairs = zip(rows_of_A(trainer.model), look.starts, strict=True)
    moved = [((A - start).norm() / start.norm()).item() for A, start in pairs]
    return statistics.mean(losses[-max(1, steps // 10) :]), statistics.mean(moved)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inits", nargs="+", default=["none", "lora_ga"])
    parser.add_argument("--corrections", nargs="+", default=["none", "lora_pro", "lora_pro_adamw"])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of training, a tenth of them warm-up")
    parser.add_argument("--results", type=Path, default=Path("outputs/lora_pro_from_zero.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    done = {tuple(key): found for key, found in map(json.loads, lines)}

    def found(*key):
        if key not in done:
            done[key] = train(*key)
            with args.results.open("a") as file:
                file.write(json.dumps([key, done[key]]) + "\n")
        return done[key]

    print("| init | correction | rate | loss at the end | beside none | change of A |\n|---|---|---|---|---|---|")
    for init in args.inits:
        for correction in args.corrections:
            for rate in args.rates:
                runs = [found(init, correction, rate, args.steps, seed) for seed in args.seeds]
                plain = [done.get((init, "none", rate, args.steps, seed), [float("nan")])[0] for seed in args.seeds]
                losses, moved = ([run[i] for run in runs] for i in range(2))
                gaps = [loss - other for loss, other in zip(losses, plain, strict=True)]
                cells = (init, correction, f"{rate:g}", spread(losses), spread(gaps), spread(moved))
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
