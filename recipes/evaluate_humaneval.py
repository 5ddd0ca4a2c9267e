"""
Let an adapter write HumanEval's functions, run its tests on them and report pass@k.

    python recipes/evaluate_humaneval.py --adapter outputs/lora_ga_llama2_humaneval --allow_code_execution --config \
recipes/configs/papers/lora_ga_llama2_humaneval.yaml

Programs that a model wrote are run, so nothing happens without --allow_code_execution. Each runs in a process of its
own with limits on time, memory, files and processes and without a network. That is a fence and no jail: it stops
accidents, not a program made to break out (see answering/fence.py). Run models that you don't trust on a machine that
you can lose.
"""

import re
import zlib
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby, takewhile
from math import comb, sqrt
from typing import Literal

from answering.answers import HUB, Question, Record, answer_missing, read_questions, report
from answering.fence import check_fence, run_fenced
from answering.generation import ALPACA_TEMPLATE, GenerationArguments, Writer, fill_prompt, parse_evaluation


COLUMNS = ["task_id", "prompt", "entry_point", "canonical_solution", "test"]
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function and its imports, in one block of code.\n\n"
    "```python\n{prompt}```"
)
BLOCK = "```"
ANSWER_OPENING = f"{BLOCK}python\n"
STATEMENT = (
    r" ?(?:(?:async def|def|class|import|from)\b|@)"  # a space may be left of what the tokenizer puts before words
)
CODE = re.compile(rf"^(?:{STATEMENT}|  +\S)", re.MULTILINE)


@dataclass
class HumanEvalArguments:
    """Say which problems are set, how they are put, and what their programs may use."""

    eval_file: str = field(
        default=HUB,
        metadata={
            "help": f"A file with the columns {', '.join(COLUMNS)}, or 'hub' for openai/openai_humaneval's test."
        },
    )
    prompt_template: str = field(
        default=ALPACA_TEMPLATE,
        metadata={"help": "What the model reads; {prompt} is the task in words. By default that of --config."},
    )
    style: Literal["instruct", "complete"] = field(
        default="instruct",
        metadata={
            "help": "'instruct' asks for the function through prompt_template; 'complete' shows the problem alone and "
            "lets the model go on, as one does with a base model."
        },
    )
    samples: int = field(default=1, metadata={"help": "Programs to write for each problem. 1: the likeliest."})
    k: list[int] = field(default_factory=lambda: [1], metadata={"help": "The k of pass@k, none above samples."})
    temperature: float = field(default=0.8, metadata={"help": "With more samples than one: how random they are."})
    top_p: float = field(default=0.95, metadata={"help": "With more samples than one: probability that they share."})
    seed: int = field(default=0, metadata={"help": "Seed of the random samples."})
    timeout: float = field(default=5.0, metadata={"help": "Seconds that a program may run."})
    memory_mb: int = field(default=1024, metadata={"help": "MiB of memory that a program may have."})
    allow_code_execution: bool = field(
        default=False, metadata={"help": "Run the programs that the model writes, inside a fence that is no jail."}
    )

    def __post_init__(self) -> None:
        if not self.allow_code_execution:
            raise ValueError(
                "evaluate_humaneval runs programs that a model wrote, with your rights on this machine but for time, "
                "memory, files, processes and network, which are limited. Nobody has read them. If that is what you "
                "want, add --allow_code_execution."
            )
        if self.samples < 1 or not all(1 <= k <= self.samples for k in self.k):
            raise ValueError(f"k={self.k}, samples={self.samples}: pass@k needs at least k samples of each problem.")
        if self.timeout <= 0 or self.memory_mb < 64:
            raise ValueError(f"timeout={self.timeout}, memory_mb={self.memory_mb}: at least 0.1 s and 64 MiB, please.")


