"""
Run the fast tests on the oldest libraries that `setup.cfg` allows, or on the newest releases.

    python tests/reliability/versions.py oldest
    python tests/reliability/versions.py newest --folder outputs/newest -- tests/test_factors.py

Makes a virtual environment of this Python in the folder (an environment that is there is made anew) and installs the
package in it: for `oldest` with every lower end of `install_requires` taken as the exact version, for `newest` with
what pip finds newest. Then come the libraries that tests can do without, one at a time. One that pip can't install
beside those versions, or that can't be imported there, is named with the reason and its tests skip. What stands after
`--` goes to pytest.

pip runs as it is configured. On Linux PyPI's PyTorch brings the CUDA libraries, several gigabytes; `--torch VERSION`
takes another release at either end, for example one whose CPU build pip knows.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lora_ga_trainer"
NEEDED = ("pytest", "hypothesis")  # beside the extra `recipes`: modules that tests import without `optional.require`
# Where a library's module is not its name with underscores.
MODULES = {"optimum-quanto": "optimum.quanto", "pytest-xdist": "xdist"}


def read_requirements(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """Read `install_requires` and the extras from the text of a `setup.cfg`, comments left out."""
    parser = configparser.ConfigParser(inline_comment_prefixes=("#",))
    parser.read_string(text)

    def lines(value: str) -> list[str]:
        return [line.strip() for line in value.splitlines() if line.strip()]

    extras = {name: lines(value) for name, value in parser["options.extras_require"].items()}
    return lines(parser["options"]["install_requires"]), extras


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group()


def lowest(requirement: str) -> str:
    """
    Pin a requirement to its lower end: `torch>=2.6` gives `torch==2.6`, which pip reads as 2.6.0.

    Raises:
        ValueError: if the requirement has no lower end, or more than that.
    """
    found = re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement)
    if not found:
        raise ValueError(f"setup.cfg requires {requirement!r}: oldest needs the form name>=version.")
    return f"{found[1]}=={found[2]}"


def core_requirements(end: str, install_requires: list[str], torch: str | None) -> list[str]:
    """Give what pip is asked for: lower ends as exact versions (`oldest`), or names alone (`newest`)."""
    wanted = [lowest(line) if end == "oldest" else name_of(line) for line in install_requires]
    return [f"torch=={torch}" if torch and name_of(line) == "torch" else line for line in wanted]


def flatten(extra: str, extras: dict[str, list[str]]) -> list[str]:
    """List an extra's requirements, those of the extras of this package that it names with them, each once."""
    found: dict[str, None] = {}
    for line in extras[extra]:
        inner = re.fullmatch(rf"{PACKAGE}\[(\w+)\]", line)
        found |= dict.fromkeys(flatten(inner[1], extras) if inner else [line])
    return list(found)


def split_requirements(extras: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Divide the extra `test` into what the fast tests import outright and what they skip without."""
    needed = flatten("recipes", extras)
    every = flatten("test", extras)
    needed += [line for line in every if name_of(line) in NEEDED]
    return needed, [line for line in every if line not in needed]


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def reason(text: str) -> str:
    """Find in pip's output, or in a traceback, the line that says why it failed."""
    errors = [line.strip() for line in text.splitlines() if "conflicting dependencies" in line or "Error: " in line]
    return errors[0] if errors else last_line(text)


class Environment:
    """A virtual environment: `run` calls its Python in the root of the checkout."""

    def __init__(self, folder: Path):
        if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
            raise FileExistsError(f"{folder} has files and is no virtual environment: name another --folder.")
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        venv.create(folder, with_pip=True, clear=True)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.python, *words], cwd=ROOT, capture_output=True, text=True, check=False)

    def install(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "install", "--disable-pip-version-check", *words)

    def versions(self, names: list[str]) -> dict[str, str]:
        code = (
            "import sys; from importlib.metadata import version; [print(name, version(name)) for name in sys.argv[1:]]"
        )
        done = self.run("-c", code, *names)
        done.check_returncode()
        return dict(line.split() for line in done.stdout.splitlines())

    def add_optional(self, requirement: str, pins: list[str]) -> str | None:
        """Install one more library without moving the pinned ones; return why it was left out, None if it was not."""
        done = self.install(requirement, *pins)
        if done.returncode:
            return reason(done.stdout + done.stderr)
        name = name_of(requirement)
        done = self.run("-c", f"import {MODULES.get(name, name.replace('-', '_'))}")
        if done.returncode == 0:
            return None
        self.run("-m", "pip", "uninstall", "--yes", name)
        return last_line(done.stderr)


def run_tests(environment: Environment, arguments: list[str]) -> tuple[int, str]:
    """Run the fast tests, their output as it comes; return pytest's exit status and its last line."""
    settings = {name: value for name, value in os.environ.items() if name != "CI"}  # in CI nothing may skip
    command = [environment.python, "-m", "pytest", "-m", "not slow", *arguments]
    summary = "no output"
    with subprocess.Popen(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            summary = line.strip(" =\n") or summary
    return process.returncode, summary


def parse_arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], usage="%(prog)s {oldest,newest} [options] [-- pytest arguments]"
    )
    parser.add_argument("end", choices=("oldest", "newest"))
    parser.add_argument("--folder", type=Path, help="of the environment (default: outputs/versions_END)")
    parser.add_argument("--torch", help="the version of PyTorch, in place of the end's own")
    parser.add_argument("--bare", action="store_true", help="leave out all libraries that tests can do without")
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    args.folder = args.folder or ROOT / "outputs" / f"versions_{args.end}"
    return args, words[cut + 1 :]


def main(words: list[str]) -> int:
    args, pytest_arguments = parse_arguments(words)
    install_requires, extras = read_requirements((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    needed, optional = split_requirements(extras)
    core = core_requirements(args.end, install_requires, args.torch)
    print(f"{args.end}: installing {' '.join(core)}", flush=True)
    environment = Environment(args.folder.resolve())
    done = environment.install(*core, *needed, "--editable", ".")
    if done.returncode:
        print(done.stdout + done.stderr)
        return done.returncode
    installed = environment.versions([name_of(line) for line in core])
    pins = [f"{name}=={version}" for name, version in installed.items()]
    left_out = dict.fromkeys(optional, "--bare")
    if not args.bare:
        left_out = {line: why for line in optional if (why := environment.add_optional(line, pins))}
    status, summary = run_tests(environment, pytest_arguments)
    print(f"{args.end}: Python {sys.version.split()[0]}, " + ", ".join(f"{n} {v}" for n, v in installed.items()))
    for line, why in left_out.items():
        print(f"left out: {line}: {why}")
    print(f"fast tests {'passed' if status == 0 else 'FAILED'}: {summary}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
