"""
Answer GSM8K with an adapter and count how many final numbers are right.

    python recipes/evaluate_gsm8k.py --adapter outputs/lora_ga_llama2_gsm8k --config \
recipes/configs/papers/lora_ga_llama2_gsm8k.yaml

The likeliest answer is taken (greedy). Every prompt and answer goes into a .jsonl file; a run that was stopped goes on
where it was.
"""

from dataclasses import dataclass, field
from decimal import Decimal

from answering.answers import HUB, Question, Record, answer_missing, read_questions, report, share
from answering.generation import GenerationArguments, Writer, fill_prompt, parse_evaluation
from answering.numbers_in_text import final_number, marked_number


@dataclass
class GSM8KArguments:
    """Say which questions are asked, and how."""

    eval_file: str = field(
        default=HUB,
        metadata={"help": "A file with the columns question and answer, or 'hub' for openai/gsm8k's test."},
    )
    prompt_template: str = field(
        default="Q: {prompt}\nA: ",
        metadata={"help": "What the model reads; {prompt} is the question. By default that of --config."},
    )


def main(argv: list[str] | None = None) -> dict:
    gsm8k, generation = parse_evaluation((GSM8KArguments, GenerationArguments), argv, __doc__)
    rows = read_questions(gsm8k.eval_file, "openai/gsm8k", "main", "test", ["question", "answer"])
    rows = rows.select(range(min(generation.limit or len(rows), len(rows))))
    questions = [
        {
            "id": number,
            "model": generation.model_name,
            "prompt": fill_prompt(gsm8k.prompt_template, row, row["question"]),
            "expected": expected_number(row["answer"], number),
        }
        for number, row in enumerate(rows)
    ]
    writer = Writer(generation)

    def answer(batch: list[Question]) -> list[Record]:
        written = writer.write([question["prompt"] for question in batch])
        return [question | judge(question["expected"], text) for question, text in zip(batch, written, strict=True)]

    path = generation.output_file("gsm8k_answers.jsonl")
    records = answer_missing(path, questions, answer, generation.batch_size)
    results = {
        "accuracy": share([record["correct"] for record in records]),
        "accuracy_of_marked": share([record["correct"] and record["marked"] for record in records]),
    }
    report("GSM8K", results, path)
    return results


def expected_number(answer: str, number: int) -> str:
    """Return the number that a row's own answer comes to."""
    value = marked_number(answer)
    if value is None:
        raise ValueError(f"row {number}: no '#### number' in its answer {answer[-100:]!r}. Is this GSM8K's format?")
    return str(value)


def judge(expected: str, text: str) -> dict:
    """Say which number a text comes to, whether it is right, and whether `####` or "The answer is" marked it."""
    number = final_number(text)
    return {
        "answer": text,
        "number": None if number is None else str(number),
        "correct": number is not None and number == Decimal(expected),
        "marked": marked_number(text) is not None,
    }


if __name__ == "__main__":
    main()
