"""`batch --ray`: a worker answers as the server does; with Ray, a killed worker's jobs are done again."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
from serving import tiny_generator  # noqa: F401  fixtures

from qwen3fast import SamplingParams
from qwen3fast.cli import main
from qwen3fast.server.batch import OPTIONS, add_arguments
from qwen3fast.server.jobs import read_jobs
from qwen3fast.server.ray_batch import Worker

WORKERS = ["--ray", "--workers", "2", "--max-batch-size", "2", "--max-seq-len", "256", "--no-warmup"]


def arguments(source, target) -> argparse.Namespace:
    """Return the parsed options of a batch."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(source), "-o", str(target), *WORKERS])


def test_a_worker_answers_as_the_generator_does(tmp_path, tiny_generator):  # noqa: F811
    rows = [{"prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}, {"prompt": "a", "n": 0}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    worker = Worker(arguments(source, tmp_path / "out.jsonl"), OPTIONS)
    lines = worker({"json": [json.dumps(vars(job)) for job in read_jobs(source)]})["json"]
    first, second = map(json.loads, lines)
    alone = tiny_generator.generate(rows[0]["prompt"], SamplingParams(temperature=0, max_tokens=4))
    assert first["text"] == alone.text
    assert (second["key"], second["error"]["param"]) == ("2", "n")


def test_without_ray_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *WORKERS]) == 1
    assert "pip install 'qwen3fast[ray]'" in capsys.readouterr().err


def test_a_killed_workers_jobs_are_done_again(tmp_path):
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    row = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
    source.write_text("".join(f"{json.dumps({'prompt': f'What is {i} + 3?', **row})}\n" for i in range(80)))
    command = [sys.executable, "-m", "qwen3fast", "batch", str(source), "-o", str(target), *WORKERS]
    environment = {**os.environ, "RAY_DATA_ENABLE_PROGRESS_BARS": "0"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    victim = None
    while victim is None:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
        if target.exists() and target.stat().st_size:
            below = psutil.Process(process.pid).children(recursive=True)
            victim = next(p for p in below if "MapWorker" in " ".join(p.cmdline()) or "MapBatches" in p.cmdline()[0])
    victim.kill()
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    keys = [int(json.loads(line)["key"]) for line in target.read_text("utf-8").splitlines()]
    assert sorted(keys) == list(range(1, 81))
