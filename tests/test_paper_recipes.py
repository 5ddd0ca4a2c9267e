"""The papers' recipes: what each learns of a row in the real format, and whole runs on tiny models of their kind."""

from __future__ import annotations

import json
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import paper_data
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))  # as `python recipes/finetune.py` does

import evaluate_answers
import evaluate_glue
import finetune
import lm_eval_runs
from answering.generation import ALPACA_TEMPLATE
from finetuning.arguments import parse
from finetuning.data import load_data, read_held_out
from finetuning.encoding import IGNORED
from lm_eval._cli import HarnessCLI
from transformers import AutoTokenizer


PAPERS = Path(finetune.__file__).resolve().parent / "configs" / "papers"
RECIPES = sorted(path.stem for path in PAPERS.glob("*.yaml"))
INITS = {"lora_ga": ("lora_ga", "none"), "lora_one": ("lora_one", "none"), "lora_pro": ("none", "lora_pro_adamw")}

ARXIV = {"lora_ga": "2407.05000", "lora_one": "2502.01235", "lora_pro": "2407.18242"}


def method(name: str) -> str:
    return "_".join(name.split("_")[:2])


def opening(name: str) -> str:
    return (PAPERS / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]


def rows_of(name: str) -> list[dict[str, Any]]:
    kind = name.rpartition("_")[2]
    generated = {"gsm8k": paper_data.META_MATH, "humaneval": paper_data.CODE_FEEDBACK, "wizardlm": paper_data.WIZARD}
    return generated.get(kind) or paper_data.GLUE[kind]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: paper_data.save_base(folder / kind, kind) for kind in ("causal-lm", "seq2seq")}


def overrides(name: str, bases: dict[str, str], folder: Path) -> list[str]:
    """The arguments that make a recipe small: its model, its rows, its steps; everything else is as shipped."""
    rows = paper_data.write_rows(folder / "rows.jsonl", rows_of(name))
    words = ["--config", str(PAPERS / f"{name}.yaml"), "--train_file", rows, "--use_cpu"]
    kind = "seq2seq" if "_t5_" in name else "causal-lm"
    words += ["--model_name_or_path", bases[kind], "--output_dir", str(folder / "adapter"), "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--disable_tqdm", "true"]
    return words + (["--eval_file", rows] if kind == "seq2seq" else [])


# --- the YAML files ------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_task_of_the_papers():
    t5 = {f"lora_ga_t5_{task}" for task in paper_data.GLUE}
    llama = {f"lora_ga_llama2_{task}" for task in ("gsm8k", "humaneval", "wizardlm")}
    assert {*t5, *llama} <= set(RECIPES)
    assert {method(name) for name in RECIPES} == set(INITS)


@pytest.mark.parametrize("name", RECIPES)
def test_every_paper_yaml_parses_and_says_what_it_is_and_where_it_comes_from(name):
    head = opening(name)
    assert all(line.startswith("#") for line in head.splitlines())
    place = f"recipes/configs/papers/{name}.yaml"
    assert f"accelerate launch recipes/finetune.py --config {place}\n" in head
    if name.endswith(("_gsm8k", "_humaneval")):
        check_lm_eval_command(head, name)
    else:
        assert re.search(
            rf"python recipes/evaluate_\w+\.py [^\n]*--adapter outputs/{name}\b[^\n]*\\\n# +--config {place}", head
        )
    for word in ("# What:", "# Needs:", "# Gives:", "# From:  github.com/", "# Not verified:", ARXIV[method(name)]):
        assert word in head
    _, data, lora, lora_ga, training = parse(["--config", str(PAPERS / f"{name}.yaml"), "--use_cpu"])
    assert (lora_ga.init, lora_ga.correction) == INITS[method(name)]
    assert training.output_dir == f"outputs/{name}"
    assert (lora.lora_r, lora.lora_alpha, lora.target_modules) == (8, 16, ["all-linear"])
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 32
    schedule = ("linear", 100) if name.startswith("lora_one_llama2") else ("cosine", 0.03)
    assert (training.lr_scheduler_type, training.warmup_steps) == schedule
    assert (training.num_train_epochs, training.weight_decay) == (1, 0)
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.999)
    assert data.dataset_name is not None


def lm_eval_arguments(head: str) -> Namespace:
    """Read the command that a head proposes as lm-eval's own command line does."""
    command = re.search(r"lm_eval (run (?:[^\n]*\\\n)*[^\n]*)", head)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lm_eval", *shlex.split(command.replace("\\\n#", " "))])
        return HarnessCLI().parse_args()


