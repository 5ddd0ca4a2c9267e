"""`versions.py`: what it asks pip for, and what it does with the answer; no pip is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import versions


SETUP = """
[options]
install_requires =
    torch>=2.6
    # why this one
    safetensors>=0.5  # and this one

[options.extras_require]
recipes =
    matplotlib>=3.8
trl =
    lora_ga_trainer[recipes]
    trl>=1.16
engines =
    optimum-quanto>=0.2.7
    deepspeed>=0.19.8; platform_system == "Linux"
test =
    lora_ga_trainer[trl]
    lora_ga_trainer[engines]
    lora_ga_trainer[recipes]
    pytest>=8.0
    hypothesis>=6.100
"""


def test_oldest_pins_every_lower_end_and_newest_asks_for_names_alone():
    install_requires, _ = versions.read_requirements(SETUP)
    assert versions.core_requirements("oldest", install_requires, None) == ["torch==2.6", "safetensors==0.5"]
    assert versions.core_requirements("newest", install_requires, None) == ["torch", "safetensors"]


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_torch_can_be_chosen_at_either_end(end):
    install_requires, _ = versions.read_requirements(SETUP)
    chosen = versions.core_requirements(end, install_requires, "2.13.0")
    assert chosen[0] == "torch==2.13.0"
    assert chosen[1] == versions.core_requirements(end, install_requires, None)[1]


@pytest.mark.parametrize("requirement", ["torch", "torch>2.6", "torch>=2.6,<3", "torch>=2.6; os_name == 'nt'"])
def test_a_requirement_without_a_plain_lower_end_is_refused(requirement):
    with pytest.raises(ValueError, match="oldest needs the form name>=version"):
        versions.lowest(requirement)


def test_tests_need_the_recipes_and_pytest_and_can_do_without_the_rest():
    _, extras = versions.read_requirements(SETUP)
    needed, optional = versions.split_requirements(extras)
    assert needed == ["matplotlib>=3.8", "pytest>=8.0", "hypothesis>=6.100"]
    assert optional == ["trl>=1.16", "optimum-quanto>=0.2.7", 'deepspeed>=0.19.8; platform_system == "Linux"']
    assert [versions.name_of(line) for line in optional] == ["trl", "optimum-quanto", "deepspeed"]


def test_the_lower_ends_of_this_package_can_be_read():
    install_requires, extras = versions.read_requirements((versions.ROOT / "setup.cfg").read_text(encoding="utf-8"))
    pins = dict(line.split("==") for line in versions.core_requirements("oldest", install_requires, None))
    assert {"torch", "transformers", "peft", "accelerate"} <= set(pins)
    needed, optional = versions.split_requirements(extras)
    assert {"pytest", "hypothesis", "matplotlib"} <= {versions.name_of(line) for line in needed}
    assert {"trl", "bitsandbytes", "deepspeed"} <= {versions.name_of(line) for line in optional}


def test_what_stands_after_two_dashes_goes_to_pytest():
    args, rest = versions.parse_arguments(["oldest", "--folder", "x", "--torch", "2.7", "--", "-k", "--torch"])
    assert (args.end, args.folder, args.torch, rest) == ("oldest", Path("x"), "2.7", ["-k", "--torch"])
    args, rest = versions.parse_arguments(["newest"])
    assert (args.folder, args.torch, rest) == (versions.ROOT / "outputs" / "versions_newest", None, [])


def test_an_unknown_end_is_refused(capsys):
    with pytest.raises(SystemExit):
        versions.parse_arguments(["middle"])
    assert "invalid choice: 'middle'" in capsys.readouterr().err


def test_a_folder_with_other_files_is_not_emptied(tmp_path: Path):
    kept = tmp_path / "thesis.tex"
    kept.write_text("text")
    with pytest.raises(FileExistsError, match="name another --folder"):
        versions.Environment(tmp_path)
    assert kept.read_text() == "text"


class FakeEnvironment(versions.Environment):
    """Answers in place of pip and of the new Python; notes what it was asked."""

    def __init__(self, **answers: tuple[int, str]):
        self.answers = answers
        self.asked: list[tuple[str, ...]] = []

    def run(self, *words: str) -> versions.subprocess.CompletedProcess[str]:
        self.asked.append(words)
        step = words[2] if words[1] == "pip" else "load"
        status, text = self.answers.get(step, (0, ""))
        return versions.subprocess.CompletedProcess(words, status, "", text)


def test_an_optional_library_moves_no_pinned_version():
    environment = FakeEnvironment()
    assert environment.add_optional("optimum-quanto>=0.2.7", ["torch==2.6.0", "peft==0.19.0"]) is None
    assert {"optimum-quanto>=0.2.7", "torch==2.6.0", "peft==0.19.0"} <= set(environment.asked[0])
    assert environment.asked[1][-1] == "import optimum.quanto"


def test_an_optional_library_that_pip_refuses_is_left_out_with_pips_reason():
    told = "INFO: looking\nERROR: trl and datasets have conflicting dependencies.\nTo fix this you could try to:\n"
    environment = FakeEnvironment(install=(1, told))
    assert environment.add_optional("trl>=1.16", []) == "ERROR: trl and datasets have conflicting dependencies."
    assert len(environment.asked) == 1


def test_an_optional_library_that_cannot_be_imported_is_removed_with_the_reason():
    environment = FakeEnvironment(load=(1, "Traceback\n  ...\nImportError: cannot import name 'x' from 'torch'\n"))
    why = environment.add_optional("torchao>=0.18.0", [])
    assert why == "ImportError: cannot import name 'x' from 'torch'"
    assert environment.asked[-1] == ("-m", "pip", "uninstall", "--yes", "torchao")


def test_the_exit_status_and_the_summary_are_pytests_own(monkeypatch, capsys):
    monkeypatch.setenv("CI", "1")
    environment = FakeEnvironment()
    environment.python = versions.sys.executable
    chosen = ["-p", "no:cacheprovider", "tests/test_optional.py", "-k", "installed_module_is_returned"]
    assert versions.run_tests(environment, chosen) == (0, versions.last_line(capsys.readouterr().out).strip("= "))
    status, summary = versions.run_tests(environment, [*chosen, "--co", "-k", "no_test_of_this_name"])
    assert status == 5
    assert "deselected" in summary
