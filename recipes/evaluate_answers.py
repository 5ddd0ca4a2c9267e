"""
Let an adapter answer a file of questions in one or more turns, MT-Bench's for example, for a judge to read.

    python recipes/evaluate_answers.py --adapter outputs/lora_ga_llama2_wizardlm --config \
recipes/configs/papers/lora_ga_llama2_wizardlm.yaml

A question is a line such as {"question_id": 81, "category": "writing", "turns": ["...", "..."]}, an answer one such as
{"question_id": 81, "answer_id": "...", "model_id": "...", "choices": [{"index": 0, "turns": ["...", "..."]}],
"tstamp": ...}: the formats of MT-Bench (arXiv 2306.05685). Nothing is judged here. The papers' scores are GPT-4's, and
depend on which GPT-4 that was, and on its prompt.
"""

import time
import uuid
from dataclasses import dataclass, field

from answering.answers import HUB, Question, Record, answer_missing, read_questions
from answering.generation import ALPACA_TEMPLATE, GenerationArguments, Writer, fill_prompt, parse_evaluation


@dataclass
class AnswersArguments:
    """Say which questions are asked, and how."""

    eval_file: str = field(
        default=HUB,
        metadata={"help": "A .jsonl file with the columns question_id and turns, or 'hub' for lighteval/mt-bench."},
    )
    prompt_template: str = field(
        default=ALPACA_TEMPLATE,
        metadata={"help": "What the model reads; {prompt} is the turn's question. By default that of --config."},
    )
    turn_separator: str = field(
        default="\n\n", metadata={"help": "What stands between an answer and the prompt of the next turn."}
    )
    max_turns: int = field(default=2, metadata={"help": "Turns to answer of each question."})


def main(argv: list[str] | None = None) -> list[Record]:
    answers, generation = parse_evaluation((AnswersArguments, GenerationArguments), argv, __doc__)
    rows = list(read_questions(answers.eval_file, "lighteval/mt-bench", None, "train", ["question_id", "turns"]))[
        : generation.limit
    ]
    questions = [
        {"question_id": row["question_id"], "turns": row["turns"], "model_id": generation.model_name} for row in rows
    ]
    writer = Writer(generation)

    def answer(batch: list[Question]) -> list[Record]:
        return [record_of(*pair) for pair in zip(batch, write_turns(batch, writer, answers), strict=True)]

    path = generation.output_file("answers.jsonl")
    records = answer_missing(path, questions, answer, generation.batch_size, "question_id", ("model_id",))
    print(f"{len(records)} answers in {path}. Nothing here judges them.")
    return records


def write_turns(batch: list[Question], writer: Writer, args: AnswersArguments) -> list[list[str]]:
    """Return the answers to every turn of each question; a turn's prompt goes on from the turns before it."""
    read = [""] * len(batch)
    written: list[list[str]] = [[] for _ in batch]
    for turn in range(args.max_turns):
        asked = [i for i, question in enumerate(batch) if turn < len(question["turns"])]
        for i in asked:
            read[i] += fill_prompt(args.prompt_template, {}, batch[i]["turns"][turn])
        for i, text in zip(asked, writer.write([read[i] for i in asked]) if asked else [], strict=True):
            written[i].append(text.strip())
            read[i] += text.strip() + args.turn_separator
    return written


def record_of(question: Question, turns: list[str]) -> Record:
    """Return a line of MT-Bench's file of answers."""
    return {
        "question_id": question["question_id"],
        "answer_id": uuid.uuid4().hex,
        "model_id": question["model_id"],
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


if __name__ == "__main__":
    main()
