"""Questions of GSM8K for the tasks beside this file, from a local file or from the hub."""

from typing import Any

from datasets import Dataset, load_dataset


def read_questions(gsm8k_file: str | None = None, **_: Any) -> dict[str, Dataset]:
    """
    Read the questions that are asked.

    Args:
        gsm8k_file (`str`, *optional*):
            A .json or .jsonl file with the columns question and answer, given as `--metadata gsm8k_file=...`. By
            default the test split of `openai/gsm8k`.

    Returns:
        `dict[str, Dataset]`: the split `"test"`.

    Raises:
        `ValueError`: if the file lacks a column or a row's answer has no number behind `####`.
    """
    if gsm8k_file is None:
        return {"test": load_dataset("openai/gsm8k", "main", split="test")}
    rows = load_dataset("json", data_files=gsm8k_file, split="train")
    missing = [name for name in ("question", "answer") if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"gsm8k_file={gsm8k_file}: no column {missing[0]!r}; it has {', '.join(rows.column_names)}. GSM8K's own "
            "columns are needed: question and answer."
        )
    for number, row in enumerate(rows):
        # Without the mark the whole answer would be compared, and every model would be wrong.
        if "#### " not in row["answer"]:
            raise ValueError(
                f"gsm8k_file={gsm8k_file}, row {number}: no '#### number' in its answer {row['answer'][-100:]!r}. "
                "End every answer as GSM8K does."
            )
    return {"test": rows}
