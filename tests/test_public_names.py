"""Recipes and notebooks use what the package offers to everyone, and nothing behind it."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import lora_ga_trainer


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lora_ga_trainer"


def programs() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "recipes").rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                lines = [line for line in cell["source"] if not line.startswith(("%", "!"))]
                yield f"{path.relative_to(ROOT)}, cell {number}", ast.parse("".join(lines))


def imported(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Each import of the package: the module, and the name that is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == PACKAGE)


def test_recipes_and_notebooks_import_public_names_only():
    found = [(place, module, name) for place, tree in programs() for module, name in imported(tree)]
    assert len(found) > 20
    behind = [f"{place}: {module}" for place, module, _ in found if module != PACKAGE]
    private = [f"{place}: {name}" for place, _, name in found if name not in (None, *lora_ga_trainer.__all__)]
    assert behind + private == []


def test_the_check_sees_every_way_to_import():
    text = "import lora_ga_trainer.start\nfrom lora_ga_trainer.layers import x\nfrom lora_ga_trainer import layers\n"
    assert list(imported(ast.parse(text + "from lora_ga_trainers import y\nimport torch\n"))) == [
        ("lora_ga_trainer.start", None),
        ("lora_ga_trainer.layers", "x"),
        ("lora_ga_trainer", "layers"),
    ]


def test_every_public_name_is_there_and_says_what_it_is():
    for name in lora_ga_trainer.__all__:
        thing = getattr(lora_ga_trainer, name)
        if callable(thing):
            assert len(inspect.getdoc(thing) or "") > 20, name
    assert len(set(lora_ga_trainer.__all__)) == len(lora_ga_trainer.__all__)
