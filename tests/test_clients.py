"""The page of clients says what real runs of them give."""

from __future__ import annotations

import re
from pathlib import Path

import optional
import pytest
from clients.client import Client


for library in ("trl", "bitsandbytes", "schedulefree", "sentence_transformers"):
    optional.require(library)

from clients.table import every_client, line, page, verdicts_of  # noqa: E402 (it imports these libraries)


PAGE = Path(__file__).parents[1] / "docs" / "clients.md"


def test_the_page_has_a_line_for_each_client_and_no_other() -> None:
    """At least 60 rows; the words of the verdicts are looked at by the runs."""
    text = PAGE.read_text(encoding="utf-8")
    cells = [re.split(r" \| ", row.strip("| \n")) for row in text.splitlines() if row.startswith("| ")]
    found = {name: verdicts for name, *verdicts in cells if name != "client"}
    assert len(found) >= 60
    assert page(found) == text


@pytest.mark.slow
@pytest.mark.usefixtures("unpacked_codes")
@pytest.mark.parametrize("client", list(every_client()), ids=lambda client: client.name)
def test_a_client_is_what_its_line_says(client: Client, tmp_path: Path) -> None:
    assert line(client, verdicts_of(client, tmp_path)) in PAGE.read_text(encoding="utf-8").splitlines()