def check_lm_eval_command(head: str, name: str) -> None:
    """The adapter is the recipe's, on the recipe's base, and the task reads the prompt that was trained on."""
    args, recipe = lm_eval_arguments(head), yaml.safe_load((PAPERS / f"{name}.yaml").read_text())
    assert args.model_args["pretrained"] == recipe["model_name_or_path"]
    assert (args.model_args["peft"], args.model_args["dtype"]) == (recipe["output_dir"], recipe["dtype"])
    assert args.include_path == "recipes/tasks"
    task = yaml.load((lm_eval_runs.TASKS / f"{args.tasks[0]}.yaml").read_text(), yaml.BaseLoader)
    question = task["doc_to_text"].replace("{{question}}", "{prompt}")
    if name.endswith("_humaneval"):
        assert args.confirm_run_unsafe_code
        before, after = recipe["prompt_template"].split("{prompt}")
        assert question.startswith(before)
        assert question.endswith(f"{after}```python\n")
    else:
        assert question == recipe["prompt_template"]


def test_the_recipes_for_a_judge_ask_as_the_program_does_by_itself():
    for name in RECIPES:
        if name.endswith("_wizardlm"):
            assert yaml.safe_load((PAPERS / f"{name}.yaml").read_text())["prompt_template"] == ALPACA_TEMPLATE


# --- what is learned of a row --------------------------------------------------------------------------------------

ALPACA_OPENING = "Below is an instruction that describes a task. Write a response"
LEARNED = {
    "lora_ga_llama2_gsm8k": (
        4,
        "<s>Q: Ann has 2 apples and buys 2 more. How many?\nA: ",
        "2 + 2 = 4.\n#### 4</s>",
    ),
    "lora_pro_llama2_gsm8k": (
        4,
        "### Instruction:\nAnn has 2 apples and buys 2 more. How many?\n\n### Response:\n",
        "2 + 2 = 4.\n#### 4\nThe answer is: 4</s>",
    ),
    "lora_ga_llama2_humaneval": (
        4,
        "### Instruction:\nWrite a function that adds 0.\n\n### Response:\n",
        "Here:\n```python\ndef f(x):\n    return x + 0\n```</s>",
    ),
    "lora_ga_llama2_wizardlm": (4, "### Instruction:\nName 0 colours.\n\n### Response:\n", "Red.</s>"),
    "lora_ga_t5_mnli": (
        6,
        "classify the semantic similarity of the text: A dog runs.\nIt moves 0.\nresult: </s>",
        "entailment</s>",
    ),
    "lora_ga_t5_sst2": (6, "classify the sentiment of the text: a fine film 0 \nresult: </s>", "negative</s>"),
    "lora_ga_t5_cola": (6, "classify the grammaticality of the text: He left 0.\nresult: </s>", "unacceptable</s>"),
    "lora_ga_t5_qnli": (
        6,
        "classify the semantic similarity of the question and the sentence: Who?\nAnn 0 did.\nresult: </s>",
        "entailment</s>",
    ),
    "lora_ga_t5_mrpc": (
        6,
        "classify the semantic similarity of the text: He left.\nHe went 0.\nresult: </s>",
        "different</s>",
    ),
    "lora_pro_t5_cola": (6, "cola sentence: He left 0.</s>", "unacceptable</s>"),
}


@pytest.mark.parametrize("name", LEARNED)
def test_what_is_learned_of_a_row_in_the_real_format(name, bases, tmp_path):
    count, prompt, completion = LEARNED[name]
    model, data, *_ = parse([*overrides(name, bases, tmp_path), "--eval_fraction", "0"])
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
    rows = load_data(data, model.task, tokenizer).train
    assert len(rows) == count
    row = rows[0]
    labels = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(labels) == completion
    read = row["input_ids"] if model.task == "seq2seq" else row["input_ids"][: -len(labels)]
    assert tokenizer.decode(read).endswith(prompt)
    assert ALPACA_OPENING in tokenizer.decode(read) or "### Instruction" not in prompt


