"""Exact match as an `evaluate` module that needs no hub."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class ExactMatch(evaluate.Metric):
    """Compute the share of texts that equal their reference to the letter."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of texts that equal their reference.",
            citation="",
            inputs_description="predictions, references: texts, one an example.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"exact_match": float(accuracy_score(references, predictions))}
