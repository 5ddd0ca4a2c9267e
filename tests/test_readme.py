"""The README: its length, its two commands, its example, and the links and names in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lora_ga_trainer
from lora_ga_trainer.gradients import sketch


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
WORDS = ("a", "dull", "fine", "film")


def paragraphs() -> list[str]:
    """Prose between blank lines; list items and rows of tables count one by one, code does not count."""
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    return re.split(r"\n\s*\n|\n(?=[*|-] ?)", prose)


def test_it_is_read_in_a_few_minutes() -> None:
    assert 600 <= len(README.split()) <= 900
    longest = max(paragraphs(), key=lambda text: len(text.split()))
    assert len(longest.split()) <= 90, longest


def test_the_first_block_is_the_main_command_and_the_second_the_tests() -> None:
    (first, main), (second, tests) = [block for block in BLOCKS if block[0] == "bash"]
    assert BLOCKS[0] == (first, main)
    assert first == second == "bash"
    start = ["python3 -m venv .venv", "source .venv/bin/activate"]
    assert main.splitlines()[:2] == tests.splitlines()[:2] == start
    assert main.endswith("accelerate launch recipes/finetune.py --config recipes/configs/quickstart.yaml\n")
    assert tests.endswith("python -m pytest -n 2 --dist loadfile --cov=lora_ga_trainer\n")
    assert (ROOT / "recipes" / "configs" / "quickstart.yaml").exists()
    extras = re.findall(r"pip install -c constraints/cpu.txt -e '\.\[(\w+)\]'", main + tests)
    assert extras == ["demo", "test"]


def a_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def rows(count: int) -> datasets.Dataset:
    sentences = [" ".join(WORDS[(i + j) % 4] for j in range(1 + i % 5)) for i in range(count)]
    return datasets.Dataset.from_dict({"sentence": sentences, "label": [i % 2 for i in range(count)]})


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example as it stands, but for the hub: a tiny BERT and a few rows stand in for the names in it."""
    (example,) = [code for language, code in BLOCKS if language == "python"]
    model, data = '"google-bert/bert-base-uncased"', "stanfordnlp/sst2"
    assert example.count(model) == 1
    tiny.bert(num_labels=2).save_pretrained(tmp_path / "model")
    a_tokenizer().save_pretrained(tmp_path / "model")

    def load_dataset(name: str) -> datasets.DatasetDict:
        assert name == data
        return datasets.DatasetDict(train=rows(80), validation=rows(8))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example.replace(model, repr(str(tmp_path / "model"))), "README.md", "exec"), names)
    assert names["trainer"].lora_ga_report.samples == 64
    assert names["trainer"].state.epoch == 1
    assert (tmp_path / "energy.png").stat().st_size > 0


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert "docs/_static/energy.png" in links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert missing == []
    assert (ROOT / "docs" / "_static" / "energy.png").stat().st_size < 100_000


def test_every_name_and_field_it_mentions_exists() -> None:
    using = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \|", using, flags=re.MULTILINE)
    assert table
    assert set(table) <= set(lora_ga_trainer.LoRAGAConfig().to_dict())
    for name in ("LoRAGATrainer", "LoRAGAMixin", "LoRAGACallback", "load_adapter", "export_adapter"):
        assert name in README
        assert name in lora_ga_trainer.__all__


def test_figures_are_not_older_than_their_source() -> None:
    """The sketch's table in the code and the default it argues for agree."""
    assert "**64, 1/16 1/4 1/2, 64**" in sketch.__doc__
    assert sketch.sketch_columns(lora_ga_trainer.LoRAGAConfig(), 8) == 64
    assert sketch.turning_points(lora_ga_trainer.LoRAGAConfig().num_samples) == [4, 16, 32, 64]