def test_glue_labels_may_be_numbers_or_the_hubs_names_and_nothing_else(bases, tmp_path):
    name = "lora_ga_t5_mrpc"
    words = overrides(name, bases, tmp_path)
    learned = []
    for labels in ([0, 1], ["not_equivalent", "equivalent"], ["different", "equivalent"], [0, -1]):
        rows = [dict(row, label=label) for row, label in zip(rows_of(name), labels, strict=False)]
        paper_data.write_rows(tmp_path / "rows.jsonl", rows)
        model, data, *_ = parse(words)
        tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path)
        if -1 in labels:
            with pytest.raises(ValueError, match=r"label: '-1' has no word in label_words=\['0=different'"):
                load_data(data, model.task, tokenizer)
        else:
            learned.append(load_data(data, model.task, tokenizer).train["labels"])
    assert learned[0] == learned[1] == learned[2]
    assert len(read_held_out(data, model.task)) == 2


# --- whole runs ----------------------------------------------------------------------------------------------------


def evaluate_recipe(name: str, bases: dict[str, str], folder: Path) -> None:
    kind = name.rpartition("_")[2]
    adapter = ["--adapter", str(folder / "adapter"), "--config", str(PAPERS / f"{name}.yaml"), "--batch_size", "2"]
    file = folder / "questions.jsonl"
    if kind in ("gsm8k", "humaneval"):
        rows = paper_data.GSM8K if kind == "gsm8k" else paper_data.HUMANEVAL
        files = {f"{kind}_file": paper_data.write_rows(file, rows)}
        model = lm_eval_runs.load(bases["causal-lm"], str(folder / "adapter"))
        task = lm_eval_arguments(opening(name)).tasks[0]
        settings = {"gen_kwargs": "max_gen_toks=4", "limit": 1, "confirm_run_unsafe_code": True}
        found = lm_eval_runs.evaluate(task, model, files, **settings)
        assert found["exact_match,strict-match" if kind == "gsm8k" else "pass@1,code"] == 0  # of two steps
    elif kind == "wizardlm":
        paper_data.write_rows(file, paper_data.MT_BENCH)
        records = evaluate_answers.main([*adapter, "--eval_file", str(file), "--max_new_tokens", "4"])
        assert [len(record["choices"][0]["turns"]) for record in records] == [2, 2]
    else:
        held_out = ["--train_file", str(folder / "rows.jsonl"), "--eval_file", str(folder / "rows.jsonl")]
        results = evaluate_glue.main([*adapter, *held_out, "--glue_task", kind, "--restrict_to_labels"])
        assert (results["accuracy"]["n"], results["no_label"]) == (6, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_from_its_rows_to_its_figures(name, bases, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "adapt_to_cpu", lambda args: None)  # tiny models are faster on one
    monkeypatch.setattr(sys, "argv", ["finetune.py", *overrides(name, bases, tmp_path), "--num_samples", "3"])
    finetune.main()
    adapter = tmp_path / "adapter"
    loader = AutoPeftModelForSeq2SeqLM if "_t5_" in name else AutoPeftModelForCausalLM
    model = loader.from_pretrained(adapter, dtype=torch.float32).eval()
    assert model.peft_config["default"].r == (16 if name.startswith("lora_ga") else 8)
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    if "_t5_" in name:
        batch["decoder_input_ids"] = torch.tensor([[0]])
    with torch.no_grad():
        trained = model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
    assert not torch.equal(trained, base)
    assert json.loads((adapter / "eval_results.json").read_text())["eval_loss"] > 0
    assert (adapter / "lora_ga_report.json").exists() == (not name.startswith("lora_pro"))
    evaluate_recipe(name, bases, tmp_path)


# What the heads of the files propose on the command line.
PROPOSED = {
    "lora_one_t5_cola": ("lora_ga_t5_mnli", ["--init", "lora_one", "--gamma", "128"]),
    "lora_pro_t5_cola": (
        "lora_ga_t5_mnli",
        ["--init", "none", "--correction", "lora_pro_adamw", "--use_rslora", "false"],
    ),
    "lora_pro_llama2_gsm8k": (
        "lora_pro_llama2_gsm8k",
        ["--correction", "lora_pro", "--use_rslora", "true", "--lora_dropout", "0.1"],
    ),
}


@pytest.mark.parametrize("name", PROPOSED)
def test_what_a_head_proposes_runs(name, bases, tmp_path, monkeypatch):
    over, words = PROPOSED[name]
    assert " ".join(words) in " ".join(opening(name).replace("#", " ").split())
    monkeypatch.setattr(finetune, "adapt_to_cpu", lambda args: None)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *overrides(over, bases, tmp_path), *words, "--num_samples", "3"])
    finetune.main()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
