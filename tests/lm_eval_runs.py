"""Runs of lm-evaluation-harness on the recipes' tasks: with a real model, or with one that says given texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


TASKS = Path(__file__).resolve().parents[1] / "recipes" / "tasks"


class Scripted(LM):
    """A model that says these texts in order, and remembers what it was asked."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = list(texts)
        self.prompts: list[str] = []
        self.settings: list[dict[str, Any]] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        self.settings += [request.args[1] for request in requests]
        return [self.texts.pop(0) for _ in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def load(base: str, adapter: str | None = None, **settings: Any) -> HFLM:
    """The model that `--model hf --model_args pretrained=...,peft=...` loads."""
    return HFLM(pretrained=base, peft=adapter, device="cpu", **settings)


def evaluate(task: str, model: LM, files: dict[str, str], **settings: Any) -> dict[str, Any]:
    """Compute what `lm_eval run --tasks ... --include_path recipes/tasks --metadata ...` does."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=files)
    found = simple_evaluate(
        model, tasks=[task], task_manager=manager, bootstrap_iters=0, verbosity="ERROR", **settings
    )
    return found["results"][task] | {"samples": found["samples"][task]}
