"""A tiny tokenizer and tiny rows in the formats that TRL takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


WORDS = list("abcdefghijklmnopqrstuvwxyz")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; every special token and every letter has a place among the tiny models' 97."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return finished(inner)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter or space, made by byte-level BPE."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, "Ġ"])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    return finished(inner)


def finished(inner: Tokenizer) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())


def rows(count: int, *columns: str, seed: int = 1) -> list[dict[str, str]]:
    """Rows whose texts differ in length, so that item counts differ by row."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: words(2 + (i * 3 + 5 * place) % 7, generator) for place, name in enumerate(columns)}
        for i in range(count)
    ]


def dataset(count: int, *columns: str, seed: int = 1) -> Dataset:
    return Dataset.from_list(rows(count, *columns, seed=seed))


def settings(folder: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of any TRL config for a short run on the CPU whose every step is logged."""
    return tiny.settings(folder, **({"max_steps": 2, "bf16": False} | changes))


def save_model(folder: Path) -> Path:
    """Save a tiny random Llama with the tokenizer, as a hub repository would hold them."""
    tiny.llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**(LORA | changes), task_type="CAUSAL_LM")
