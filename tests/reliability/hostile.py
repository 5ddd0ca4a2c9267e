"""Hostile contents of files, and the law that reading them obeys."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


# Spelt as text: no JSON writer would write most of them. `@9*400@` stands for 400 nines, see `expanded`.
ODD_SCALARS = [
    "null", "true", "-0", "01", "0x1", "1_000", "1e999", "-1e999", "1e-400", "@9*400@", "@9*5000@", "NaN", "Infinity",
    "-Infinity", '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"a\x00b"', '""', "[]", "{}", "''", "nan", "None",
    "2001-99-99", "0001-01-01", "1:99:99", '"@x*5000@"', '"\U0001f600"', "18446744073709551616",
]  # fmt: skip
DEPTHS = st.sampled_from([10, 100, 300, 900, 950, 990, 1000, 1100, 100_000])


def deep(depth: int, opening: str = "[", closing: str = "]") -> str:
    return f"@{opening}*{depth}@@{closing}*{depth}@"


def expanded(content: bytes) -> bytes:
    """Repeat what is to be repeated only now: hypothesis keeps and prints the short form."""
    return re.sub(rb"@([^@*]*)\*(\d+)@", lambda found: found[1] * min(int(found[2]), 300_000), content)


@cache
def scalars() -> st.SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(ODD_SCALARS),
        st.integers().map(str),
        st.floats().map(repr),
        st.text(max_size=20).map(json.dumps),
        st.text(max_size=20).map(lambda text: json.dumps(text, ensure_ascii=False)),
    )


@cache
def json_texts() -> st.SearchStrategy[str]:
    """Text that is mostly JSON."""
    names = st.sampled_from(["step", "eval_loss", "a", "b"]) | st.text(max_size=5)
    return st.recursive(
        scalars(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
            st.lists(st.tuples(names, inner), max_size=4).map(object_text),
        ),
        max_leaves=8,
    ) | DEPTHS.map(deep)


def object_text(fields: list[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields) + "}"


@st.composite
def edited_objects(draw: st.DrawFn, content: dict[str, Any]) -> str:
    """The text of `content` with none to three fields replaced, dropped, added or given twice."""
    fields = [(name, json.dumps(value)) for name, value in content.items()]
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(0, len(fields) - 1)))
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "twice"]))
        name = fields[place][0] if fields else "a"
        if how in ("replace", "drop") and fields:
            del fields[place]
        if how != "drop":
            fields.insert(place, ("extra" if how == "add" else name, draw(json_texts())))
    return object_text(fields)


@st.composite
def damaged(draw: st.DrawFn, texts: st.SearchStrategy[str | bytes]) -> bytes:
    """The bytes of a text: as they are, cut, with bytes changed, put in or in front, or in another encoding."""
    text = draw(texts)
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    place = draw(st.integers(0, len(content)))
    how = draw(st.sampled_from(["as it is", "as it is", "as it is", "cut", "change", "insert", "mark", "encode"]))
    if how == "cut":
        return content[:place]
    if how == "change":
        return content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + 4 :]
    if how == "insert":
        odd = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b'"', b"{", b"]", b"\r", b"\x80\x04"]
        return content[:place] + draw(st.sampled_from(odd)) + content[place:]
    if how == "mark":
        return b"\xef\xbb\xbf" + content
    if how == "encode" and isinstance(text, str):
        return text.encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-16-le"])), "surrogatepass")
    return content


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


class Law:
    """
    Either `read` gives something that passes `check`, or its error names the file, can be printed and is no book. It
    writes nothing into `folder`. Counts what came of the cases.
    """

    def __init__(self, folder: Path, read: Callable[[], Any], check: Callable[[Any], None], name: str) -> None:
        self.folder, self.read, self.check, self.name = folder, read, check, name
        self.parsed = self.refused = 0

    def holds(self) -> None:
        before, begin, message = listing(self.folder), time.process_time(), None
        try:
            value = self.read()
        except (ValueError, OSError) as error:
            message = str(error)
        # Looked at outside `except`: a failed assertion would carry the message itself, which may not be printable.
        if message is None:
            self.check(value)
            self.parsed += 1
        else:
            assert self.name in message
            assert not re.search("[\ud800-\udfff]", message), ascii(message)
            assert len(message.encode("utf-8")) < 10_000
            self.refused += 1
        assert time.process_time() - begin < 5  # of this process: others may be busy
        assert listing(self.folder) == before


def fuzz(cases: st.SearchStrategy[Any], case: Callable[[Any], None], count: int) -> None:
    """Run `count` cases, the same ones each time."""
    run = settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(given(cases)(case))
    run()


def fuzz_file(path: Path, contents: st.SearchStrategy[bytes], law: Law, count: int) -> None:
    """Write each of `count` contents to `path` and see that the law holds; some are to be read, others refused."""

    def case(content: bytes) -> None:
        path.write_bytes(expanded(content))
        law.holds()

    fuzz(contents, case, count)
    assert law.parsed + law.refused >= count
    assert min(law.parsed, law.refused) >= count // 50, (law.parsed, law.refused)
