"""A model of a CUDA device for tests: streams, events, graphs and the addresses of a graph's memory, on the host.

Work that is queued on a stream runs when the model is told to advance it, one entry at a time, in the order of its
stream, and no earlier than the events it waits for. So a test can choose, entry by entry, how far the device lags
behind the host, and what runs first where nothing says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], None]


class Stream:
    """A queue of work. Entries are functions, or events that have to be reached first."""

    def __init__(self, device: Device) -> None:
        self.device, self.queue = device, deque[Any]()
        device.streams.append(self)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.device)
        event.record(other)
        self.queue.append(event)

    def can_advance(self) -> bool:
        return bool(self.queue) and (not isinstance(self.queue[0], Event) or self.queue[0].is_reached)

    def advance(self) -> None:
        entry = self.queue.popleft()
        if not isinstance(entry, Event):
            entry()


class Event:
    """A place in a stream's work."""

    def __init__(self, device: Device) -> None:
        self.device, self.is_reached = device, True

    def record(self, stream: Stream | None = None) -> None:
        self.is_reached = False
        self.marker = object()  # an event that is recorded again is reached at its last place
        (stream or self.device.current).queue.append(lambda marker=self.marker: self._reach(marker))

    def _reach(self, marker: object) -> None:
        self.is_reached = self.is_reached or marker is self.marker

    def synchronize(self) -> None:
        while not self.is_reached:
            self.device.advance()


class Graph:
    """Captured work. Its temporary memory is an address of the pool, which all graphs of the pool share."""

    def __init__(self, device: Device) -> None:
        self.device, self.work = device, list[Work]()

    def replay(self) -> None:
        self.device.current.queue.extend(self.work)


class Generator:
    """The default generator of random numbers, which every capture puts into another mode until its end."""

    def __init__(self) -> None:
        self.state = {"offset": 0, "is_capturing": False}

    def clone_state(self) -> Generator:
        clone = Generator()
        clone.state = self.state | {"is_capturing": False}
        return clone

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def draw(self) -> int:
        """Return the next number: as PyTorch, which refuses outside of a capture what it began inside of one."""
        assert not self.state["is_capturing"], "Offset increment outside graph capture encountered unexpectedly."
        self.state["offset"] += 1
        return self.state["offset"]


class Device:
    """Streams, the one that is current, and the choice of what runs next. choose: of so many streams, one."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.choose = choose
        self.streams: list[Stream] = []
        self.current = Stream(self)
        self.capturing: Graph | None = None
        self.pool: dict[str, Any] = {}
        self.generator = Generator()

    def queue(self, work: Work) -> None:
        """Launch: queue, or capture."""
        (self.capturing.work if self.capturing is not None else self.current.queue).append(work)

    def advance(self) -> None:
        """Run one entry of a stream that can go on."""
        ready = [stream for stream in self.streams if stream.can_advance()]
        assert ready, "the host waits for what will never run"
        ready[self.choose(len(ready))].advance()

    def advance_some(self, entries: int) -> None:
        """Run up to so many entries: the device goes on while the host does something else."""
        for _ in range(entries):
            if any(stream.can_advance() for stream in self.streams):
                self.advance()

    def synchronize(self) -> None:
        while any(stream.queue for stream in self.streams):
            self.advance()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def capture(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As `torch.cuda.graph`: waits for the device, then captures."""
        assert self.capturing is None, "one capture at a time"
        self.synchronize()
        self.capturing = graph
        self.generator.state["is_capturing"] = True
        with self.stream(stream):
            yield
        self.capturing = None
        self.generator.state["is_capturing"] = False


class QueuedCopies(TorchDispatchMode):
    """Copies that are not to block are queued, and read their source only when they run."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten.copy_.default and (args[2:] or [False])[0]:
            self.device.queue(lambda: args[0].copy_(args[1]))
            return args[0]
        return operation(*args, **(kwargs or {}))


@contextmanager
def model_of_cuda(device: Device, monkeypatch: Any) -> Iterator[None]:
    """Let `torch.cuda` be this device."""

    @contextmanager
    def chosen(_: Any) -> Iterator[None]:
        yield

    with monkeypatch.context() as patches:
        for name, value in {
            "device": chosen,
            "Stream": lambda: Stream(device),
            "Event": lambda: Event(device),
            "CUDAGraph": lambda: Graph(device),
            "current_device": lambda: 0,
            "current_stream": lambda: device.current,
            "default_generators": (device.generator,),
            "stream": device.stream,
            "set_stream": lambda stream: setattr(device, "current", stream),
            "graph": device.capture,
            "graph_pool_handle": lambda: (0, 1),
        }.items():
            patches.setattr(torch.cuda, name, value)
        with QueuedCopies(device):
            yield
