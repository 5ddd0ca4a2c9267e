"""Settings of the documentation. Build it with `python -m sphinx -W docs build/docs`."""

from __future__ import annotations

import re
from typing import Any

import lora_ga_trainer


project = "lora_ga_trainer"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "lora_ga_trainer"
html_static_path = ["_static"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # or torch's own docstrings, written for its own site, would appear here
autodoc_typehints = "none"  # the docstrings say what an argument is
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
default_role = "code"  # docstrings put code between single backticks

# A link to a name of this package must lead somewhere. Other libraries are not looked up: that needs a network.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!lora_ga_trainer\.).*")]


def _link(match: re.Match[str]) -> str:
    """Turn [`Name`] into a link where the name is public, and into code where it is not."""
    name = match.group(1)
    public = name.split(".")[0] in lora_ga_trainer.__all__
    return f":py:obj:`~lora_ga_trainer.{name}`" if public else f"`{name}`"


def _mark_code(lines: list[str], language: str) -> list[str]:
    """Mark the indented blocks between paragraphs as code, up to the first section such as `Args:`."""
    marked: list[str] = []
    in_example = in_sections = False
    for line in lines:
        in_sections = in_sections or re.fullmatch(r"[A-Z]\w+:", line) is not None
        starts = line.startswith("    ") and bool(marked) and not marked[-1]
        if starts and not in_example and not in_sections:
            marked += [f".. code-block:: {language}", ""]
            in_example = True
        elif line and not line.startswith(" "):
            in_example = False
        marked.append(line)
    return marked


def _render_docstring(app: Any, what: str, name: str, subject: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring in Hugging Face format into what napoleon reads. Runs before it."""
    # Errors stand in backticks there; napoleon wants their bare names.
    code = "\n".join(_mark_code(lines, "text" if what == "module" else "python"))
    text = re.sub(r"^(\s+)`(\w+)`:", r"\1\2:", code, flags=re.MULTILINE)
    lines[:] = re.sub(r"\[`([\w.]+)`\]", _link, text).split("\n")


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _render_docstring, priority=400)  # napoleon's is 500
