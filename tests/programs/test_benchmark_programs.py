"""The programs in benchmarks/ without their measurements: options, clients, operators."""

import time
from types import SimpleNamespace

import batching
import cpu_operators
import pytest
import torch

from qwen3fast.bench.environment import describe_environment
from qwen3fast.bench.harness import Harness
from qwen3fast.bench.record import Case, Record


def new_record():
    run = {"utc": "2026-01-02T03:04:05Z", "command": "x", "git_commit": None, "git_dirty": None}
    return Record("x", run, describe_environment(torch.device("cpu")), {"name": "x"})


def test_arrivals_come_at_the_rate_and_are_the_same_each_time():
    due = batching.arrivals(2000, 4.0)
    assert due == batching.arrivals(2000, 4.0) and due == sorted(due)
    assert due[-1] / 2000 == pytest.approx(0.25, rel=0.1)


class FakeGenerator:
    """Each reply: its first token after `wait_s`, in a chunk of its own, then two at a time."""

    def __init__(self, wait_s):
        self.wait_s, self.submitted = wait_s, []

    def submit(self, prompt, params):
        self.submitted.append((prompt, params.max_tokens, time.perf_counter()))
        return self._reply(params.max_tokens)

    def _reply(self, count):
        time.sleep(self.wait_s)
        yield SimpleNamespace(token_ids=[1])
        for _ in range(count // 2):
            yield SimpleNamespace(token_ids=[2, 3])


def test_online_requests_come_when_they_are_due_and_clients_time_every_token():
    generator = FakeGenerator(wait_s=0.02)
    work = [([1], 3), ([2], 5), ([3], 1)]
    started = time.perf_counter()
    sample = batching.run_online(generator, work, [0.0, 0.03, 0.05])
    assert [(prompt, new) for prompt, new, _ in generator.submitted] == work
    assert all(at - started >= due for (*_, at), due in zip(generator.submitted, [0.0, 0.03, 0.05], strict=True))
    assert len(sample["ttfts_s"]) == 3 and min(sample["ttfts_s"]) >= 0.02
    assert len(sample["itl_s"]) == 2 + 4 and min(sample["itl_s"]) == 0  # of one chunk
    assert sample["seconds"] >= 0.05 + 0.02


def test_waiting_to_be_submitted_counts_as_latency():
    class Slow(FakeGenerator):
        def submit(self, prompt, params):
            time.sleep(0.03)
            return super().submit(prompt, params)

    sample = batching.run_online(Slow(wait_s=0.0), [([1], 1)] * 3, [0.0, 0.0, 0.0])
    assert sorted(sample["ttfts_s"])[-1] >= 0.09


def test_an_online_run_is_bounded_and_its_load_is_a_share_of_the_throughput():
    args = batching.parse(["--requests", "100", "--max-online-s", "10"])
    work, rate = batching.online_work(args, 50, 0.5, tok_s=100.0)
    whole = batching.make_work(50, 100, args.prompt_tokens, args.new_tokens, seed=1)
    assert rate * sum(n for _, n in whole) / 100 == pytest.approx(50.0)
    assert len(work) == int(10 * rate) and work == whole[: len(work)]
    assert len(batching.online_work(args, 50, 0.5, tok_s=1e6)[0]) == 100
    assert len(batching.online_work(args, 50, 0.5, tok_s=1e-3)[0]) == batching.MIN_REQUESTS


def test_online_runs_are_of_each_batch_size_and_load_with_the_throughput_of_that_batch_size():
    args = batching.parse(["--batch-sizes", "1,4", "--loads", "0.5,1", "--requests", "4"])
    record = new_record()
    for size, seconds in ((1, 8.0), (4, 2.0)):
        case = batching.offline_case(batching.OURS, "bf16", size, [([1], 40), ([2], 40)])
        case.add({"seconds": seconds})
        record.cases.append(case)
    models = {"bf16": SimpleNamespace(config=SimpleNamespace(vocab_size=50))}
    generators = {("bf16", size): None for size in (1, 4)}
    tasks = batching.online_tasks(args, models, generators, record)
    shapes = [(task.case.labels["batch_size"], task.case.labels["load"]) for task in tasks]
    assert shapes == [(1, 0.5), (1, 1.0), (4, 0.5), (4, 1.0)]
    slow, _, fast, _ = (task.case.facts["offered_requests_s"] for task in tasks)
    assert fast == pytest.approx(4 * slow)


def test_an_engine_that_fails_is_missing_with_its_reason_and_asked_no_more():
    record, calls = new_record(), []

    def fail():
        calls.append(None)
        raise RuntimeError("out of pages")

    good = batching.peer_task(record, Case({"engine": "good"}), lambda: 2.0)
    bad = batching.peer_task(record, Case({"engine": "bad"}), fail)
    Harness(record, is_shown=False).measure([bad, good], 2)
    assert (good.case.samples, bad.case.samples, len(calls)) == ({"seconds": [2.0, 2.0]}, {}, 1)
    assert record.notes["missing"] == {"bad": "RuntimeError: out of pages"}


def test_batching_options_are_checked(capsys):
    with pytest.raises(SystemExit):
        batching.parse(["--loads", "0"])
    assert "must be positive" in capsys.readouterr().err


def test_operators_and_the_rest_make_up_the_whole():
    ms = cpu_operators.with_other({"a": 0.001, "b": 0.002, "whole": 0.005})
    assert ms == pytest.approx({"whole": 5.0, "a": 1.0, "b": 2.0, "other": 2.0})
    assert list(ms) == ["whole", "a", "b", "other"]


def test_each_operator_is_a_case_with_a_sample_a_round():
    record, calls = new_record(), []

    def time_once():
        calls.append(None)
        return {"a": 0.001 * len(calls), "whole": 0.01}

    labels = {"phase": "decode", "format": "bf16", "context": 32}
    task = cpu_operators.make_task(record, labels, time_once)
    Harness(record, is_shown=False).measure([task], 2)
    samples = {case.labels["operator"]: case.samples["operator_ms"] for case in record.cases}
    assert samples == {"whole": [10.0, 10.0], "a": [2.0, 3.0], "other": [8.0, 7.0]}  # the first call warms up
