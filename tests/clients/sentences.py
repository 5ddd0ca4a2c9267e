"""Models of sentence-transformers under its own trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import native
import pytest
import sentence_transformers as library
import tiny_trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import cross_encoder, sentence_transformer, sparse_encoder
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from torch import nn

from clients.client import Client, settings
from clients.models import TEXT, WITHOUT_DROPOUT, from_config


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])


def rows(*columns: str, labels: Callable[[int], float] | None = None) -> Dataset:
    found: list[dict[str, Any]] = list(tiny_trl.rows(24, *columns))
    if labels is not None:
        found = [row | {"label": labels(i)} for i, row in enumerate(found)]
    return Dataset.from_list(found)


def base(folder: Path, head: str = "", **sizes: Any) -> str:
    """Save a tiny random BERT with its tokenizer."""
    model = from_config(head, "bert", TEXT | WITHOUT_DROPOUT | sizes)
    model.save_pretrained(folder / "base")
    tiny_trl.tokenizer().save_pretrained(folder / "base")
    return str(folder / "base")


def with_adapter(model: nn.Module) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        native.let_transformers_take_this_peft(patch)
        model.add_adapter(LORA)
    return model


def sentences(folder: Path) -> nn.Module:
    return with_adapter(library.SentenceTransformer(base(folder), device="cpu"))


def inside(folder: Path) -> nn.Module:
    model = library.SentenceTransformer(base(folder), device="cpu")
    model[0].model = get_peft_model(model[0].model, LORA)
    return model


def around(folder: Path) -> nn.Module:
    return get_peft_model(library.SentenceTransformer(base(folder), device="cpu"), LORA)


def router(folder: Path) -> nn.Module:
    """Questions and documents go through models of their own; that of the documents is adapted."""
    question, document = (Transformer(base(folder / name)) for name in ("question", "document"))
    document.model = get_peft_model(document.model, LORA)
    ways = Router.for_query_document(query_modules=[question], document_modules=[document])
    return library.SentenceTransformer(modules=[ways, Pooling(32)], device="cpu")


def cross(folder: Path) -> nn.Module:
    return with_adapter(library.CrossEncoder(base(folder, "SequenceClassification", num_labels=1), device="cpu"))


def sparse(folder: Path) -> nn.Module:
    return with_adapter(library.SparseEncoder(base(folder, "MaskedLM"), device="cpu"))


def sentence_client(
    name: str,
    kind: str,
    model: Callable[[Path], nn.Module],
    loss: Callable[[Any], nn.Module],
    data: Callable[[], Any],
    same_loss: bool = True,
    **more: Any,
) -> Client:
    def make(folder: Path) -> dict[str, Any]:
        arguments = settings(folder) | more
        del arguments["remove_unused_columns"], arguments["train_sampling_strategy"]
        made = model(folder)
        return {
            "model": made,
            "args": getattr(library, f"{kind}TrainingArguments")(**arguments),
            "train_dataset": data(),
            "loss": loss(made),
        }

    return Client(name, make, getattr(library, f"{kind}Trainer"), same_loss=same_loss)


pairs = sentence_transformer.losses.MultipleNegativesRankingLoss
graded = lambda: rows("a", "b", labels=lambda i: i % 3 / 2)
answers = lambda: rows("anchor", "positive")
CLIENTS = {
    "sentence-transformers": [
        sentence_client("In-batch negatives", "SentenceTransformer", sentences, pairs, answers),
        sentence_client("In-batch negatives, a `PeftModel` inside", "SentenceTransformer", inside, pairs, answers),
        sentence_client("In-batch negatives, a `PeftModel` around", "SentenceTransformer", around, pairs, answers),
        sentence_client("In-batch negatives, cached", "SentenceTransformer", sentences,
                        lambda model: sentence_transformer.losses.CachedMultipleNegativesRankingLoss(
                            model, mini_batch_size=2), answers),
        sentence_client("Triplets", "SentenceTransformer", sentences, sentence_transformer.losses.TripletLoss,
                        lambda: rows("anchor", "positive", "negative")),
        sentence_client("Cosines", "SentenceTransformer", sentences, sentence_transformer.losses.CoSENTLoss, graded),
        sentence_client("Nested sizes (Matryoshka)", "SentenceTransformer", sentences,
                        lambda model: sentence_transformer.losses.MatryoshkaLoss(model, pairs(model), [32, 16]),
                        answers),
        sentence_client("A router of questions and documents", "SentenceTransformer", router, pairs, answers,
                        router_mapping={"anchor": "query", "positive": "document"}),
        sentence_client("Cross-encoder", "CrossEncoder", cross, cross_encoder.losses.BinaryCrossEntropyLoss,
                        lambda: rows("a", "b", labels=lambda i: float(i % 2))),
        sentence_client("Sparse encoder (SPLADE)", "SparseEncoder", sparse,
                        lambda model: sparse_encoder.losses.SpladeLoss(
                            model, sparse_encoder.losses.SparseMultipleNegativesRankingLoss(model),
                            document_regularizer_weight=1e-3, query_regularizer_weight=1e-3),
                        answers, same_loss=False),  # the weights of its parts grow from step to step
    ]
}  # fmt: skip
