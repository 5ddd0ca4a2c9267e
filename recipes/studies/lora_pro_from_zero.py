"""
Train with LoRA-Pro from plain LoRA's start, where `B = 0`.

    python recipes/studies/lora_pro_from_zero.py

trains a tiny random Llama on random words with each correction, and prints the loss at the end and how far `A` has
moved. Takes 10 minutes on one CPU core; `--steps 3 --rates 1e-3 1e-9` shows the first steps in one.
"""

import argparse
import statistics
import tempfile

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, find_adapted_layers


WORDS = 97
SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def random_rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, WORDS, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def train(correction: str, rate: float, steps: int, seed: int) -> tuple[float, float]:
    """Return the mean loss of the last tenth of the steps, and `|A - A0| / |A0|`, the mean over layers."""
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, warmup_steps=steps // 10, learning_rate=rate, seed=seed, logging_steps=1,
        per_device_train_batch_size=8, report_to=[], save_strategy="no", disable_tqdm=True, log_level="error",
        use_cpu=True,
    )  # fmt: skip
    trainer = LoRAGATrainer(
        model,
        arguments,
        train_dataset=random_rows(64, seed),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        lora_ga_config=LoRAGAConfig(init="none", correction=correction),
    )
    layers = find_adapted_layers(trainer.model)
    before = [layer.stored_A.detach().clone() for layer in layers]
    trainer.train()
    losses = [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]
    moved = [((layer.stored_A.detach() - A).norm() / A.norm()).item() for layer, A in zip(layers, before, strict=True)]
    return statistics.mean(losses[-max(1, steps // 10) :]), statistics.mean(moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corrections", nargs="+", default=["none", "lora_pro", "lora_pro_adamw"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of training, a tenth of them warm-up")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| correction | rate | loss at the end | change of A |\n|---|---|---|---|")
    for correction in args.corrections:
        for rate in args.rates:
            found = [train(correction, rate, args.steps, seed) for seed in args.seeds]
            cells = [
                f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
                for values in zip(*found, strict=True)
            ]
            print(f"| {correction} | {rate:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
