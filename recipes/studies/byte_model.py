"""A small byte-level Llama and two texts that lie on every machine, for studies that need many trainings."""

import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed


LENGTH, BATCH, HELD_OUT = 64, 16, 300
SIZES = {
    "vocab_size": 256, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
Rows = list[dict[str, Tensor]]


def rows_of(pattern: str, limit: int) -> Rows:
    """Cut the first `limit` bytes of files of the standard library into rows."""
    root = Path(sysconfig.get_paths()["stdlib"])
    content = b"".join(path.read_bytes() for path in sorted(root.glob(pattern)))[:limit]
    ids = torch.tensor(list(content))
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row.clone(), "labels": row.clone()} for row in ids]


def train_base(steps: int) -> dict[str, Tensor]:
    """Return the weights of a model of 0.3 million parameters after `steps` on the sources of asyncio."""
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    rows = torch.stack([row["input_ids"] for row in rows_of("asyncio/*.py", 700_000)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 100) * (1 - step / steps)
        batch = rows[torch.randint(len(rows), (BATCH,))]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def load_base(weights: dict[str, Tensor]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.load_state_dict(weights)
    return model


def manual() -> tuple[Rows, Rows]:
    """Return rows of Python's reference manual (pydoc_data/topics.py): to train on, and 18,900 held-out bytes."""
    return split(rows_of("pydoc_data/topics.py", 600_000))


def tables() -> tuple[Rows, Rows]:
    """Return rows of the tables of characters in encodings/, likewise."""
    return split(rows_of("encodings/*.py", 600_000))


def split(rows: Rows) -> tuple[Rows, Rows]:
    """Return rows to train on, and 300 held-out ones."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    return [rows[index] for index in order[HELD_OUT:]], [rows[index] for index in order[:HELD_OUT]]


def arguments(rate: float, seed: int, steps: int, **changes: Any) -> TrainingArguments:
    """Return settings of a training with a tenth of its steps as warm-up and a linear decay."""
    return TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, warmup_steps=steps // 10, learning_rate=rate, seed=seed, data_seed=seed,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=100, weight_decay=0.0, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, log_level="error", use_cpu=True, **changes,
    )  # fmt: skip
