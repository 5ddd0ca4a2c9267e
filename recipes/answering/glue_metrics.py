"""GLUE's figures for a task, by scikit-learn, and GLUE's numbers of the classes."""

from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


# The names of classes 0, 1, ... on the hub (nyu-mll/glue); F1 is that of class 1.
CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("not_duplicate", "duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("negative", "positive"),
}


def compute_glue_metrics(task: str, predictions: list[int], references: list[int]) -> dict[str, float]:
    """
    Compute a task's figures as GLUE reports them.

    Args:
        task (`str`): one of `CLASSES`.
        predictions, references (`list[int]`): GLUE's class numbers.

    Returns:
        `dict[str, float]`: CoLA's Matthews correlation, F1 and accuracy for MRPC and QQP, accuracy for the others.
    """
    if task == "cola":
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
    figures = {"accuracy": float(accuracy_score(references, predictions))}
    if task in ("mrpc", "qqp"):
        figures["f1"] = float(f1_score(references, predictions))
    return figures


def class_numbers(names: list[str], task: str, words: dict[str, str]) -> list[int]:
    """
    Return GLUE's class numbers for names of classes: numbers, the hub's names, or words of `label_words`.

    Args:
        names (`list[str]`): what a data set calls the classes.
        task (`str`): one of `CLASSES`.
        words (`dict[str, str]`): the word for each value, as `filtering.word_for_value` returns it; may be empty.

    Raises:
        `ValueError`: if a name is none of these.
    """
    numbers = {name: number for number, name in enumerate(CLASSES[task])}
    numbers |= {str(number): number for number in range(len(CLASSES[task]))}
    numbers |= {word: int(value) for value, word in words.items() if value.isdigit()}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        raise ValueError(
            f"{task}: {unknown[0]!r} is none of {', '.join(numbers)}. Say with label_words which word stands for "
            "which of GLUE's numbers: 0=..., 1=..."
        )
    return [numbers[name] for name in names]
