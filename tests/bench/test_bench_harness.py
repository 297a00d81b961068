"""The harness on fake work: order, warm-up, what an interrupted run keeps, and what it says of noise."""

import os

import pytest
from bench_fakes import FakeClock, FakeWork, make_case, make_record, new_record

from qwen3fast.bench import noise as noise_module
from qwen3fast.bench.harness import MAX_WARM_UPS, Harness, Task
from qwen3fast.bench.metrics import per_repetition
from qwen3fast.bench.noise import noise_of
from qwen3fast.bench.record import Case
from qwen3fast.bench.statistics import ratio

ROUNDS = 5


def task_of(durations, log=None, name="A", **options):
    """A task whose runs take these seconds, one after the other; the last again and again."""
    left = list(durations)

    def run():
        if log is not None:
            log.append(name)
        return {"seconds": left.pop(0) if len(left) > 1 else left[0]}

    return Task(Case({"work": name}), run, **options)


def quiet_harness(record=None, probes=(), clock=None):
    return Harness(record or new_record(), probes, clock or FakeClock(), is_shown=False)


def speeds(record):
    """The tokens per second of each repetition, per case."""
    return [per_repetition(c.labels, c.facts, c.samples)["decode_tok_s"] for c in record.cases]


def test_harness_is_exact_on_a_fake_clock():
    clock, log, record = FakeClock(), [], new_record()
    # A's first run takes four times as long and its second twice; in a later round something else takes the processor.
    a, b = FakeWork("A", 0.005, clock, log, {0: 4.0, 1: 2.0, 6: 10.0}), FakeWork("B", 0.010, clock, log)
    # A round probes four times: from the third round on, the memory is half as fast.
    gb_s = iter([20.0] * 8 + [10.0] * 100)
    harness = quiet_harness(record, [lambda: {"bandwidth_gb_s": next(gb_s)}], clock)
    harness.measure([a.task(), b.task()], ROUNDS)
    harness.finish()
    assert "".join(log) == "AAAA" + "BB" + "AB" * ROUNDS
    assert [case.metrics["step_ms"].median for case in record.cases] == pytest.approx([5.0, 10.0])
    assert record.cases[0].metrics["step_p99_ms"].median == pytest.approx(50.0)
    over = ratio(*speeds(record))
    assert over.median == pytest.approx(2.0) and over.low - 1e-9 <= 2.0 <= over.high + 1e-9
    assert any("bandwidth moved between 10 and 20 GB/s" in reason for reason in record.noise)


def test_harness_takes_turns_after_warming_up():
    log = []
    quiet_harness().measure([task_of([1.0], log, name) for name in "ABC"], 2)
    assert "".join(log) == "AABBCC" + "ABC" * 2


def test_harness_keeps_what_was_measured_only():
    task = task_of([9.0, 1.0, 1.0, 2.0])
    quiet_harness().measure([task], 2)
    assert task.case.samples == {"seconds": [2.0, 2.0]}


def test_harness_skips_the_warm_up_of_a_task_that_needs_none():
    log = []
    quiet_harness().measure([task_of([1.0], log, warms_up=False)], 3)
    assert log == ["A"] * 3


@pytest.mark.parametrize(
    ("durations", "runs"),
    [([1.0], 2), ([2.0, 1.0], 3), ([1.0, 1.04], 2), ([1.0, 1.06], 3), ([8.0, 4.0, 2.0, 1.0], MAX_WARM_UPS)],
)
def test_warm_up_stops_when_two_runs_agree(durations, runs):
    assert quiet_harness().warm_up(task_of(durations)) == runs


def test_warm_up_stops_when_it_takes_too_long():
    clock = FakeClock()
    slow = FakeWork("A", 1.0, clock, slow_runs={0: 3.0, 1: 2.0})
    assert quiet_harness(clock=clock).warm_up(slow.task()) == 1  # 20 steps of 3 s


def test_warm_up_looks_at_the_median_step():
    runs = [{"step_s": [1.0, 1.0, 50.0], "seconds": 52.0}, {"step_s": [1.0, 1.0, 1.0], "seconds": 3.0}]
    assert quiet_harness().warm_up(Task(Case({}), lambda: runs.pop(0))) == 2


def test_harness_probes_before_and_after_each_run():
    record, readings = new_record(), iter([10.0, 20.0, 30.0, 50.0])
    task = task_of([1.0], warms_up=False)
    quiet_harness(record, [lambda: {"bandwidth_gb_s": next(readings)}]).measure([task], 2)
    assert task.case.samples["bandwidth_gb_s"] == [15.0, 40.0]
    assert record.conditions == {"bandwidth_gb_s": [10.0, 20.0, 30.0, 50.0]}