def main(argv: list[str] | None = None) -> dict:
    humaneval, generation = parse_evaluation((HumanEvalArguments, GenerationArguments), argv, __doc__)
    print(f"each program has {check_fence(humaneval.timeout, humaneval.memory_mb)}")
    problems = list(read_questions(humaneval.eval_file, "openai/openai_humaneval", None, "test", COLUMNS))
    problems = {problem["task_id"]: problem for problem in problems[: generation.limit]}
    questions = [
        {
            "id": f"{task_id}/{sample}",
            "task_id": task_id,
            "model": generation.model_name,
            "sampling": sampling_of(humaneval),
            "prompt": prompt_of(problem, humaneval),
        }
        for task_id, problem in problems.items()
        for sample in range(humaneval.samples)
    ]
    writer = Writer(generation)

    def answer(batch: list[Question]) -> list[Record]:
        if humaneval.samples > 1:
            # A stream of its own: where answers are added to a file the first ones are not drawn again.
            stream = zlib.crc32(f"{humaneval.seed} {batch[0]['id']}".encode())
            writer.sample(humaneval.temperature, humaneval.top_p, stream)
        written = writer.write([question["prompt"] for question in batch])
        return [
            question | judge(problems[question["task_id"]], text, humaneval)
            for question, text in zip(batch, written, strict=True)
        ]

    path = generation.output_file("humaneval_answers.jsonl")
    same = ("prompt", "model", "sampling")
    records = answer_missing(path, questions, answer, generation.batch_size, same=same)
    passed = [
        sum(record["passed"] for record in group)
        for _, group in groupby(records, key=lambda record: record["task_id"])
    ]
    results = {f"pass@{k}": pass_at_k(humaneval.samples, passed, k) for k in humaneval.k}
    report("HumanEval", results, path)
    return results


def sampling_of(args: HumanEvalArguments) -> str:
    """Say how tokens are chosen; answers chosen otherwise are not samples of the same kind."""
    if args.samples == 1:
        return "the likeliest token"
    return f"temperature {args.temperature}, top_p {args.top_p}, seed {args.seed}"


def prompt_of(problem: Record, args: HumanEvalArguments) -> str:
    """Return what the model reads of a problem."""
    if args.style == "complete":
        return problem["prompt"]
    return fill_prompt(args.prompt_template, {}, INSTRUCTION.format(prompt=problem["prompt"])) + ANSWER_OPENING


def judge(problem: Record, text: str, args: HumanEvalArguments) -> dict:
    """Run the problem's tests on the code in a text."""
    code = extract_code(text)
    sources = [problem["prompt"] + code, problem["test"], f"check({problem['entry_point']})"]
    outcome = run_fenced(sources, args.timeout, args.memory_mb)
    return {"answer": text, "code": code, "passed": outcome.passed, "reason": outcome.reason}


def extract_code(text: str) -> str:
    """
    Return the code in an answer, ready to be put behind the problem's prompt.

    What comes before a block's end counts where the prompt has opened the block, and the first block where it has
    not. A whole function goes on a line of its own and replaces the one that the prompt began; an indented body goes
    on with it, and ends before the first line that is not indented.
    """
    before, _, after = text.partition(BLOCK)
    if not CODE.search(before) and after:
        before = re.sub(r"\A\w*[ \t]*\n", "", after).partition(BLOCK)[0]
    lines = before.expandtabs(4).rstrip().split("\n")
    while lines and not lines[0].strip():
        lines.pop(0)
    if not lines or not lines[0].startswith(" ") or re.match(STATEMENT, lines[0]):
        return "\n" + "\n".join([line.removeprefix(" ") if n == 0 else line for n, line in enumerate(lines)]) + "\n"
    body = takewhile(lambda line: not line.strip() or line.startswith(" "), lines)
    return "\n".join(body) + "\n"


def pass_at_k(samples: int, passed: list[int], k: int) -> dict[str, float]:
    """
    Return the unbiased estimate of pass@k over problems, 1 - C(n - c, k) / C(n, k) each (arXiv 2107.03374, eq. 1).

    Args:
        samples (`int`): n, programs a problem.
        passed (`list[int]`): c, for each problem the programs that passed.
        k (`int`): programs of which one must pass.

    Returns:
        The mean, its standard error over problems (binomial where n = 1), and the number of problems.
    """
    shares = [1 - Fraction(comb(samples - c, k), comb(samples, k)) for c in passed]
    mean = sum(shares, Fraction()) / len(shares)
    variance = float(sum((share - mean) ** 2 for share in shares) / len(shares))
    return {"value": float(mean), "standard_error": sqrt(variance / len(shares)), "n": len(shares)}


if __name__ == "__main__":
    main()
