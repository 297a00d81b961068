"""Graphs and the token ring on a model of a device that lags behind the host, or does not, as hypothesis chooses."""

from collections import deque
from itertools import cycle

import pytest
import torch
from cuda_static.stream_model import Device, Event, QueuedCopies, Stream, model_of_cuda
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qwen3fast.engine import cuda_graph
from qwen3fast.engine.compile import end_broken_capture
from qwen3fast.engine.cuda_graph import CudaRecorder, GraphCache
from qwen3fast.engine.in_flight import TokenRing

CPU = torch.device("cpu")
KEYS = ("one row", "two rows", "sampled")


class Host:
    """The host's loop, as of `Engine`: launches steps of different keys ahead, collects tokens, forgets some.

    A step is two kernels: the first puts the next number at the address of the graphs' temporary memory, the second
    takes it from there. So steps that overlap, or a capture that uses the memory too early, give other tokens.
    """

    def __init__(self, device, lookahead):
        self.device, self.lookahead = device, lookahead
        self.state, self.output = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        self.graphs = GraphCache(CudaRecorder(torch.device("cuda", 0)))
        self.ring = TokenRing(1, lookahead + 1, CPU, make_event=lambda: Event(device))
        self.expected, self.launched = deque(), 0

    def step(self, key):
        factor = KEYS.index(key) + 1

        def compute():
            self.device.pool["address"] = int(self.state) + factor

        def finish():
            self.state.fill_(self.device.pool["address"])
            self.output.fill_(self.device.pool["address"])

        self.device.queue(compute)
        self.device.queue(finish)

    def launch(self, key):
        if len(self.ring) > self.lookahead:
            self.collect()
        self.graphs.run(key, lambda: self.step(key))
        self.ring.push(self.output)
        self.launched += KEYS.index(key) + 1
        self.expected.append(self.launched)

    def collect(self):
        if self.expected:
            assert self.ring.pop() == [self.expected.popleft()]

    def forget(self):
        self.ring.clear()
        self.expected.clear()


actions = st.lists(
    st.one_of(
        *[st.tuples(st.just("launch"), st.sampled_from(KEYS))] * 3,
        st.tuples(st.just("collect")),
        st.tuples(st.just("forget")),
        st.tuples(st.just("lag"), st.integers(0, 6)),
    ),
    min_size=4,
    max_size=40,
)


def run(actions, choices, lookahead, monkeypatch):
    order = cycle(choices)
    device = Device(lambda count: next(order) % count)
    with model_of_cuda(device, monkeypatch):
        host = Host(device, lookahead)
        for name, *arguments in actions:
            if name == "lag":
                device.advance_some(*arguments)
            else:
                getattr(host, name)(*arguments)
        while host.expected:
            host.collect()
        device.synchronize()
        assert int(host.state) == host.launched


ANY = given(actions=actions, choices=st.lists(st.integers(0, 1), min_size=1, max_size=20), lookahead=st.integers(0, 4))
EXAMPLES = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EXAMPLES
@ANY
def test_tokens_are_those_of_their_steps_however_far_the_device_lags(actions, choices, lookahead, monkeypatch):
    run(actions, choices, lookahead, monkeypatch)


@pytest.mark.parametrize("fault", ["no wait for the current stream", "no wait for the event"])
def test_planted_faults_are_found(fault, monkeypatch):
    """The test above can fail."""
    if fault == "no wait for the event":
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
    else:
        monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    with pytest.raises((AssertionError, KeyError)):
        settings(EXAMPLES, phases=[Phase.generate])(ANY(run))(monkeypatch=monkeypatch)  # any example, not the smallest


def test_a_slot_that_is_filled_again_waits_for_its_own_copy():
    """Events are used again: one that was reached before must not be taken for the later copy's."""
    device = Device(lambda count: 0)
    ring, token = TokenRing(1, 1, CPU, make_event=lambda: Event(device)), torch.zeros(1, dtype=torch.int64)
    with QueuedCopies(device):
        for number in (5, 6, 7):
            device.queue(lambda number=number: token.fill_(number))
            ring.push(token)
            if number == 6:
                ring.clear()
            else:
                assert ring.pop() == [number]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_a_broken_capture_leaves_stream_allocator_and_generator_as_they_were(error, monkeypatch):
    device, ended = Device(lambda count: 0), []
    assert device.generator.draw() == 1

    def end(of_device, pool):
        device.capturing = None
        ended.append((of_device, pool))

    monkeypatch.setattr(cuda_graph, "end_broken_capture", end)
    with model_of_cuda(device, monkeypatch):
        recorder, before = CudaRecorder(torch.device("cuda", 1)), device.current

        def step():
            raise error("another thread has waited for the device")

        with pytest.raises(error, match="another thread has waited for the device"):
            recorder.record(step)
        assert device.current is before and device.capturing is None
        assert ended == [(torch.device("cuda", 1), (0, 1))]
        assert device.generator.draw() == 2
        work = []
        recorder.record(lambda: device.queue(lambda: work.append(1)))()  # the next capture succeeds
        device.synchronize()
        assert work == [1]


def test_ending_a_capture_that_has_ended_is_no_error(monkeypatch):
    """A failed capture may have told the allocator before it failed."""
    calls = []

    def end(index, pool):
        calls.append((index, pool))
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", None, raising=False)  # not to be called
    end_broken_capture(torch.device("cuda", 1), (0, 1))
    assert calls == [(1, (0, 1))]
