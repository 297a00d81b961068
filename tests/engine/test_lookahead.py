"""The host behind the device: steps launched ahead, tokens read late, nothing shown that should not be."""

import random
from functools import cache

import pytest
import torch
from conftest import engine_of, randomized, small_config

from qwen3fast.engine import RowSampling
from qwen3fast.engine.in_flight import TokenRing
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


MODEL = randomized(small_config(num_hidden_layers=1, max_position_embeddings=1024, eos_token_ids=()), seed=3)


def make_scheduler(lookahead, rows=3):
    return Scheduler(engine_of(MODEL, rows, lookahead=lookahead))


def make_requests(seed=0, count=9):
    """Sampled ones, of many lengths, some of which end with a stop token."""
    rng = random.Random(seed)
    return [
        Request(
            [rng.randrange(97) for _ in range(rng.randint(1, 60))],
            RowSampling(30.0, 64, seed=i),  # these weights are sure of themselves
            max_tokens=rng.choice([1, 2, 5, 20, 50]),
            stop_ids=frozenset(rng.sample(range(97), rng.choice([0, 0, 6]))),
        )
        for i in range(count)
    ]


@cache
def results_without_lookahead(seed):
    return run(make_scheduler(0), make_requests(seed))


def run(scheduler, requests):
    for request in requests:
        scheduler.add(request)
    while any(request.finish_reason is None for request in requests):
        scheduler.step()
    return [(request.output_ids, request.finish_reason) for request in requests]


@pytest.mark.parametrize(("lookahead", "seed"), [(1, 0), (1, 1), (2, 2), (2, 3), (5, 0), (5, 3)])
def test_running_ahead_changes_no_result(lookahead, seed):
    expected = results_without_lookahead(seed)
    scheduler = make_scheduler(lookahead)
    requests = make_requests(seed)
    assert run(scheduler, requests) == expected
    stopped = sum(reason == "stop" for _, reason in expected)
    assert 0 < stopped < len(expected)
    assert scheduler.dropped_tokens <= lookahead * stopped
    assert all(request.launched <= request.max_tokens for request in requests)
    assert scheduler.engine.state.advance_R.tolist() == [0, 0, 0]
    assert run(scheduler, make_requests(seed)) == expected  # nothing of the first run is left over


def test_without_lookahead_nothing_is_dropped():
    scheduler = make_scheduler(0)
    run(scheduler, make_requests())
    assert scheduler.dropped_tokens == 0


def test_a_stop_token_is_noticed_late_and_what_follows_is_dropped():
    scheduler = make_scheduler(3, rows=1)
    [(reply, _)] = run(scheduler, [Request([1, 2, 3], RowSampling(30.0, seed=7), 20)])
    stop = reply[10]
    first = reply.index(stop)
    [(stopped, reason)] = run(scheduler, [Request([1, 2, 3], RowSampling(30.0, seed=7), 20, frozenset([stop]))])
    assert (stopped, reason) == (reply[: first + 1], "stop")
    assert scheduler.dropped_tokens == 3


def test_cancelling_drops_what_is_in_flight():
    scheduler = make_scheduler(4, rows=2)
    cancelled, other = (Request([1, 2], RowSampling(30.0, seed=seed), 60) for seed in (1, 2))
    [(alone, _)] = run(make_scheduler(0), [Request([1, 2], RowSampling(30.0, seed=2), 60)])
    scheduler.add(cancelled)
    scheduler.add(other)
    for _ in range(10):
        scheduler.step()
    seen = len(cancelled.output_ids)
    scheduler.cancel(cancelled)
    while other.finish_reason is None:
        scheduler.step()
    assert (other.output_ids, len(cancelled.output_ids)) == (alone, seen)
    assert scheduler.dropped_tokens == 4


def test_a_request_that_raises_costs_the_others_nothing():
    def fail_at_third(token, seen=[]):  # noqa: B006
        seen.append(token)
        if len(seen) == 3:
            raise ValueError("no")
        return False

    [(alone, _)] = run(make_scheduler(0), [Request([1, 2], RowSampling(30.0, seed=2), 30)])
    scheduler = make_scheduler(2, rows=2)
    failing, other = (Request([1, 2], RowSampling(30.0, seed=seed), 30) for seed in (1, 2))
    failing.on_token = fail_at_third
    scheduler.add(failing)
    scheduler.add(other)
    while other.finish_reason is None:
        scheduler.step()
    assert (other.output_ids, failing.finish_reason, str(failing.error)) == (alone, "error", "no")


class FakeEvent:
    """Notes the order of what happens to it."""

    def __init__(self, log):
        self.log, self.number = log, len([entry for entry in log if entry[0] == "new"])
        log.append(("new", self.number))

    def record(self):
        self.log.append(("record", self.number))

    def synchronize(self):
        self.log.append(("wait", self.number))


def test_ring_waits_for_the_oldest_step_only():
    log = []
    ring = TokenRing(2, 3, CPU, make_event=lambda: FakeEvent(log))
    del log[:]
    for i in range(3):
        ring.push(torch.tensor([i, 10 + i]))
    assert [ring.pop(), ring.pop()] == [[0, 10], [1, 11]]
    ring.push(torch.tensor([3, 13]))
    assert [ring.pop(), ring.pop(), len(ring)] == [[2, 12], [3, 13], 0]
    waits = [("wait", 0), ("wait", 1), ("record", 0), ("wait", 2), ("wait", 0)]
    assert log == [("record", 0), ("record", 1), ("record", 2), *waits]


def test_ring_forgets_without_waiting():
    log = []
    ring = TokenRing(1, 2, CPU, make_event=lambda: FakeEvent(log))
    ring.push(torch.tensor([1]))
    ring.push(torch.tensor([2]))
    ring.clear()
    assert len(ring) == 0 and "wait" not in [what for what, _ in log]
    ring.push(torch.tensor([3]))
    assert ring.pop() == [3]


def test_ring_refuses_more_steps_than_slots_and_fewer_than_none():
    ring = TokenRing(1, 1, CPU)
    with pytest.raises(AssertionError, match="no step is under way"):
        ring.pop()
    ring.push(torch.tensor([1]))
    with pytest.raises(AssertionError, match="take the oldest tokens first"):
        ring.push(torch.tensor([2]))
