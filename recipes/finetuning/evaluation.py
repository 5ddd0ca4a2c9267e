"""Metrics on held-out rows, by scikit-learn, and perplexity."""

import math
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from finetuning.encoding import IGNORED


def evaluation_functions(task: str, tokenizer: PreTrainedTokenizerBase, generates: bool) -> dict[str, Any]:
    """
    Return the arguments of a trainer that say what is computed beside the loss.

    Args:
        task (`str`): classification reports accuracy and macro-F1; the other tasks perplexity, from the loss.
        tokenizer (`PreTrainedTokenizerBase`): turns what a model wrote back into text.
        generates (`bool`): whether evaluation writes completions (`predict_with_generate`): then exact match too.

    Raises:
        `ValueError`: if anything but a seq2seq model is to write completions.
    """
    if generates and task != "seq2seq":
        raise ValueError(f"predict_with_generate=True, task={task!r}: only seq2seq models write in this recipe.")
    if task == "sequence-classification":
        return {"compute_metrics": compare_classes, "preprocess_logits_for_metrics": most_likely}
    if generates:

        def compare_texts(prediction: EvalPrediction) -> dict[str, float]:
            written, wanted = (decode(ids, tokenizer) for ids in (prediction.predictions, prediction.label_ids))
            return {"exact_match": float(accuracy_score(wanted, written))}

        return {"compute_metrics": compare_texts}
    return {}


def compare_classes(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy and the mean F1 over the classes, given class numbers."""
    predictions, references = prediction.predictions, prediction.label_ids
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, average="macro")),
    }


def most_likely(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return the class of the largest logit, so that no evaluation keeps all logits: (batch, classes) -> (batch,)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Turn rows of tokens, (batch, length) with -100 as filling, into texts without blanks around them."""
    texts = tokenizer.batch_decode(np.where(ids == IGNORED, tokenizer.pad_token_id, ids), skip_special_tokens=True)
    return [text.strip() for text in texts]


def add_perplexity(metrics: dict[str, float], task: str) -> dict[str, float]:
    """Return the metrics with exp(eval_loss) for tasks that write text; the loss is the mean of its batches' means."""
    if task == "sequence-classification":
        return metrics
    loss = metrics["eval_loss"]
    return {**metrics, "eval_perplexity": math.inf if loss >= 709 else math.exp(loss)}  # what a double can hold


def headline(metrics: dict[str, float]) -> str:
    """Return the metrics on held-out rows in one line, without those of the run's speed."""
    speed = ("_runtime", "_per_second", "epoch")
    return " ".join(f"{name}={value:.4f}" for name, value in metrics.items() if not name.endswith(speed))
