"""Tiny random models of the papers' architectures, and rows in the formats of the data sets that the papers use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


SPECIALS = ["<pad>", "<s>", "</s>"]


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that reads any text, one token a byte, and puts special tokens round it as `template` says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIALS)
    inner.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_base(folder: Path, kind: str) -> str:
    """Write a tiny Llama (`"causal-lm"`) or T5 (`"seq2seq"`) with its tokenizer, as their hub folders look."""
    tokenizer = byte_tokenizer("<s> $A" if kind == "causal-lm" else "$A </s>")
    if kind == "causal-lm":
        model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=2048)
        model.generation_config.update(bos_token_id=1, eos_token_id=2)
    else:
        model = tiny.t5()
        model.resize_token_embeddings(len(tokenizer))
        model.config.eos_token_id = model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


META_MATH = [
    {
        "query": f"Ann has {n} apples and buys {n} more. How many?",
        "original_question": "...",
        "response": f"{n} + {n} = {2 * n}.\n#### {2 * n}\nThe answer is: {2 * n}",
        "type": kind,
    }
    for n, kind in enumerate(["GSM_Rephrased", "MATH_AnsAug", "GSM_FOBAR", "GSM_SV", "MATH_SV", "GSM_AnsAug"], start=2)
]
CODE_FEEDBACK = [
    {
        "query": f"Write a function that adds {n}.",
        "answer": f"Here:\n```python\ndef f(x):\n    return x + {n}\n```\nIt adds.\n```\nf(1)\n```",
        "resource": "evol",
        "lang": "python",
    }
    for n in range(4)
] + [{"query": "What is Python?", "answer": "A language.", "resource": "evol", "lang": "python"}]
WIZARD = [
    {"instruction": f"Name {n} colours.", "output": "Red.", "instruction_zh": "...", "output_zh": "..."}
    for n in range(4)
] + [{"instruction": "Be rude.", "output": "I'm Sorry, but no.", "instruction_zh": "...", "output_zh": "..."}]
GLUE = {
    "mnli": [{"premise": "A dog runs.", "hypothesis": f"It moves {n}.", "label": n % 3, "idx": n} for n in range(6)],
    "sst2": [{"sentence": f"a fine film {n} ", "label": n % 2, "idx": n} for n in range(6)],
    "cola": [{"sentence": f"He left {n}.", "label": n % 2, "idx": n} for n in range(6)],
    "qnli": [{"question": "Who?", "sentence": f"Ann {n} did.", "label": n % 2, "idx": n} for n in range(6)],
    "mrpc": [{"sentence1": "He left.", "sentence2": f"He went {n}.", "label": n % 2, "idx": n} for n in range(6)],
}
GSM8K = [
    {"question": f"Tom had {n} pens and lost 1. How many?", "answer": f"He has {n} - 1 = {n - 1}.\n#### {n - 1}"}
    for n in range(3, 6)
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f'from typing import List\n\n\ndef add(xs: List[int]) -> int:\n    """ Sum and {n}. """\n',
        "entry_point": "add",
        "canonical_solution": f"    return sum(xs) + {n}\n",
        "test": f"METADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == {3 + n}\n",
    }
    for n in range(2)
]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Write it again."]},
    {"question_id": 82, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"], "reference": ["2", "4"]},
]
