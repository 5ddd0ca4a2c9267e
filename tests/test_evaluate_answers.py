"""Answers for a judge: what a model writes, turn by turn, and runs that are taken up again where they stopped."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import paper_data
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))  # as the program itself does

import evaluate_answers
from answering.answers import answer_missing, read_records, share
from answering.generation import GenerationArguments, Writer, parse_evaluation


# --- writing -------------------------------------------------------------------------------------------------------


def saved_adapter(folder: Path, kind: str) -> tuple[str, Any, str]:
    """Write a base and an adapter that changes what it says, as PEFT saves it; return both folders and the model."""
    base_folder = paper_data.save_base(folder / "base", kind)
    loader = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSeq2SeqLM
    base = loader.from_pretrained(base_folder)
    task = "CAUSAL_LM" if kind == "causal-lm" else "SEQ_2_SEQ_LM"
    torch.manual_seed(7)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=task))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter"), model.eval(), base_folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, str]:
    return saved_adapter(tmp_path_factory.mktemp("causal"), "causal-lm")


PROMPTS = ["Q: 1 + 1?\nA: ", "Q: A longer question, to be padded round.\nA: ", "A: "]


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int, end: int) -> list[int]:
    """Take the likeliest token again and again, without a cache or a batch."""
    written: list[int] = []
    while len(written) < count:
        token = model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax().item()
        written.append(token)
        if token == end:
            break
    return written


def tokens(writer: Writer, prompts: list[str], **cut: Any) -> list[list[int]]:
    """What is written, as tokens: random bytes are no text that could be told apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "decode", list)
        rows = writer.write(prompts, **cut)
    return [[token for token in row if token != writer.tokenizer.pad_token_id] for row in rows]


def test_batches_padded_on_the_left_write_what_each_prompt_gives_alone(causal):
    adapter, model, base = causal
    writer = Writer(GenerationArguments(adapter=adapter, max_new_tokens=6))
    encoded = [[1, *writer.tokenizer(p, add_special_tokens=False)["input_ids"]] for p in PROMPTS]
    expected = [greedy(model, ids, 6, 2) for ids in encoded]
    assert len({tuple(row) for row in expected}) == 3
    assert tokens(writer, PROMPTS) == expected
    assert [tokens(writer, [prompt])[0] for prompt in PROMPTS] == expected
    with model.disable_adapter():
        alone = greedy(model, encoded[2], 6, 2)
    assert tokens(Writer(GenerationArguments(base=base, output="x.jsonl", max_new_tokens=6)), ["A: "]) == [alone]
    assert alone != expected[2]


def test_a_seq2seq_model_writes_the_same_in_a_batch_as_alone(tmp_path):
    adapter, model, _ = saved_adapter(tmp_path, "seq2seq")
    writer = Writer(GenerationArguments(adapter=adapter, max_new_tokens=5))
    together = tokens(writer, PROMPTS, max_length=30)
    assert together == [tokens(writer, [prompt], max_length=30)[0] for prompt in PROMPTS]
    ids = writer.tokenizer(PROMPTS[1], truncation=True, max_length=30, return_tensors="pt").input_ids
    written = [0]
    with torch.no_grad():
        for _ in range(5):
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([written])).logits
            written.append(logits[0, -1].argmax().item())
    assert together[1] == [token for token in written if token != 0]
    assert len(together[1]) > 0


def test_the_likeliest_answer_is_taken_whatever_the_checkpoint_says(causal, tmp_path):
    adapter, _, _ = causal
    base = paper_data.save_base(tmp_path / "base", "causal-lm")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9)  # as Llama 2's checkpoint draws
    model.save_pretrained(base)
    written = set()
    for seed in range(3):
        torch.manual_seed(seed)
        writer = Writer(GenerationArguments(adapter=adapter, base=base, max_new_tokens=8))
        written.add(tuple(tokens(writer, ["A: "])[0]))
    assert len(written) == 1
    writer.model.generation_config.update(do_sample=True, temperature=5.0, top_k=0)
    assert len({tuple(tokens(writer, ["A: "])[0]) for _ in range(4)}) > 1  # it would have been another each time


