"""The trainer of a task, as every recipe builds it."""

from typing import Any

from peft import LoraConfig
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    Trainer,
)

from finetuning.data import TaskData
from finetuning.evaluation import evaluation_functions
from lora_ga_trainer import LoRAGAConfig, LoRAGATrainer, Seq2SeqLoRAGATrainer


def make_collator(task: str, tokenizer: PreTrainedTokenizerBase, model: Any = None) -> Any:
    """Return what makes a batch of encoded rows; a seq2seq `model` shifts the labels of its decoder by itself."""
    if task == "sequence-classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model)


def make_trainer(
    task: str,
    model: Any,
    args: Seq2SeqTrainingArguments,
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    lora_ga_config: LoRAGAConfig,
    peft_config: LoraConfig | None = None,
) -> Trainer:
    """Return the trainer of `task`: `model` is wrapped with `peft_config` where one is given."""
    trainer_class = Seq2SeqLoRAGATrainer if task == "seq2seq" else LoRAGATrainer
    if args.predict_with_generate and args.generation_max_length is None and data.eval is not None:
        # Else it is 20. Room for the first token, which no answer holds, and for the longest answer with its end.
        args.generation_max_length = 1 + max(len(labels) for labels in data.eval["labels"])
    return trainer_class(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=tokenizer,
        data_collator=make_collator(task, tokenizer, model),
        peft_config=peft_config,
        lora_ga_config=lora_ga_config,
        **evaluation_functions(task, tokenizer, args.predict_with_generate),
    )
