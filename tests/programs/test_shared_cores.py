"""benchmarks/shared_cores.py generates beside other programs and says what these took."""

import os
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import pytest
import shared_cores as benchmark
import tables
import torch
from bench_fakes import quick_probes  # noqa: F401  a fixture

from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.record import Case, Record, load_record

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the program needs Linux")


@pytest.mark.usefixtures("quick_probes")
def test_every_format_meets_every_other_program(monkeypatch, small_folder, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "SETTLE_S", 0)
    options = ["--model", str(small_folder), "--formats", "plain,int4", "--rounds", "1", "--new-tokens", "8"]
    options += ["--prompt-tokens", "40", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["shared_cores.py", *options, "--output", str(tmp_path / "record.json")])
    assert benchmark.main() == 0
    record = load_record(tmp_path / "record.json")
    others = ["none", "one, on one core", "one", "one per core"]
    cases = product(("plain", "int4"), ("prefill", "decode"), others)
    assert [tuple(case.labels.values()) for case in record.cases] == list(cases)
    assert {case.labels["what"]: case.facts["tokens"] for case in record.cases} == {"prefill": 40, "decode": 8}
    assert all(len(case.samples["seconds"]) == len(case.samples["taken"]) == 1 for case in record.cases)
    assert [case.samples["taken"] for case in record.cases if case.labels["others"] == "none"] == 4 * [[0]]
    assert "one, on one core" in capsys.readouterr().out


def test_other_programs_stay_on_their_cpus_and_end():
    cpu = min(os.sched_getaffinity(0))
    with benchmark.running([{cpu}]) as (pid,):
        assert os.sched_getaffinity(pid) == {cpu}
        before, deadline = benchmark.processor_seconds(pid), time.monotonic() + 60
        while benchmark.processor_seconds(pid) == before:
            assert time.monotonic() < deadline, "it does not compute"
            time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_speed_lost_is_taken_within_rounds():
    record = Record("shared-cores", describe_run("test"), describe_environment(torch.device("cpu")), {"name": "tiny"})
    nothing = [0, 0]  # as in a run shorter than the clock's ticks
    for others, seconds, taken in (
        ("none", [1.0, 2.0], nothing),
        ("one", [2.0, 4.0], [0.5, 0.25]),
        ("one per core", [2.0, 2.0], nothing),
    ):
        record.cases.append(Case({"format": "plain", "what": "decode", "others": others}, {"tokens": 10}))
        record.cases[-1].samples = {"seconds": seconds, "taken": taken}
    rows = tables.shared_cores_rows(record)
    assert rows[1] == ["plain", "decode", "none", "7.5", "", "", ""]
    assert rows[2] == ["plain", "decode", "one", "3.8", "38%", "50%", "1.50"]
    assert rows[3] == ["plain", "decode", "one per core", "5.0", "0%", "25%", ""]
