"""Metrics on held-out rows, each through a small module of the recipe's own that needs no hub."""

import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase

from finetuning.encoding import IGNORED


METRICS = Path(__file__).resolve().parent / "metrics"


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Load one of the metric modules beside this file, wherever the program was started."""
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


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
        accuracy, f1 = load_metric("accuracy"), load_metric("f1")

        def classification(prediction: EvalPrediction) -> dict[str, float]:
            answer = {"predictions": prediction.predictions, "references": prediction.label_ids}
            return {**accuracy.compute(**answer), "macro_f1": f1.compute(**answer)["f1"]}

        return {"compute_metrics": classification, "preprocess_logits_for_metrics": most_likely}
    if generates:
        exact_match = load_metric("exact_match")

        def generation(prediction: EvalPrediction) -> dict[str, float]:
            texts = [decode(ids, tokenizer) for ids in (prediction.predictions, prediction.label_ids)]
            return exact_match.compute(predictions=texts[0], references=texts[1])

        return {"compute_metrics": generation}
    return {}


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
