"""GLUE: figures, what counts as an answer, and whole runs of both kinds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paper_data
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))  # as `python recipes/evaluate_glue.py` does

import evaluate_glue
import finetune
from answering.generation import GenerationArguments, Writer
from answering.glue_metrics import CLASSES, class_numbers, compute_glue_metrics


CONFIGS = Path(finetune.__file__).resolve().parent / "configs" / "papers"

# --- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLASSES)
def test_figures_are_those_of_the_counts(task):
    generator = np.random.default_rng(3)
    for _ in range(3):
        references = generator.integers(0, len(CLASSES[task]), 60).tolist()
        wrong = generator.random(60) < 0.3
        predictions = [(r + 1) % len(CLASSES[task]) if w else r for r, w in zip(references, wrong, strict=True)]
        pairs = list(zip(predictions, references, strict=True))
        tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
        expected = {"accuracy": sum(p == r for p, r in pairs) / 60}
        if task == "cola":
            below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
            expected = {"matthews_correlation": (tp * tn - fp * fn) / below}
        elif task in ("mrpc", "qqp"):
            expected["f1"] = 2 * tp / (2 * tp + fp + fn)
        assert compute_glue_metrics(task, predictions, references) == pytest.approx(expected)


def test_a_constant_answer_has_no_correlation():
    assert compute_glue_metrics("cola", [1, 1, 1, 1], [1, 0, 1, 1]) == {"matthews_correlation": 0}
    assert compute_glue_metrics("cola", [1, 0, 1, 1], [1, 0, 1, 1]) == {"matthews_correlation": pytest.approx(1)}


def test_classes_have_glues_numbers_whatever_they_are_called():
    words = {"0": "different", "not_equivalent": "different", "1": "equivalent"}
    names = ["0", "1", "not_equivalent", "equivalent", "different"]
    assert class_numbers(names, "mrpc", words) == [0, 1, 0, 1, 0]
    assert class_numbers(["entailment", "not_entailment"], "qnli", {}) == [0, 1]
    assert class_numbers(["yes", "no"], "cola", {"0": "no", "1": "yes"}) == [1, 0]
    assert class_numbers(["positive"], "sst2", {"0": "positive", "1": "negative"}) == [0]  # the words one gives win
    with pytest.raises(ValueError, match=r"mrpc: 'same' is none of .*Say with label_words"):
        class_numbers(["same"], "mrpc", {})


# --- likelihoods ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("t5")
    base = AutoModelForSeq2SeqLM.from_pretrained(paper_data.save_base(folder / "base", "seq2seq"))
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter"), model.eval()


@torch.no_grad()
def test_the_likelihood_of_a_word_is_that_of_its_tokens_one_by_one(t5):
    adapter, model = t5
    writer = Writer(GenerationArguments(adapter=adapter))
    prompts = ["a prompt", "another prompt, which is longer and is cut"]
    words = ["no", "not at all"]
    scores = evaluate_glue.log_likelihood(prompts, words, writer, max_length=20)
    for prompt, word, score in zip(prompts, words, scores.tolist(), strict=True):
        ids = writer.tokenizer(prompt, truncation=True, max_length=20, return_tensors="pt").input_ids
        told, total = [0], 0.0
        for token in writer.tokenizer(word)["input_ids"]:
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([told])).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            told.append(token)
        assert told[-1] == writer.tokenizer.eos_token_id  # the word's end counts, or a longer word could not win
        assert score == pytest.approx(total, abs=1e-4)
    likeliest = evaluate_glue.likeliest(prompts, words, writer, max_length=20)
    for prompt, chosen in zip(prompts, likeliest, strict=True):
        both = evaluate_glue.log_likelihood([prompt] * 2, words, writer, max_length=20)
        assert chosen == words[both.argmax().item()]


# --- whole runs ----------------------------------------------------------------------------------------------------


def command(task: str, adapter: str, rows: str) -> list[str]:
    config = str(CONFIGS / f"lora_ga_t5_{task}.yaml")
    words = ["--glue_task", task, "--adapter", adapter, "--config", config, "--train_file", rows, "--eval_file", rows]
    return [*words, "--batch_size", "4"]


def say(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[str]:
    asked: list[str] = []
    left = list(texts)

    def write(self: Writer, prompts: list[str], max_length: int) -> list[str]:
        asked.extend(prompts)
        return [left.pop(0) for _ in prompts]

    monkeypatch.setattr(Writer, "write", write)
    return asked


def test_a_text_is_right_if_it_is_the_labels_word_and_nothing_else(t5, tmp_path, monkeypatch, capsys):
    rows = paper_data.write_rows(tmp_path / "rows.jsonl", paper_data.GLUE["cola"])  # labels 0, 1, 0, 1, 0, 1
    said = ["unacceptable", " acceptable ", "acceptable", "acceptable!", "unacceptable", "fine"]
    asked = say(monkeypatch, said)
    results = evaluate_glue.main([*command("cola", t5[0], rows), "--output", str(tmp_path / "out" / "answers.jsonl")])
    assert asked[0] == "classify the grammaticality of the text: He left 0.\nresult: "
    assert results["accuracy"] == {"value": 0.5, "standard_error": pytest.approx(math.sqrt(1 / 24)), "n": 6}
    assert results["no_label"] == 2
    # right: 0, 1, 0; wrong: 0 as 1, and both texts that are no label, as the other class: tp 1, fn 2, tn 2, fp 1
    assert results["matthews_correlation"] == pytest.approx((1 * 2 - 1 * 2) / math.sqrt(2 * 3 * 3 * 4))
    answers = [json.loads(line)["answer"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert answers == [text.strip() for text in said]
    printed = capsys.readouterr().out
    assert "cola: matthews_correlation=0.0000, accuracy=0.5000 (standard error 0.2041, n=6), no_label=2" in printed


def test_f1_is_that_of_equivalent_pairs(t5, tmp_path, monkeypatch):
    rows = paper_data.write_rows(tmp_path / "rows.jsonl", paper_data.GLUE["mrpc"])  # labels 0, 1, 0, 1, 0, 1
    say(monkeypatch, ["different", "equivalent", "different", "equivalent", "equivalent", "different"])
    results = evaluate_glue.main(command("mrpc", t5[0], rows))
    assert results["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    say(monkeypatch, ["equivalent"] * 6)
    assert evaluate_glue.main(command("mrpc", t5[0], rows))["f1"] == pytest.approx(2 * 3 / (2 * 3 + 3))


def test_a_model_is_given_no_more_tokens_than_could_be_a_label(t5, tmp_path):
    rows = paper_data.write_rows(tmp_path / "rows.jsonl", paper_data.GLUE["sst2"])
    results = evaluate_glue.main(command("sst2", t5[0], rows))
    assert results["no_label"] == 6  # a random model
    assert results["accuracy"]["value"] == 0
    lines = (Path(t5[0]) / "glue_answers.jsonl").read_text().splitlines()
    assert max(len(json.loads(line)["answer"]) for line in lines) <= len("negative") + 2


def test_only_label_words_can_be_measured(t5, tmp_path):
    rows = paper_data.write_rows(tmp_path / "rows.jsonl", paper_data.GLUE["sst2"])
    words = ["--glue_task", "sst2", "--adapter", t5[0], "--train_file", rows, "--eval_file", rows]
    with pytest.raises(ValueError, match="label_words=None: say which word stands for which class"):
        evaluate_glue.main([*words, "--prompt_field", "sentence", "--completion_field", "label"])


def test_a_classifier_is_measured_by_its_own_names_of_classes(tmp_path, monkeypatch):
    tokenizer = paper_data.byte_tokenizer("<s> $A </s>")
    tiny.bert(vocab_size=len(tokenizer), num_labels=2).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    # the alphabet puts "equivalent" first and GLUE "not_equivalent"
    names = ["not_equivalent", "equivalent"]
    rows = [dict(row, label=names[row["label"]]) for row in paper_data.GLUE["mrpc"]]
    file = paper_data.write_rows(tmp_path / "rows.jsonl", rows)
    adapter = tmp_path / "adapter"
    data = ["--train_file", file, "--text_field", "sentence1", "--text_pair_field", "sentence2", "--max_length", "40"]
    training = ["--model_name_or_path", str(tmp_path / "base"), "--task", "sequence-classification", *data]
    training += ["--output_dir", str(adapter), "--max_steps", "2", "--num_samples", "2", "--eval_fraction", "0.2"]
    training += ["--per_device_train_batch_size", "2", "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no"]
    monkeypatch.setattr(finetune, "adapt_to_cpu", lambda args: None)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *training])
    finetune.main()
    assert json.loads((adapter / "class_names.json").read_text()) == ["equivalent", "not_equivalent"]

    words = ["--glue_task", "mrpc", "--adapter", str(adapter), *data, "--eval_file", file]
    results = evaluate_glue.main(words)
    lines = [json.loads(line) for line in (adapter / "glue_answers.jsonl").read_text().splitlines()]
    right = [line["label"] == line["answer"] for line in lines]
    assert results["accuracy"]["value"] == sum(right) / 6
    positive = sum(line["label"] == line["answer"] == "equivalent" for line in lines)
    assert results["f1"] == pytest.approx(2 * positive / (2 * positive + 6 - sum(right)))
    assert results["no_label"] == 0
    logits = []
    for seed in range(2):  # a fresh head would be another one each time
        torch.manual_seed(seed)
        writer = Writer(GenerationArguments(adapter=str(adapter)), class_names=["equivalent", "not_equivalent"])
        with torch.no_grad():
            logits.append(writer.model(input_ids=torch.tensor([[5, 6, 7]])).logits)
    assert torch.equal(*logits)
    assert evaluate_glue.main([*words, "--limit", "2"])["accuracy"]["n"] == 2
