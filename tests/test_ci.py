"""`.ci/run` runs the README's test command and nothing else, and the workflow runs both of the README's commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).resolve().parents[1]
FRONT_PAGE = """
```bash
echo first >> ran
```

```python
print("not bash")
```

```bash
echo "second, CI=$CI" >> ran
{second}
echo "to its end" >> ran
```

```bash
echo third >> ran
```
"""


def run(folder: Path, front_page: str, *number: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of `.ci/run` beside this README, from another folder, without `CI`."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text(front_page)
    program = ["env", "-u", "CI", "bash", str(folder / ".ci" / "run"), *number]
    return subprocess.run(program, cwd="/", capture_output=True, text=True)


def test_it_runs_the_second_block_of_bash_and_no_other(tmp_path: Path) -> None:
    assert run(tmp_path, FRONT_PAGE.format(second="true")).returncode == 0
    assert (tmp_path / "ran").read_text() == "second, CI=1\nto its end\n"


@pytest.mark.parametrize(("number", "ran"), [("1", "first\n"), ("3", "third\n")])
def test_another_block_runs_by_its_number(number: str, ran: str, tmp_path: Path) -> None:
    assert run(tmp_path, FRONT_PAGE, number).returncode == 0
    assert (tmp_path / "ran").read_text() == ran


@pytest.mark.parametrize("second", ["false", "false | cat", 'echo "$unset"'])
def test_it_stops_at_the_first_line_that_fails(second: str, tmp_path: Path) -> None:
    assert run(tmp_path, FRONT_PAGE.format(second=second)).returncode != 0
    assert (tmp_path / "ran").read_text() == "second, CI=1\n"


def test_a_front_page_without_a_second_block_is_an_error(tmp_path: Path) -> None:
    finished = run(tmp_path, "```bash\necho first >> ran\n```\n")
    assert finished.returncode == 1
    assert "README.md has no block of bash number 2" in finished.stderr
    assert not (tmp_path / "ran").exists()


def test_the_second_block_of_the_readme_installs_this_checkout_and_runs_pytest() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = blocks[1].splitlines()
    assert "pip install -c constraints/cpu.txt -e '.[test]'" in lines
    assert lines[-1].startswith("python -m pytest")


def test_the_constraints_name_one_exact_torch() -> None:
    lines = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    (constraint,) = (line for line in lines if not line.startswith("#"))
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", constraint)


def test_the_workflow_runs_both_commands_on_the_oldest_and_the_newest_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    job = workflow["jobs"]["tests"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run 1", "bash .ci/run"]
    pythons = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.cfg").read_text())
    assert job["strategy"]["matrix"]["python"] == [pythons[0], pythons[-1]]


def test_each_check_before_a_commit_is_a_command_that_exists() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    commands = [hook["entry"].split() for repo in config["repos"] for hook in repo["hooks"]]
    for program, *rest in commands:
        command = [sys.executable, *rest[:2]] if program == "python" else [str(Path(sys.executable).parent / program)]
        finished = subprocess.run([*command, "--help"], capture_output=True, text=True)
        assert finished.returncode == 0, (command, finished.stderr)
