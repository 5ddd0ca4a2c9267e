"""
The page `docs/clients.md`: every client, and what came of it with the mixin and with the callback alone.

    python tests/clients/table.py docs/clients.md

runs all of them and writes the page. Takes five minutes on two quiet cores, and needs the libraries of the tests.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from clients import adapters, models, sentences, trainers, trl_trainers
from clients.client import Client
from clients.runs import WAYS, make_trainer, run, verdict


INTRODUCTION = """# Clients

Each row is a real training of two steps on a tiny random model, by `tests/clients`. A test compares this page with
what the runs give.

**works** says three things:

* With the start undone, every logged figure and every trained weight is that of the plain Trainer, to the last bit. So
  the probe leaves no trace.
* The probe's loss on the first batch is the one that training logs. Where a forward pass draws random numbers, or the
  log is of another quantity, this is not compared.
* Before the first step, LoRA-GA's adapter changes nothing: the first logged loss is that of the plain Trainer. This is
  not compared where the loss looks at the factors themselves, or where texts are written after a teacher of the
  adapter's form was made (see [Limits](limits.md)).

**refused** means an error that says why, before training begins. *n layers start plain* counts adapted layers that the
loss never reaches.
"""
CATALOGUE: dict[str, list[Client]] = (
    models.CLIENTS | trainers.CLIENTS | adapters.CLIENTS | trl_trainers.CLIENTS | sentences.CLIENTS
)


def every_client() -> Iterator[Client]:
    return (client for clients in CATALOGUE.values() for client in clients)


def line(client: Client, verdicts: list[str]) -> str:
    return f"| {client.name} | {' | '.join(verdicts)} |"


def verdicts_of(client: Client, folder: Path) -> list[str]:
    """Run a client plainly and in both ways."""
    plain = None if client.refused else run(make_trainer(client, "plain", folder / "plain"))
    return [verdict(client, way, plain, folder / way) for way in WAYS]


def page(verdicts: dict[str, list[str]]) -> str:
    """Return the page, given the verdicts of each client by its name."""
    parts = [INTRODUCTION]
    for group, clients in CATALOGUE.items():
        rows = "\n".join(line(client, verdicts[client.name]) for client in clients)
        parts.append(f"## {group}\n\n| client | mixin | callback alone |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    found = {}
    for client in every_client():
        with tempfile.TemporaryDirectory() as folder:
            found[client.name] = verdicts_of(client, Path(folder))
    Path(sys.argv[1]).write_text(page(found), encoding="utf-8")
