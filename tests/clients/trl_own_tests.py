"""
Run TRL's own tests of PEFT with the mixin in front of TRL's trainers.

    git clone --branch v1.16.0 https://github.com/huggingface/trl
    python tests/clients/trl_own_tests.py trl

TRL's package does not hold its tests, so they are read from a checkout of the installed release. Where the hub's tiny
models and rows can't be reached, `--stand-ins` puts random ones of the same names into a cache of this run. `--plain`
runs the tests without the mixin: what fails then is none of this package's. Anything else is handed to pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


TESTS = Path(__file__).parents[1]
TRAINERS = ("SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward")
# Without prompt learning, which has no LoRA, and what needs a server of vLLM.
CHOSEN = "(peft or lora) and not prompt_tuning and not prompt_learning and not vllm"
# Environment variables that tell the plugin what the command line asked for.
STAND_INS, PLAIN = "LORA_GA_STAND_INS", "LORA_GA_PLAIN"
MODELS = (
    "tiny-Qwen2ForCausalLM-2.5", "tiny-Qwen3ForCausalLM", "tiny-GptOssForCausalLM", "tiny-Qwen3MoeForCausalLM",
    "tiny-Qwen2ForSequenceClassification-2.5",
)  # fmt: skip


def put_mixin_in_front() -> None:
    """Replace TRL's trainers by ones that start an adapter where they are given one."""
    import trl
    from peft import PeftModel

    from lora_ga_trainer import LoRAGAConfig, LoRAGAMixin

    def mixed(original: type) -> type:
        def __init__(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:
            adapted = kwargs.get("peft_config") is not None or isinstance(model, PeftModel)
            config = LoRAGAConfig(num_samples=4) if adapted else LoRAGAConfig(init="none")
            super(kind, self).__init__(model, *args, lora_ga_config=config, **kwargs)

        kind = type(original.__name__, (LoRAGAMixin, original), {"__init__": __init__, "__module__": __name__})
        return kind

    for name in TRAINERS:
        setattr(trl, f"{name}Trainer", mixed(getattr(trl, f"{name}Trainer")))


# --- stand-ins -------------------------------------------------------------------------------------------------------


def stand_in_model(name: str, folder: Path) -> None:
    """Save a tiny random model of the class that a name of the hub's holds."""
    import tiny_trl
    import torch
    import transformers

    words = name.removeprefix("tiny-").split("-")[0]
    architecture = getattr(transformers, words)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 512, "head_dim": 8,
        "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "pad_token_id": 0, "num_labels": 1,
    }  # fmt: skip
    if words.startswith("GptOss"):
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    torch.manual_seed(0)
    architecture(architecture.config_class(**sizes)).save_pretrained(folder)
    tiny_trl.tokenizer().save_pretrained(folder)


def fill_cache(cache: Path) -> None:
    """Write stand-ins where the hub's library looks for files that it has downloaded."""
    for name in MODELS:
        repository = cache / f"models--trl-internal-testing--{name}"
        snapshot = repository / "snapshots" / "0"
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        stand_in_model(name, snapshot)


def stand_in_rows(path: str, name: str | None = None, split: str | None = None, **_: Any) -> Any:
    """Make rows in the format that a name of TRL's own data sets tells."""
    import tiny_trl
    from datasets import DatasetDict

    columns = {
        "language_modeling": ("text",),
        "prompt_completion": ("prompt", "completion"),
        "prompt_only": ("prompt",),
        "implicit_prompt_preference": ("chosen", "rejected"),
        "unpaired_preference": ("prompt", "completion"),
        "preference": ("prompt", "chosen", "rejected"),
    }
    kind = (name or "").removeprefix("standard_")
    if path != "trl-internal-testing/zen" or kind not in columns:
        raise FileNotFoundError(f"There is no stand-in for {path} {name}.")
    rows = tiny_trl.dataset(17, *columns[kind])
    if kind == "unpaired_preference":
        rows = rows.add_column("label", [bool(i % 2) for i in range(17)])
    return rows if split else DatasetDict(train=rows, test=rows)


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest, before TRL's tests are imported."""
    if os.environ.get(STAND_INS):
        import datasets

        datasets.load_dataset = stand_in_rows
    if not os.environ.get(PLAIN):
        put_mixin_in_front()


def main(checkout: Path, rest: list[str]) -> int:
    files = [str(checkout / "tests" / f"test_{name.lower()}_trainer.py") for name in TRAINERS]
    command = [sys.executable, "-m", "pytest", "-p", "clients.trl_own_tests", "-q", "-k", CHOSEN]
    with tempfile.TemporaryDirectory() as cache:
        path = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        if "--plain" in rest:
            rest.remove("--plain")
            environment |= {PLAIN: "1"}
        if "--stand-ins" in rest:
            rest.remove("--stand-ins")
            fill_cache(Path(cache))
            environment |= {STAND_INS: "1", "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [*command, *rest, *(file for file in files if Path(file).exists())],
            cwd=checkout,
            env=environment,
            check=False,
        ).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1], "tests").is_dir():
        raise SystemExit(__doc__)
    sys.path.insert(0, str(TESTS))
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
