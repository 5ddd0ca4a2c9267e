"""GSM8K through lm-eval: the prompts of the recipes' tasks, the scores of answers, and a base with an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval_runs
import paper_data
import pytest
import torch
from lm_eval_runs import Scripted, evaluate, load
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from answering.generation import ALPACA_TEMPLATE
from finetuning.encoding import encode_prompt


STRICT, FLEXIBLE = "exact_match,strict-match", "exact_match,flexible-extract"
TEMPLATES = {"gsm8k_qa": "Q: {prompt}\nA: ", "gsm8k_alpaca": ALPACA_TEMPLATE}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {"gsm8k_file": paper_data.write_rows(tmp_path / "test.jsonl", paper_data.GSM8K)}


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TEMPLATES)
def test_a_right_number_scores_1_and_a_wrong_one_0(task, files):
    # right, right without the mark, wrong; the answers are 2, 3 and 4
    model = Scripted(["3 - 1 = 2.\n#### 2", "I think 3", "#### 5"])
    found = evaluate(task, model, files)
    assert model.prompts == [TEMPLATES[task].replace("{prompt}", row["question"]) for row in paper_data.GSM8K]
    assert (found[STRICT], found[FLEXIBLE]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("He has 2.\n#### 2", 1, 1),
        ("#### 2\nThe answer is: 2", 1, 1),  # as MetaMathQA ends
        ("#### 2.", 1, 1),
        ("#### 2\n#### 7", 1, 0),  # it did not stop: the first answer is its answer
        ("It costs $2", 0, 1),
        ("The answer is 2", 0, 1),
        ("#### 22", 0, 0),
        ("2 or 7", 0, 0),
        ("no idea", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_number_an_answer_comes_to(text, strict, flexible, files):
    found = evaluate("gsm8k_qa", Scripted([text]), files, limit=1)
    assert (found[STRICT], found[FLEXIBLE]) == (strict, flexible)


def test_thousands_may_be_parted_by_commas_on_either_side(tmp_path):
    rows = [{"question": "?", "answer": f"#### {number}"} for number in ("1,000", "1000", "-1,000")]
    files = {"gsm8k_file": paper_data.write_rows(tmp_path / "rows.jsonl", rows)}
    assert evaluate("gsm8k_qa", Scripted(["#### 1000", "#### 1,000", "#### -1000"]), files)[STRICT] == 1
    assert evaluate("gsm8k_qa", Scripted(["#### 100", "#### 10000", "#### 1000"]), files)[STRICT] == 0


def test_the_likeliest_answer_is_asked_for_and_ends_before_the_next_question(files):
    model = Scripted(["#### 2"] * 3)
    evaluate("gsm8k_qa", model, files)
    assert all(settings["do_sample"] is False for settings in model.settings)
    assert [settings["until"] for settings in model.settings] == [["Q:"]] * 3


def test_rows_in_another_format_are_named(tmp_path):
    file = paper_data.write_rows(tmp_path / "rows.jsonl", [{"question": "?"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl: no column 'answer'; it has question\."):
        evaluate("gsm8k_qa", Scripted([]), {"gsm8k_file": file})
    paper_data.write_rows(tmp_path / "rows.jsonl", [{"question": "?", "answer": "four"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 0: no '#### number' in its answer 'four'"):
        evaluate("gsm8k_qa", Scripted([]), {"gsm8k_file": file})


# --- a base and an adapter -----------------------------------------------------------------------------------------


def learn(model: Any, text: str, answer: str, steps: int) -> None:
    """Teach a model to say `answer` and to stop after `text`, with `<s>` before and `</s>` behind."""
    tokenizer = paper_data.byte_tokenizer("<s> $A")
    prompt, whole = tokenizer(text).input_ids, [*tokenizer(text + answer).input_ids, 2]
    ids = torch.tensor([whole])
    labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A random base, and an adapter that knows the first answer, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("taught")
    base = paper_data.save_base(folder / "base", "causal-lm")
    torch.manual_seed(7)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    learn(model, f"Q: {paper_data.GSM8K[0]['question']}\nA: ", "#### 2", steps=60)
    model.save_pretrained(folder / "adapter")
    return base, str(folder / "adapter")


def test_an_adapter_that_learned_the_answer_scores_1_and_its_base_alone_0(taught, files):
    base, adapter = taught
    with_adapter = evaluate("gsm8k_qa", load(base, adapter), files, limit=1)
    assert (with_adapter[STRICT], with_adapter[FLEXIBLE]) == (1, 1)
    assert with_adapter["samples"][0]["resps"] == [["#### 2"]]
    alone = evaluate("gsm8k_qa", load(base), files, limit=1, gen_kwargs="max_gen_toks=16")
    assert (alone[STRICT], alone[FLEXIBLE]) == (0, 0)


def test_the_prompt_has_the_tokens_that_training_gave_it(taught):
    """`<s>` once in front, nothing behind: what the recipe's training encodes."""
    model = load(taught[0])
    prompt = "Q: 1 + 1?\nA: "
    start, body = encode_prompt(prompt, model.tokenizer)
    assert model.tok_batch_encode([prompt])[0].tolist() == [[*start, *body]]


def test_answers_do_not_depend_on_the_batch(taught, files):
    said = []
    for batch_size in (1, 3):
        found = evaluate("gsm8k_qa", load(*taught, batch_size=batch_size), files, gen_kwargs="max_gen_toks=12")
        said.append([sample["resps"][0][0] for sample in found["samples"]])
    assert said[0] == said[1]
    assert said[0][0] == "#### 2"


@pytest.mark.slow
def test_the_command_line_of_the_docs_runs(taught, files, tmp_path):
    base, adapter = taught
    words = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={base},peft={adapter}"]
    words += ["--tasks", "gsm8k_qa", "--include_path", str(lm_eval_runs.TASKS), "--device", "cpu", "--limit", "1"]
    words += ["--metadata", f"gsm8k_file={files['gsm8k_file']}", "--output_path", str(tmp_path / "found")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "found").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["gsm8k_qa"][STRICT] == 1