def test_a_model_stops_at_its_end_token(causal):
    writer = Writer(GenerationArguments(adapter=causal[0], max_new_tokens=8))
    whole = tokens(writer, ["A: "])[0]
    assert writer.model.generation_config.eos_token_id == [2]
    writer.model.generation_config.eos_token_id = [whole[3]]
    assert tokens(writer, ["A: "])[0] == whole[: whole.index(whole[3]) + 1]


def test_what_is_written_keeps_the_spaces_that_a_decoder_strips_from_the_start_of_a_text(causal, monkeypatch):
    """Llama 2's decoder ends in `Strip(" ", start=1)`."""
    writer = Writer(GenerationArguments(adapter=causal[0]))
    written = list(b"    return 1")
    monkeypatch.setattr(
        writer.model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([written])], dim=1)
    )
    text = lambda ids, **_: bytes(i for i in ids if i > 2).decode().removeprefix(" ")
    monkeypatch.setattr(writer.tokenizer, "decode", text)
    monkeypatch.setattr("answering.generation.encode_prompt", lambda prompt, tokenizer: ([1], list(prompt.encode())))
    assert writer.write(["def f():\n"]) == ["    return 1"]


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (2, 5), (5, 5)])
def test_the_standard_error_is_that_of_a_binomial_share(hits, count):
    p = hits / count
    result = share([True] * hits + [False] * (count - hits))
    # the variance of one draw, 0 or 1, is p (1 - p)
    variance = sum((x - p) ** 2 for x in [1] * hits + [0] * (count - hits)) / count
    assert result == {"value": p, "standard_error": pytest.approx(math.sqrt(variance / count)), "n": count}


