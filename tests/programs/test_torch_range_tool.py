"""tools/test_torch_range.py: which versions, which packages, what is said of tests that fail or cannot be run."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_torch_range as tool

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_versions_are_those_of_the_stated_range():
    oldest, beyond = tool.stated_range(PYPROJECT)
    assert tool.versions_of(PYPROJECT) == {
        oldest: f"torch=={oldest}.*", "2.11": "torch==2.11.*", "newest": f"torch>={oldest},<{beyond}"
    }  # fmt: skip
    with pytest.raises(ValueError, match="no dependency of the form"):
        tool.stated_range('dependencies = ["torch"]')


def test_continuous_integration_has_all_of_them():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert all(f"torch: {name} }}" in workflow for name in ("oldest", f'"{tool.MIDDLE}"')) and "[newest]" in workflow
    table = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert f"the oldest and the newest PyTorch of the range in `pyproject.toml`, and with {tool.MIDDLE} |" in table


def test_packages_beside_torch_are_those_of_the_package_and_its_tests():
    names = [name.partition(">")[0] for name in tool.requirements_of(PYPROJECT)]
    assert {"safetensors", "numpy", "jinja2", "llguidance", "gguf", "pytest-xdist", "hypothesis", "transformers"} <= {
        *names
    }
    assert {"starlette", "uvicorn", "openai", "setuptools"} <= {*names}
    assert not {"torch", "triton", "ruff", "mypy", "ray[data]"} & {*names}


def test_an_environment_gets_torch_from_the_index_and_keeps_it(tmp_path, monkeypatch):
    commands = []

    def run(command, **keywords):
        commands.append(command)
        return subprocess.CompletedProcess(command, int("llguidance" in command[-2]), "", "no such package")

    monkeypatch.setattr(tool.subprocess, "run", run)
    monkeypatch.setattr(tool, "describe", lambda python: "2.11.0+cpu")
    python = tool.install(tmp_path / "2.11", "torch==2.11.*", ["numpy>=1.26", "llguidance>=1.8"], "https://index")
    assert python == tmp_path / "2.11" / "bin" / "python"
    assert commands[0][1:] == ["-m", "venv", str(tmp_path / "2.11")]
    assert commands[1][-3:] == ["--index-url", "https://index", "torch==2.11.*"]
    assert [command[-2:] for command in commands[2:]] == [
        [name, "torch==2.11.0"] for name in ("numpy>=1.26", "llguidance>=1.8")
    ]
    monkeypatch.setattr(tool.subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 1, "", "x\nno torch\n"))
    with pytest.raises(RuntimeError, match="no torch"):
        tool.install(tmp_path / "2.9", "torch==2.9.*", [], None)


def test_tests_that_pass_fail_or_cannot_be_run_are_told_apart(tmp_path, monkeypatch, capsys):
    def run_limited(command, log, seconds, environment):
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        outcome = "FAILED" if log.stem == "bad" else "PASSED"
        log.write_text(f"a.py::one {outcome} [100%]\n==== 1 {outcome.lower()} in 0.10s ====\n")
        return int(outcome == "FAILED")

    monkeypatch.setattr(tool, "run_limited", run_limited)
    monkeypatch.setattr(tool, "describe", lambda python: "" if "gone" in str(python) else "2.13.0")
    environments = [f"--environment={name}={name}-python" for name in ("good", "bad", "gone")]
    command = ["--folder", str(tmp_path), *environments, "--versions"]
    assert tool.main([*command, "good"]) == 0
    assert "ok     torch good     2.13.0           1 passed in 0.10s" in capsys.readouterr().out
    assert tool.main([*command, "good,bad,gone"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "FAILED", "a.py::one", "FAILED"]
    assert lines[1].endswith("1 failed in 0.10s") and lines[3].endswith("gone-python does not import torch")


def test_tests_can_be_interrupted_although_the_tool_was_started_in_the_background(tmp_path, monkeypatch):
    """A shell starts jobs in the background with SIGINT ignored, and children would inherit this."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(tool, "describe", lambda python: "")
        tool.main(["--folder", str(tmp_path), "--versions", "2.9", "--environment", "2.9=python"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_cannot_be_installed_is_said_and_the_others_run(tmp_path, monkeypatch, capsys):
    def install(*arguments):
        raise RuntimeError("no matching distribution")

    monkeypatch.setattr(tool, "install", install)
    monkeypatch.setattr(tool, "test", lambda name, *others: tool.Outcome(name, "2.13.0", status=0, summary="ok"))
    command = ["--folder", str(tmp_path), "--versions", "2.9,mine", f"--environment=mine={sys.executable}"]
    assert tool.main(command) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "FAILED torch 2.9" in first and "not installed: no matching distribution" in first
    assert second.startswith("ok     torch mine")


def test_this_environment_describes_itself():
    import torch

    assert tool.describe(Path(sys.executable)) == torch.__version__
    assert tool.describe(Path("no-such-python")) == ""
