"""The part `tests`: pytest on the files that concern CUDA, its output kept as it comes."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from gpu_check.processes import CAUSE, environment_with_caches, last_line, run_limited
from gpu_check.results import Results
from gpu_check.runner import PartRun

# Name -> arguments of pytest and the share of the time left that they may take, the most telling first. Each is a
# process of its own, since a device may keep an error until its process ends.
KERNELS = (
    *("fused_step", "decode_step", "fused_sampler", "chunk_attention", "split_attention"),
    *("packed_matvec", "packed_experts", "fp8_blocks"),
)
RUNS = {
    "steps": (["tests/gpu/test_steps.py", "tests/gpu/test_tokens.py"], 0.5),
    "kernels": (["-m", "triton", *(f"tests/cuda_static/test_{name}.py" for name in KERNELS)], 0.5),
    "others": ([f"tests/gpu/test_{name}.py" for name in ("prefill", "quantized", "adapters_on_gpu", "nccl")], 1.0),
}
SPARE_S = 10.0  # of the part, for ending processes and writing
HANGING_S = 160  # after which pytest writes where a test hangs
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", re.MULTILINE)
IN_PARALLEL = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL) (.+?) *$", re.MULTILINE)
CAUSES = re.compile(rf"^{CAUSE}(\S+::.+?): (.*)$", re.MULTILINE)
SUMMARY = re.compile(r"^=*\s*((?:\d+ [a-z]+,? ?)+in [\d.]+s.*?)=*$", re.MULTILINE)
# A file that could not be imported, and the last line of why.
COLLECTION = re.compile(r"^_+ ERROR collecting (\S+) _+\n(?:.*\n)*?E   (.*)$", re.MULTILINE)
ENOUGH = (0, 5)  # exit statuses of pytest: all passed, or no test was selected


def run_tests(run: PartRun, only: str = "", arguments: tuple[str, ...] = ()) -> None:
    """Run pytest once for each entry of RUNS and keep the outcomes; saves the part's record after each.

    only: part of the names of the runs wanted. arguments: more for pytest.
    """
    run.work.mkdir(parents=True, exist_ok=True)
    names = [name for name in RUNS if only in name]
    for name in names:
        selection, share = RUNS[name]
        run.outcomes[name] = _run(run, name, [*selection, *arguments], 1.0 if name == names[-1] else share)
        run.save()


def _run(run: PartRun, name: str, selection: list[str], share: float) -> Results:
    if importlib.util.find_spec("pytest") is None:
        return Results(left_out=["pytest is not installed"])
    log, seconds = run.work / f"{name}.log", share * (run.clock.left() - SPARE_S)
    print(f"{run.part}: {name}, at most {seconds:.0f} s", flush=True)
    flags = ["-v", "-rs", "--durations=15", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    flags += ["-p", "gpu_check.at_once"]
    # One process, since there is one GPU, and a line per test.
    flags += ["-p", "no:xdist", "-o", "addopts=--strict-markers", "-o", f"faulthandler_timeout={HANGING_S}"]
    command = [sys.executable, "-m", "pytest", *flags, *selection]
    started = run.clock.spent()
    status = run_limited(command, log, seconds, environment_with_caches(run.caches))
    notes = read_log(log) | {"exit_status": status, "seconds": run.clock.spent() - started}
    outcome = Results(notes=notes)
    outcome.left_out += [f"{file}: {reason}" for file, reason in notes["not_collected"].items()]
    has_failed = notes["failed"] > 0 or not notes["not_collected"]
    if status is None:
        outcome.errors.append(f"not done after {seconds:.0f} s; last begun: {notes['last']}; see {log.name}")
    elif status not in ENOUGH and has_failed:
        outcome.errors.append(f"exit status {status}: {notes['summary'] or last_line(log)}; see {log.name}")
    return outcome


def read_log(log: Path) -> dict[str, Any]:
    """Return the results in the output of `pytest -v`, whole or cut off, of one process or several (pytest-xdist).

    Returns: counts of `passed`, `failed` (errors included) and `skipped` tests, names of the `failures`, their
    `causes`, files `not_collected` because a package is missing, and why; pytest's own `summary` line ("" if it did not
    come to that); the `last` test that was begun.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    outcomes = dict(OUTCOME.findall(text)) | {test: outcome for outcome, test in IN_PARALLEL.findall(text)}
    counted = list(outcomes.values())
    begun = re.findall(r"^(\S+\.py::\S+)", text, re.MULTILINE)
    missing = {file: reason for file, reason in COLLECTION.findall(text) if "ModuleNotFoundError" in reason}
    summaries = SUMMARY.findall(text)
    return {
        "passed": counted.count("PASSED"),
        "failed": counted.count("FAILED") + counted.count("ERROR"),
        "skipped": counted.count("SKIPPED"),
        "failures": [test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")],
        "causes": dict(CAUSES.findall(text)),
        "summary": summaries[-1].strip() if summaries else "",
        "not_collected": missing,
        "last": begun[-1] if begun else "",
    }
