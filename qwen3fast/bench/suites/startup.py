"""Time from the start of a process to its imports, loaded weights, first token and full speed.

The model is written to a folder first. Each run is a process of its own that loads the folder and streams a reply. Warm
runs find the compiled code of earlier ones; cold runs get empty caches and also build the C++ operations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from qwen3fast.bench.harness import Measurement, Task
from qwen3fast.bench.options import split_format
from qwen3fast.bench.progress import in_words
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns
from qwen3fast.checkpoint.save import save_model

COMPILE = {"never": "False", "auto": "'auto'", "always": "True"}
WINDOW = 10  # tokens in a row that must come at full speed
WARM_S, COLD_S = 8.0, 28.0  # how long a reply is watched
PHASES = ("import_s", "load_s", "first_token_s", "full_speed_s")
PROGRAM = """
import json, sys, time
from qwen3fast import Generator, SamplingParams, load_model
marks = [time.time()]
model = load_model(sys.argv[1], device=sys.argv[2])
marks.append(time.time())
with Generator(model, max_seq_len=4096, compile={compile}, **json.loads(sys.argv[3])) as generator:
    times = []
    for chunk in generator.stream(list(range(1, 33)), SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)):
        times.append(time.time())
        if times[-1] - times[0] > {seconds}:
            break
print(json.dumps(marks + times))
"""


def run_once(
    folder: Path, device: str, compile: str, seconds: float, caches: Path | None = None, **options: Any
) -> list[float]:
    """Run one process. Returns: seconds from its start to its imports, to the loaded weights, to each token.

    options: of its Generator.
    Raises: RuntimeError with the end of its log if it fails.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if caches is not None:
        environment |= {"XDG_CACHE_HOME": str(caches), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    program = PROGRAM.format(compile=COMPILE[compile], seconds=seconds)
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), device, json.dumps(options)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"a run with compile={COMPILE[compile]} failed:\n{done.stderr[-3000:]}")
    return [t - started for t in json.loads(done.stdout.splitlines()[-1])]


def full_speed_s(times: list[float], step_s: float) -> float | None:
    """Return the time of the first of WINDOW tokens that took at most 1.2 step_s each; None if there are none."""
    for first, last in zip(times, times[WINDOW:], strict=False):
        if last - first <= 1.2 * WINDOW * step_s:
            return first
    return None


def run(session: Session) -> None:
    """Measure warm runs in turns, cold runs once; full speed is the median step of warm runs that compile first."""
    o = session.options
    runs = len(o.formats) * len(COMPILE)
    seconds = runs * ((1 + o.repetitions) * WARM_S + COLD_S)
    session.tell(f"{2 * runs} cases, about {in_words(1.5 * seconds)}")
    session.harness.progress.expect(seconds)
    for format in o.formats:
        quantization, kv_cache_dtype = split_format(format)
        options: dict[str, Any] = {"kv_cache_dtype": kv_cache_dtype, "threads": o.threads}
        tokens: dict[str, list[list[float]]] = {}
        with tempfile.TemporaryDirectory() as temporary:
            save_model(session.model(quantization), Path(temporary))
            cold, warm = (_tasks(session, Path(temporary), format, kind, tokens, options) for kind in ("cold", "warm"))
            for mode in COMPILE:
                session.harness.progress.show(f"filling the caches, {format}, compile {mode}", WARM_S)
                run_once(Path(temporary), str(session.device), mode, WARM_S, **options)
            session.harness.measure(warm, o.repetitions, f"warm, {format}")
            session.harness.measure(cold, 1, f"cold, {format}")
        step_s = median(b - a for times in tokens["warm always"] for a, b in pairwise(times))
        for task in warm + cold:
            labels = task.case.labels
            reached = [full_speed_s(times, step_s) for times in tokens[f"{labels['caches']} {labels['compile']}"]]
            if all(at is not None for at in reached):
                task.case.samples["full_speed_s"] = reached


def _tasks(
    session: Session,
    folder: Path,
    format: str,
    kind: str,
    tokens: dict[str, list[list[float]]],
    options: dict[str, Any],
) -> list[Task]:
    seconds = COLD_S if kind == "cold" else WARM_S

    def once(mode: str) -> Measurement:
        with tempfile.TemporaryDirectory() as empty:
            caches = Path(empty) if kind == "cold" else None
            imported, loaded, *times = run_once(folder, str(session.device), mode, seconds, caches, **options)
        tokens.setdefault(f"{kind} {mode}", []).append(times)
        return {"import_s": imported, "load_s": loaded, "first_token_s": times[0]}

    def task(mode: str) -> Task:
        labels: dict[str, Any] = {"format": session.label(format), "compile": mode, "caches": kind}
        return Task(Case(labels), lambda: once(mode), False, seconds)

    return [task(mode) for mode in COMPILE]


def summary(record: Record) -> list[str]:
    """Return a sentence per format on the first token and full speed with the default compilation."""
    sentences = []
    for case in record.cases:
        if case.labels["compile"] == "auto" and "first_token_s" in case.metrics:
            full = case.metrics.get("full_speed_s")
            then = f"full speed after {full.median:.1f} s" if full else "full speed not reached during the run"
            sentences.append(
                f"{case.labels['format']}, {case.labels['caches']} caches, compile='auto': the first token after "
                f"{case.metrics['first_token_s'].median:.1f} s, {then}."
            )
    return sentences


SUITE = Suite(
    name="startup",
    title="Starting up",
    run=run,
    columns=Columns(("format", "compile", "caches"), PHASES),
    defaults={"formats": ("plain", "int4"), "repetitions": 3},
    quick={"formats": ("plain",), "repetitions": 1},
    summary=summary,
)