def test_harness_keeps_ratios_where_the_machine_slows_down():
    # The machine halves its speed after each round: absolute figures mean nothing, the ratio is exact.
    clock, works, log = FakeClock(), [], []
    for name, step_s in (("A", 0.01), ("B", 0.02)):
        slow = {run: 2.0 ** (run - 2) for run in range(2, 2 + ROUNDS)}
        works.append(FakeWork(name, step_s, clock, log, slow).task())
    record = new_record()
    quiet_harness(record, clock=clock).measure(works, ROUNDS)
    a, b = speeds(record)
    assert max(a) > 10 * min(a)
    assert [x / y for x, y in zip(a, b, strict=True)] == pytest.approx([2.0] * ROUNDS)


def test_harness_interrupted_keeps_what_it_has():
    record, calls = new_record(), []

    def run():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    tasks = [Task(Case({"work": name}), run, warms_up=False) for name in "AB"]
    with pytest.raises(KeyboardInterrupt):
        quiet_harness(record).measure(tasks, 5)
    assert [case.samples for case in record.cases] == [{"seconds": [1.0]}, {"seconds": [1.0]}]


def test_harness_measures_a_case_again_without_listing_it_twice():
    record, task = new_record(), task_of([1.0], warms_up=False)
    for _ in range(2):
        quiet_harness(record).measure([task], 1)
    assert [case.samples for case in record.cases] == [{"seconds": [1.0, 1.0]}]


def test_harness_tells_equal_cases_apart_by_identity():
    record = new_record()
    record.cases = [Case({"work": "A"})]
    quiet_harness(record).measure([task_of([1.0], warms_up=False)], 1)
    assert [bool(case.samples) for case in record.cases] == [False, True]


def test_noise_tells_of_memory_that_moved():
    calm = make_record(make_case([10.0] * 3, [20.0, 21.0, 20.0]))
    assert noise_of(calm) == []
    moved = make_record(make_case([10.0] * 3, [20.0, 30.0, 20.0]))
    assert noise_of(moved) == ["the memory's read bandwidth moved between 20 and 28 GB/s during the run"]


def test_noise_of_bandwidth_ignores_single_readings():
    assert noise_of(make_record(make_case([10.0] * 20, [20.0] * 19 + [90.0]))) == []
    assert noise_of(make_record(make_case([10.0] * 20, [20.0] * 19 + [1.0]))) == []


def test_noise_names_the_three_least_known_medians():
    cases = [make_case([10.0, 10.0 + 2 * n, 10.0 + 5 * n], context=n) for n in range(1, 6)]
    [reason] = noise_of(make_record(*cases))
    assert reason.startswith(
        "medians known to no better than 10%: cached-eager, bf16, context 5, batch_size 1: decode tok/s"
    )
    assert reason.count("decode tok/s") == 3 and reason.endswith(" and 2 more")


@pytest.mark.parametrize(("load", "is_told"), [(0.2, False), (3.0, True)])
def test_finish_tells_of_a_busy_machine(monkeypatch, load, is_told):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(noise_module, "_cpu_ticks", lambda: None)
    record = new_record()
    quiet_harness(record).finish()
    assert record.noise == (["other programs were running when it began (load average 3.0)"] if is_told else [])


@pytest.mark.parametrize(
    ("stolen", "noise"), [(10, []), (50, ["5% of the processors' time was taken by other virtual machines"])]
)
def test_finish_tells_of_time_that_was_stolen(monkeypatch, stolen, noise):
    ticks = iter([(5000, 100), (6000, 100 + stolen)])
    monkeypatch.setattr(noise_module, "_load_average", lambda: None)
    monkeypatch.setattr(noise_module, "_cpu_ticks", lambda: next(ticks))
    record = new_record()
    quiet_harness(record).finish()
    assert record.noise == noise


def test_finish_copes_with_a_system_that_does_not_tell(monkeypatch):
    def unknown():
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    monkeypatch.setattr(noise_module, "_cpu_ticks", lambda: None)
    record = new_record()
    quiet_harness(record).finish()
    assert record.noise == []


def test_cpu_ticks_are_those_of_the_first_line(monkeypatch):
    text = "cpu  10 0 5 80 1 0 1 3 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    monkeypatch.setattr(noise_module.Path, "read_text", lambda self: text)
    assert noise_module._cpu_ticks() == (100, 3)  # guests are counted in the first fields already
