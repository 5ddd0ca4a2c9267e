"""Load a base with an adapter, as plain PEFT does, and let it write: what the evaluation programs share."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from finetuning.arguments import ModelArguments, parse_into
from finetuning.encoding import Row, encode_prompt, fill_template
from finetuning.json_reading import read_json
from finetuning.models import TASK_TYPES, load_model, load_tokenizer
from peft import PeftModel
from transformers import GenerationConfig, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase


# Stanford Alpaca's prompt for an instruction without input, which the papers' code trains on.
ALPACA_TEMPLATE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
# What a program takes from the YAML file of the training run.
SHARED_KEYS = ("prompt_template", "dtype", "attn_implementation", "trust_remote_code", "model_revision", "gguf_file")


@dataclass
class GenerationArguments:
    """Say which model writes, how, and where its answers go."""

    adapter: str | None = field(
        default=None, metadata={"help": "Folder of a trained adapter. Without one the base answers alone."}
    )
    base: str | None = field(
        default=None, metadata={"help": "The base model, by default the one that the adapter's folder names."}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "The .jsonl file of answers, by default in the adapter's folder. Rows that are answered in it "
            "already are not answered again."
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Answer only so many rows, the first ones."})
    batch_size: int = field(default=8, metadata={"help": "Rows that are answered at once."})
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens that an answer may have."})
    device: str | None = field(default=None, metadata={"help": "Where to run: cuda, cpu; by default cuda if any."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Data type of the base; 'auto' takes the checkpoint's."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel, as in training."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code of a hub repository."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    gguf_file: str | None = field(default=None, metadata={"help": "A GGUF file inside the base's folder."})

    def __post_init__(self) -> None:
        if self.adapter is None and self.base is None:
            raise ValueError("adapter=None and base=None: give --adapter FOLDER, or --base for a model without one.")
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").exists():
            raise FileNotFoundError(
                f"{self.adapter}: no adapter_config.json in it. Point to a folder that PEFT saved."
            )
        for name in ("batch_size", "max_new_tokens", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.adapter is None and self.output is None:
            raise ValueError("output=None: without an adapter there is no folder for the answers. Give --output.")

    @property
    def model_name(self) -> str:
        """What answered: the adapter's folder with a digest of its weights, or the base; and what it answered with."""
        base, dtype = self.base or "its own", f"{self.dtype}, {self.max_new_tokens} tokens"
        if self.adapter is None:
            return f"{self.base} ({self.model_revision}, {dtype})"
        return f"{self.adapter} (weights {_hash_weights(Path(self.adapter))}, base {base}, {dtype})"

    def output_file(self, name: str) -> Path:
        """Return the file of answers, `name` in the adapter's folder unless another was asked for."""
        return Path(self.output) if self.output is not None else Path(str(self.adapter)) / name


def parse_evaluation(
    types: tuple[type, ...], argv: list[str] | None, about: str | None = None, also_taken: Collection[str] = ()
) -> tuple[Any, ...]:
    """
    Read the command line of an evaluation program into dataclasses.

    `--config` names the YAML file of the training run: its prompt template and data type become defaults here, so that
    the model reads the prompts that it was trained on; what else it says of the training is passed over.

    Args:
        types (`tuple[type, ...]`): the dataclasses.
        argv (`list[str]`, *optional*): the command line without the program's name; the program's own by default.
        about (`str`, *optional*): what `--help` says first.
        also_taken (`Collection[str]`, *optional*): further keys to take from the file.

    Returns:
        One instance of each class.
    """
    parser = HfArgumentParser(types, allow_abbrev=False, description=about)
    parser.add_argument("--config", help="The YAML file of the training run, for its prompt template and data type.")
    return parse_into(parser, argv, taken={*SHARED_KEYS, *also_taken} & {action.dest for action in parser._actions})


class Writer:
    """
    A base with an adapter, ready to write.

    Args:
        args (`GenerationArguments`): which base and adapter, and where they run.
        task (`str`, *optional*): the adapter's own by default, `"causal-lm"` for a base alone.
        class_names (`list[str]`, *optional*): the classes, for a classifier.
    """

    def __init__(self, args: GenerationArguments, task: str | None = None, class_names: list[str] | None = None):
        saved = _read_adapter_config(args.adapter)
        self.task = task or next((name for name, kind in TASK_TYPES.items() if kind == saved.get("task_type")), None)
        if self.task is None:
            self.task = "causal-lm"
        base = args.base or saved["base_model_name_or_path"]
        if base is None:
            raise ValueError(f"{args.adapter}: its adapter_config.json names no base model. Name it with --base.")
        model_args = ModelArguments(
            model_name_or_path=base,
            task=self.task,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
            model_revision=args.model_revision,
            gguf_file=args.gguf_file,
        )
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model_args)
        model: PreTrainedModel | PeftModel = load_model(model_args, self.tokenizer, class_names)
        if self.task != "sequence-classification":
            model.generation_config = generation_settings(model, self.tokenizer, args.max_new_tokens)
        if args.adapter is not None:
            model = PeftModel.from_pretrained(model, args.adapter)
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def write(self, prompts: list[str], max_length: int | None = None) -> list[str]:
        """
        Return what follows each prompt.

        Args:
            prompts (`list[str]`): filled-in templates.
            max_length (`int`, *optional*): cut the prompts of a seq2seq model, as training with it does.
        """
        if self.task == "causal-lm":
            rows = [[*start, *body] for start, body in (encode_prompt(prompt, self.tokenizer) for prompt in prompts)]
            batch = self.pad(rows, "left")  # what is written starts where every prompt ends
            written = self.model.generate(**batch)[:, batch["input_ids"].shape[1] :]
            # Decoded with its prompt: alone, Llama 2's text would lose the first space of an indented line.
            return [
                self.decode([*row, *tokens])[len(self.decode(row)) :]
                for row, tokens in zip(rows, written.tolist(), strict=True)
            ]
        cut = {"truncation": max_length is not None, "max_length": max_length}
        rows = [self.tokenizer(prompt, **cut)["input_ids"] for prompt in prompts]
        written = self.model.generate(**self.pad(rows, "right"))
        return [self.decode(tokens) for tokens in written.tolist()]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pad(self, rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
        """Return rows of tokens as one batch, `input_ids` and `attention_mask` of (rows, longest)."""
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}


def generation_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Return settings for the likeliest token at each step; the checkpoint's own may draw at random (Llama 2's do)."""
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted({token for token in [*ends, tokenizer.eos_token_id] if token is not None}),
        decoder_start_token_id=own.decoder_start_token_id,
    )


def fill_prompt(template: str, row: Row, prompt: str) -> str:
    """Put a row into the prompt template, `{prompt}` standing for its prompt column."""
    return fill_template(template, {**row, "prompt": prompt}, "prompt_template")


def _hash_weights(adapter: Path) -> str:
    """Tell the weights of an adapter apart from others that were saved in the same folder."""
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("adapter_model*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _read_adapter_config(adapter: str | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    place = Path(adapter) / "adapter_config.json"
    config = read_json(place, "the configuration of an adapter", "Name the folder of a saved adapter.")
    if not isinstance(config, dict):
        raise ValueError(f"{place} is not the configuration of an adapter. Name the folder of a saved adapter.")
    if not isinstance(config.get("base_model_name_or_path"), str):
        config["base_model_name_or_path"] = None
    return config
