"""Run the tests with the oldest, a middle and the newest PyTorch that pyproject.toml allows, an environment of each.

    python tools/test_torch_range.py --folder ~/torch-range
    python tools/test_torch_range.py --folder ~/torch-range --tests tests/engine tests/test_generator.py
    python tools/test_torch_range.py --folder ~/torch-range --index-url https://download.pytorch.org/whl/cpu
    python tools/test_torch_range.py --folder ~/torch-range --environment 2.11=/opt/torch211/bin/python

Environments are made in the folder, once, and used again. `--index-url` says where torch comes from: PyTorch's own
index has builds for CPUs; PyPI's for Linux on x86-64 bring CUDA's libraries, several GB. GPUs are hidden. Each run's
output is FOLDER/NAME.log; what could not be installed or run is said. Exit status 1 if a run failed.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_check.processes import ROOT, environment_with_caches, last_line, run_limited
from gpu_check.pytest_part import read_log

MIDDLE = "2.11"  # the release that GPUs were first tried with
DESCRIBE = "import torch, sys; print(torch.__version__, sys.version.split()[0])"


@dataclass
class Outcome:
    """The outcome of one version. torch: the installed version. reason: why nothing was run, or ""."""

    name: str
    torch: str = ""
    reason: str = ""
    status: int | None = None
    summary: str = ""
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True if tests ran and none failed."""
        return not self.reason and self.status == 0

    def line(self) -> str:
        """Return the outcome in words."""
        result = self.reason or self.summary or f"exit status {self.status}"
        return f"{'ok    ' if self.passed else 'FAILED'} torch {self.name:8} {self.torch:16} {result}"


def stated_range(text: str) -> tuple[str, str]:
    """Return the oldest release and the first one beyond the range, from pyproject.toml's text: ("2.9", "2.16").

    Raises: ValueError if it states no such range.
    """
    found = re.search(r'"torch>=([\d.]+),<([\d.]+)"', text)
    if found is None:
        raise ValueError('pyproject.toml has no dependency of the form "torch>=A,<B"')
    return found[1], found[2]


def requirements_of(text: str) -> list[str]:
    """Return what the package, its tests and their builds need beside torch, from pyproject.toml's text."""
    extras = r"^(?:dependencies|structured|gguf|server|test) = \[\n(.*?)^\]"
    blocks = re.findall(extras, text, re.MULTILINE | re.DOTALL)
    wanted = [line for block in blocks for line in re.findall(r'^\s*"([^"]+)"', block, re.MULTILINE)]
    wanted += re.findall(r'^requires = \["([^"]+)"\]', text, re.MULTILINE)  # test_wheel.py builds without isolation
    return [name for name in wanted if not name.startswith(("torch", "qwen3fast", "triton"))]


def versions_of(text: str) -> dict[str, str]:
    """Return the requirement to install for each version's name, oldest first."""
    oldest, beyond = stated_range(text)
    names = {oldest: f"torch=={oldest}.*", MIDDLE: f"torch=={MIDDLE}.*", "newest": f"torch>={oldest},<{beyond}"}
    return names


def describe(python: Path) -> str:
    """Return the version of torch that an interpreter imports; "" if it does not."""
    try:
        done = subprocess.run([str(python), "-c", DESCRIBE], capture_output=True, text=True, timeout=300)
    except OSError:
        return ""
    return done.stdout.split()[0] if done.returncode == 0 else ""


def install(folder: Path, requirement: str, others: list[str], index_url: str | None) -> Path:
    """Make an environment with torch from an index, then the rest, which must not change torch.

    Returns: its interpreter. Raises: RuntimeError with pip's last line if torch cannot be installed.
    """
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = ["--index-url", index_url] if index_url else []
    steps = [[sys.executable, "-m", "venv", str(folder)], [*pip, *index, requirement]]
    for command in steps:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"{command[0]}: exit status {done.returncode}")
    pinned = f"torch=={describe(python).partition('+')[0]}"
    for other in others:  # one by one: tests skip what an optional package is missing for
        done = subprocess.run([*pip, other, pinned], capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{folder.name}: without {other}", file=sys.stderr)
    return python


def test(name: str, python: Path, folder: Path, tests: list[str], seconds: float, jobs: int) -> Outcome:
    """Run pytest in an environment."""
    outcome = Outcome(name, describe(python))
    if not outcome.torch:
        outcome.reason = f"{python} does not import torch"
        return outcome
    log = folder / f"{name}.log"
    environment = environment_with_caches(folder / f"caches-{name}") | {"CUDA_VISIBLE_DEVICES": ""}
    options = ["-v", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    parallel = ["-n", str(jobs)] if jobs > 1 else ["-p", "no:xdist"]
    command = [str(python), "-m", "pytest", *options, *parallel, *tests]
    print(f"torch {outcome.torch}: at most {seconds:.0f} s; output in {log}", file=sys.stderr, flush=True)
    outcome.status = run_limited(command, log, seconds, environment)
    found = read_log(log)
    counts = f"{found['passed']} passed, {found['failed']} failed so far; last {found['last']}"
    outcome.summary = found["summary"] or (last_line(log) if outcome.status is not None else f"not done: {counts}")
    outcome.failures = tuple(found["failures"])
    return outcome


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for environments, caches and logs")
    parser.add_argument("--versions", default=None, help="names of versions, comma-separated [oldest, middle, newest]")
    parser.add_argument("--index-url", default=None, help="where pip gets torch from [pip's own setting]")
    parser.add_argument(
        "--environment", action="append", default=[], metavar="VERSION=PYTHON", help="use this one; may be repeated"
    )
    parser.add_argument("--tests", nargs="+", default=["tests"], help="arguments for pytest [%(default)s]")
    parser.add_argument("--minutes", type=float, default=30, help="for the tests with one version [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="processes of pytest [%(default)s]")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Make the environments that are missing and run the tests. Returns the exit status."""
    args = build_parser().parse_args(arguments)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requirements = versions_of(text)
    given = {name: Path(python) for name, _, python in (item.partition("=") for item in args.environment)}
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in args.versions.split(",") if args.versions else requirements:
        python = given.get(name, folder / name / "bin" / "python")
        try:
            if name not in given and not describe(python):
                print(f"torch {name}: installing into {folder / name}", file=sys.stderr, flush=True)
                wanted = requirements.get(name, f"torch=={name}")
                python = install(folder / name, wanted, requirements_of(text), args.index_url)
            outcomes.append(test(name, python, folder, args.tests, 60 * args.minutes, args.jobs))
        except RuntimeError as err:
            outcomes.append(Outcome(name, reason=f"not installed: {err}"))
    for outcome in outcomes:
        print(outcome.line())
        for failure in outcome.failures:
            print(f"         {failure}")
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