# --- files of answers ----------------------------------------------------------------------------------------------


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 0}\n{"id": \n{"id": 2}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2: no JSON"):
        read_records(path)


def test_answers_come_in_the_order_of_the_questions(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 2, "prompt": "c", "model": "m"}\n')
    questions = [{"id": i, "prompt": p, "model": "m"} for i, p in enumerate("abc")]
    records = answer_missing(path, questions, lambda batch: batch, 1)
    assert [record["id"] for record in records] == [0, 1, 2]


# --- whole runs ----------------------------------------------------------------------------------------------------

QUESTIONS = [*paper_data.MT_BENCH, {"question_id": 83, "turns": ["Hi"]}]


@pytest.fixture
def command(causal, tmp_path) -> list[str]:
    file = paper_data.write_rows(tmp_path / "question.jsonl", QUESTIONS)
    words = ["--adapter", causal[0], "--eval_file", file, "--output", str(tmp_path / "answers.jsonl")]
    return [*words, "--max_new_tokens", "4", "--batch_size", "2", "--prompt_template", "[{prompt}]"]


def script(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[str]:
    """Let the model say these texts, in order, and fail when they are used up; return the prompts it is asked."""
    asked: list[str] = []
    left = list(texts)

    def write(self: Writer, prompts: list[str]) -> list[str]:
        if len(left) < len(prompts):
            raise RuntimeError("the machine went down")
        asked.extend(prompts)
        return [left.pop(0) for _ in prompts]

    monkeypatch.setattr(Writer, "write", write)
    return asked


def test_each_turn_goes_on_from_the_turns_before_it(command, monkeypatch, tmp_path):
    asked = script(monkeypatch, [" A1 ", "B1", "A2", "B2", "C1"])
    records = evaluate_answers.main(command)
    assert asked == [
        *("[Write a line.]", "[1 + 1?]"),
        *("[Write a line.]A1\n\n[Write it again.]", "[1 + 1?]B1\n\n[And 2 + 2?]"),
        "[Hi]",
    ]
    assert [record["choices"] for record in records] == [
        [{"index": 0, "turns": ["A1", "A2"]}],
        [{"index": 0, "turns": ["B1", "B2"]}],
        [{"index": 0, "turns": ["C1"]}],
    ]
    assert [record["question_id"] for record in records] == [81, 82, 83]
    assert set(records[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert read_records(tmp_path / "answers.jsonl") == records
    assert evaluate_answers.main(command) == records
    assert len(asked) == 5  # nothing was asked again


def test_judging_is_left_to_others():
    assert "Nothing is judged here" in evaluate_answers.__doc__


def test_a_run_that_was_stopped_goes_on_where_it_was(command, monkeypatch, tmp_path):
    script(monkeypatch, ["A1", "B1", "A2", "B2"])
    with pytest.raises(RuntimeError, match="went down"):
        evaluate_answers.main(command)
    path = tmp_path / "answers.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"question_id": 83, "answ', encoding="utf-8")  # killed while it wrote
    asked = script(monkeypatch, ["C1"])
    records = evaluate_answers.main(command)
    assert asked == ["[Hi]"]
    assert path.read_text().startswith(whole)
    assert records[2]["choices"][0]["turns"] == ["C1"]


def test_answers_of_another_model_or_other_weights_in_the_same_folder_are_not_taken(
    command, monkeypatch, causal, tmp_path
):
    adapter = shutil.copytree(causal[0], tmp_path / "again")
    words = [str(adapter) if word == causal[0] else word for word in command]
    script(monkeypatch, ["A1", "B1", "A2", "B2", "C1"])
    evaluate_answers.main(words)
    with pytest.raises(ValueError, match=r"was given to another model_id .*Choose another --output"):
        evaluate_answers.main(["--base", causal[2], *words[2:]])
    with pytest.raises(ValueError, match="was given to another model_id"):
        evaluate_answers.main([*words, "--max_new_tokens", "7"])
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="was given to another model_id"):
        evaluate_answers.main(words)


def test_a_limit_takes_the_first_rows(command, monkeypatch):
    script(monkeypatch, ["A1", "A2"])
    assert [record["question_id"] for record in evaluate_answers.main([*command, "--limit", "1"])] == [81]


def test_the_training_runs_yaml_gives_the_prompt_and_nothing_else(command, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text('model_name_or_path: other\ntrain_file: x.jsonl\nprompt_template: "{prompt}!"\neval_file: no\n')
    types = (evaluate_answers.AnswersArguments, GenerationArguments)
    words = [*command[:-2], "--config", str(config)]
    answers, generation = parse_evaluation(types, words)
    assert (answers.prompt_template, generation.base) == ("{prompt}!", None)
    assert answers.eval_file.endswith("question.jsonl")
    assert parse_evaluation(types, [*words, "--prompt_template", "x"])[0].prompt_template == "x"
    config.write_text("promt_template: x\n")
    with pytest.raises(ValueError, match=r"'promt_template' is not an argument\. Did you mean 'prompt_template'"):
        parse_evaluation(types, words)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], ValueError, "give --adapter FOLDER, or --base"),
        (["--base", "x"], ValueError, "Give --output"),
        (["--adapter", "nowhere"], FileNotFoundError, "nowhere: no adapter_config.json in it"),
        (["--base", "x", "--output", "y", "--batch_size", "0"], ValueError, "batch_size=0 must be at least 1"),
    ],
)
def test_impossible_arguments_are_named(words, error, message):
    with pytest.raises(error, match=message):
        evaluate_answers.main(words)


def test_rows_in_another_format_are_named(command, tmp_path):
    paper_data.write_rows(tmp_path / "question.jsonl", [{"question_id": 1}])
    with pytest.raises(ValueError, match=r"no column 'turns'; it has question_id\. Rows with question_id, turns are"):
        evaluate_answers.main(command)
