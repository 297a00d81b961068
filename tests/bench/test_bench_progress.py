"""The progress bar, runs with a time limit, and runs that are ended."""

import io
import random
import signal
from dataclasses import replace

import pytest
from bench_fakes import FakeClock, new_record

from qwen3fast.bench.harness import Group, Harness, Task, interruptible
from qwen3fast.bench.progress import LINE_EVERY_S, Progress, in_words
from qwen3fast.bench.record import Case


class Terminal(io.StringIO):
    def isatty(self):
        return True


def groups_of(clock, log, seconds, warms_up=False, slowness=1.0):
    """A group per entry of `seconds`, with tasks A and B that take so long together."""

    def task(number, name, expected):
        def run():
            log.append(f"{name}{number}")
            clock.wait(expected * slowness)
            return {"seconds": expected}

        return Task(Case({"work": name, "number": number}), run, warms_up, expected)

    return [Group(f"group {i}", [task(i, name, s / 2) for name in "AB"]) for i, s in enumerate(seconds)]


def test_progress_shows_share_time_left_and_what_is_measured():
    clock, stream = FakeClock(), Terminal()
    progress = Progress(True, stream, clock)
    progress.expect(400)
    clock.wait(50)
    progress.show("512 tokens: \x1b[1mcached", 100)
    assert stream.getvalue() == f"\r[{'#' * 6:<24}]  25%, 2 min left  512 tokens: \\x1b[1mcached\x1b[K"
    progress.close()
    assert stream.getvalue().endswith("\n")


def test_progress_writes_lines_now_and_then_where_there_is_no_terminal():
    clock, stream = FakeClock(), io.StringIO()
    progress = Progress(True, stream, clock)
    progress.expect(10)
    for i in range(4):
        progress.show(f"step {i}", 1)
        clock.wait(LINE_EVERY_S / 2)
    progress.close()
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["0", "2"]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_progress_never_shows_more_than_the_time_until_its_end():
    clock = FakeClock()
    progress = Progress(False, clock=clock)
    progress.expect(100)
    progress.end = 60.0
    clock.wait(50)
    progress.show("slow", 1)
    assert progress.left_s() == 10.0
    clock.wait(20)
    assert progress.left_s() == 0.0


def test_progress_that_is_not_shown_writes_nothing(capsys):
    progress = Progress(False)
    progress.show("a", 1)
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (700, "12 min"), (7500, "2 h 5 min")]
)
def test_lengths_of_time_have_words(seconds, text):
    assert in_words(seconds) == text


def test_run_counts_all_groups_in_one_bar():
    clock, log = FakeClock(), []
    harness = Harness(new_record(), clock=clock, is_shown=False)
    harness.run(groups_of(clock, log, [2.0, 4.0], warms_up=True), 3)
    assert harness.progress.done == pytest.approx(harness.progress.total) == pytest.approx(6 * 4)
    assert "".join(log) == "A0A0B0B0" + "A0B0" * 3 + "A1A1B1B1" + "A1B1" * 3


def test_run_until_goes_through_all_groups_first_and_then_again():
    clock, log = FakeClock(), []
    harness = Harness(new_record(), clock=clock, is_shown=False)
    left = harness.run_until(groups_of(clock, log, [2.0, 4.0]), 2, end=100.0)
    assert left == [] and "".join(log) == "A0B0A1B1A0B0A1B1"


@pytest.mark.parametrize("slowness", [0.5, 1.0, 3.0])
def test_run_until_leaves_out_what_does_not_fit(slowness):
    clock, log, record = FakeClock(), [], new_record()
    harness = Harness(record, clock=clock, is_shown=False)
    groups = groups_of(clock, log, [2.0, 4.0, 40.0, 400.0], slowness=slowness)
    left = harness.run_until(groups, 3, end=60.0 * slowness)
    assert [group.description for group in left] == ["group 3"]
    assert clock.now <= 60.0 * slowness
    counts = {case.labels["number"]: len(case.samples["seconds"]) for case in record.cases}
    assert counts == {0: 3, 1: 3, 2: 1}  # further rounds of what is cheap


def test_a_slow_warm_up_does_not_make_later_groups_seem_slow():
    """It captures graphs, once."""
    clock, log, record = FakeClock(), [], new_record()
    groups = groups_of(clock, log, [2.0, 4.0, 8.0])
    first = groups[0].tasks[0]

    def run():
        clock.wait(0.0 if log else 40.0)
        return first.run()

    groups[0] = replace(groups[0], tasks=[replace(first, run=run, warms_up=True), groups[0].tasks[1]])
    assert Harness(record, clock=clock, is_shown=False).run_until(groups, 1, end=80.0) == []


def test_run_until_measures_the_first_group_even_if_it_takes_too_long():
    clock, log, record = FakeClock(), [], new_record()
    left = Harness(record, clock=clock, is_shown=False).run_until(groups_of(clock, log, [9.0, 10.0]), 3, end=1.0)
    assert log == ["A0", "B0"] and len(left) == 1 and len(record.cases) == 2


def test_run_until_never_shows_more_time_than_is_left():
    clock, log, shown = FakeClock(), [], []
    harness = Harness(new_record(), clock=clock, is_shown=False)
    harness.progress.show = lambda text, work=0.0: shown.append(harness.progress.left_s() + clock.now)
    harness.run_until(groups_of(clock, log, [2.0, 20.0, 20.0]), 9, end=70.0)
    assert shown and max(shown) <= 70.0 + 1e-9


def test_rounds_are_shuffled_by_the_given_random_numbers():
    orders = []
    for _ in range(2):
        clock, log = FakeClock(), []
        tasks = [task for group in groups_of(clock, log, [2.0] * 4) for task in group.tasks]
        Harness(new_record(), clock=clock, is_shown=False, rng=random.Random(0)).measure(tasks, 3)
        orders.append(log)
    assert orders[0] == orders[1]
    rounds = [orders[0][i : i + 8] for i in (0, 8, 16)]
    assert all(sorted(order) == sorted(rounds[0]) for order in rounds) and rounds[0] != rounds[1] != rounds[2]


def test_a_task_with_nothing_to_measure_gets_no_sample():
    record, harness_answers = new_record(), iter([{"seconds": 1.0}, None, None])
    task = Task(Case({"work": "A"}), lambda: next(harness_answers), warms_up=False)
    Harness(record, [lambda: {"bandwidth_gb_s": 20.0}], FakeClock(), is_shown=False).measure([task], 3)
    assert task.case.samples == {"seconds": [1.0], "bandwidth_gb_s": [20.0]}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruptible_ends_its_block_and_notes_it(number):
    record, before = new_record(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with interruptible(record):
        signal.raise_signal(number)
        pytest.fail("the block went on")
    assert record.interrupted
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_interruptible_lets_other_errors_pass():
    with pytest.raises(KeyError), interruptible(new_record()):
        raise KeyError
