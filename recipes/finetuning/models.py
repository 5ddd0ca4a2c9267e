"""From arguments to the tokenizer, the frozen base and the adapter's settings."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetuning.arguments import LoraArguments, ModelArguments
from finetuning.package_paths import resolve_reference


MODEL_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
TASK_TYPES = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "sequence-classification": TaskType.SEQ_CLS,
}


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; one without a padding token pads with its end token, which the loss leaves out."""
    name, options = _locate_checkpoint(args)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if args.task == "causal-lm" and tokenizer.eos_token is None:
        raise ValueError(f"{name}: its tokenizer has no end token, so no completion can end. Set eos_token in it.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, class_names: list[str] | None
) -> PreTrainedModel:
    """
    Load the base model for its task.

    Args:
        args (`ModelArguments`): where it is, its data type and its task.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, whose padding token a classifier must know.
        class_names (`list[str]`, *optional*): the classes of a classifier, whose head starts fresh.

    Returns:
        `PreTrainedModel`: on the CPU; the trainer moves it. A GGUF file comes out dequantised.
    """
    name, options = _locate_checkpoint(args)
    if "gguf_file" in options:
        options.update(_ask_for_plain_weights())
    if class_names is not None:
        options["id2label"] = dict(enumerate(class_names))
        options["label2id"] = {label: number for number, label in enumerate(class_names)}
    model = MODEL_CLASSES[args.task].from_pretrained(
        name, dtype=args.dtype, attn_implementation=args.attn_implementation, **options
    )
    if "gguf_file" in options:  # the weights are plain by now; what says otherwise would keep the model from saving
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer = None
    if args.task != "causal-lm":
        # BERT and T5 take the item count that the Trainer offers and ignore it: accumulated over batches or spread
        # over processes, their loss and gradients would count that many times. So the Trainer divides, by batches.
        model.accepts_loss_kwargs = False
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def make_lora_config(args: LoraArguments, task: str) -> LoraConfig:
    """Return PEFT's settings; a classifier's fresh head is trained in full beside the adapter."""
    all_linear = args.target_modules == ["all-linear"]  # PEFT wants this word bare; other single names as a list
    return LoraConfig(
        task_type=TASK_TYPES[task],
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if all_linear else args.target_modules,
        modules_to_save=args.modules_to_save,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )


def _locate_checkpoint(args: ModelArguments) -> tuple[str, dict[str, Any]]:
    name, gguf_file = resolve_reference(args.model_name_or_path), args.gguf_file
    if name.endswith(".gguf"):
        name, gguf_file = str(Path(name).parent), Path(name).name
    options: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    return name, options


def _ask_for_plain_weights() -> dict[str, Any]:
    try:
        from transformers import GgufConfig
    except ImportError:  # transformers 5.0 has no such class and always unpacks
        return {}
    # Asked for in words: where the package `kernels` is installed, the weights would stay packed.
    return {"quantization_config": GgufConfig(dequantize=True)}
