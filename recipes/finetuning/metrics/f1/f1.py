"""F1 as an `evaluate` module that needs no hub."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """Compute F1: the mean over classes (`average="macro"`) unless asked for another of scikit-learn's averages."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Harmonic mean of precision and recall, averaged over the classes.",
            citation="",
            inputs_description="predictions, references: class numbers, one an example; average: how to average.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int], average: str = "macro") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average))}
