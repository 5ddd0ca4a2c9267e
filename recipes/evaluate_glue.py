"""
Measure an adapter on the held-out rows of a GLUE task.

    python recipes/evaluate_glue.py --glue_task cola --adapter outputs/lora_ga_t5_cola --config \
recipes/configs/papers/lora_ga_t5_cola.yaml

The rows, prompts and label words are those of the training run that --config names; any of its arguments about data
can be given on the command line too. A model that writes (T5) is right where it writes the label's word and nothing
else, or with --restrict_to_labels where that word is the likeliest of the labels' words.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from answering.answers import report, share
from answering.generation import GenerationArguments, Writer, parse_evaluation
from answering.glue_metrics import class_numbers, compute_glue_metrics
from datasets import Dataset
from finetuning.arguments import DataArguments
from finetuning.data import CLASSIFICATION, read_held_out
from finetuning.encoding import IGNORED, fill_templates, text_of
from finetuning.filtering import word_for_value
from finetuning.json_reading import read_json
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass
class GlueArguments:
    """Say which task it is, and what counts as an answer."""

    glue_task: Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"] = field(
        metadata={"help": "Which of GLUE's tasks, for its figures and the order of its classes."}
    )
    restrict_to_labels: bool = field(
        default=False,
        metadata={
            "help": "Take the likeliest of label_words, whatever else the model would write. LoRA-GA's authors "
            "compare the first tokens of the two words in this way on CoLA and MRPC."
        },
    )


def main(argv: list[str] | None = None) -> dict:
    types = (GlueArguments, DataArguments, GenerationArguments)
    glue, data, generation = parse_evaluation(types, argv, __doc__, {item.name for item in fields(DataArguments)})
    class_names = saved_class_names(generation.adapter)
    writer = Writer(generation, class_names=class_names)
    rows = read_held_out(data, writer.task)
    rows = rows.select(range(min(generation.limit or len(rows), len(rows))))
    if writer.task == CLASSIFICATION:
        words, (labels, answers) = {}, classify_rows(rows, data, writer, class_names, generation.batch_size)
    else:
        if data.label_words is None:
            raise ValueError("label_words=None: say which word stands for which class: --label_words 0=no 1=yes.")
        words = word_for_value(data.label_words)
        labels, answers = write_labels(rows, data, writer, glue.restrict_to_labels, generation.batch_size)

    references = class_numbers(labels, glue.glue_task, words)
    known = {*words.values(), *(class_names or [])}
    predictions = [
        # what is no label is wrong, whichever label is right
        class_numbers([answer], glue.glue_task, words)[0] if answer in known else int(reference == 0)
        for answer, reference in zip(answers, references, strict=True)
    ]
    results = compute_glue_metrics(glue.glue_task, predictions, references)
    results["accuracy"] = share([p == r for p, r in zip(predictions, references, strict=True)])
    results["no_label"] = sum(answer not in known for answer in answers)
    path = generation.output_file("glue_answers.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"label": label, "answer": answer} for label, answer in zip(labels, answers, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    report(glue.glue_task, results, path)
    return results


def write_labels(
    rows: Dataset, data: DataArguments, writer: Writer, restrict: bool, batch_size: int
) -> tuple[list[str], list[str]]:
    """Return the label's word of every row, and what a model that writes says, or the likeliest of the words."""
    prompts, labels = (list(part) for part in zip(*(fill_templates(row, data) for row in rows), strict=True))
    choices = sorted(set(word_for_value(data.label_words).values()))
    longest = max(len(writer.tokenizer(text_target=word)["input_ids"]) for word in choices)
    writer.model.generation_config.max_new_tokens = longest + 1  # what is longer than every label is none

    def answer(batch: list[str]) -> list[str]:
        if restrict:
            return likeliest(batch, choices, writer, data.max_length)
        return [text.strip() for text in writer.write(batch, data.max_length)]

    return labels, in_batches(prompts, batch_size, answer)


def classify_rows(
    rows: Dataset, data: DataArguments, writer: Writer, class_names: list[str], batch_size: int
) -> tuple[list[str], list[str]]:
    """Return the class of every row, and the likeliest one by a classifier."""
    labels = [text_of(row, data.label_field) for row in rows]
    texts = [[text_of(row, name) for name in (data.text_field, data.text_pair_field) if name] for row in rows]
    return labels, in_batches(texts, batch_size, lambda batch: classify(batch, writer, data, class_names))


def saved_class_names(adapter: str | None) -> list[str] | None:
    """Return the names of a classifier's classes 0, 1, ..., which `finetune.py` writes beside its adapter."""
    place = Path(adapter or "") / "class_names.json"
    if adapter is None or not place.exists():
        return None
    names = read_json(place, "a list of class names", "Restore it from the run that wrote the adapter.")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place} is not a list of class names. Restore it from the run that wrote the adapter.")
    return names


def in_batches(items: list[Any], size: int, answer: Callable[[list[Any]], list[str]]) -> list[str]:
    """Answer items batch by batch."""
    return [text for start in range(0, len(items), size) for text in answer(items[start : start + size])]


@torch.inference_mode()
def classify(texts: list[list[str]], writer: Writer, data: DataArguments, class_names: list[str]) -> list[str]:
    """Return the name of the likeliest class of each text or pair of texts."""
    rows = [writer.tokenizer(*pair, truncation=True, max_length=data.max_length) for pair in texts]
    batch = writer.tokenizer.pad(rows, return_tensors="pt").to(writer.device)
    return [class_names[number] for number in writer.model(**batch).logits.argmax(dim=-1).tolist()]


def likeliest(prompts: list[str], choices: list[str], writer: Writer, max_length: int) -> list[str]:
    """Return for each prompt the one of `choices` that the model most likely writes, to its end token."""
    scores = torch.stack([log_likelihood(prompts, [choice] * len(prompts), writer, max_length) for choice in choices])
    return [choices[best] for best in scores.argmax(dim=0).tolist()]  # scores (choices, prompts)


@torch.inference_mode()
def log_likelihood(prompts: list[str], completions: list[str], writer: Writer, max_length: int) -> Tensor:
    """Return log p(completion, end | prompt) for each pair, (pairs,) in fp32; for a seq2seq model."""
    if writer.task != "seq2seq":
        raise ValueError(f"restrict_to_labels=True, task={writer.task!r}: only seq2seq models are scored in this way.")
    encoded = [writer.tokenizer(p, truncation=True, max_length=max_length)["input_ids"] for p in prompts]
    wanted = [writer.tokenizer(text_target=completion)["input_ids"] for completion in completions]
    labels = writer.pad(wanted, "right")
    ids = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, IGNORED)  # (pairs, longest)
    logits = writer.model(**writer.pad(encoded, "right"), labels=ids).logits.float()
    lost = cross_entropy(logits.transpose(1, 2), ids, ignore_index=IGNORED, reduction="none")  # 0 where ignored
    return -lost.sum(dim=1)


if __name__ == "__main__":
    main()
