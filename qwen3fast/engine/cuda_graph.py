"""CUDA graphs: a whole step captured once and replayed with one launch. Used on CUDA devices only.

A step reads and writes buffers that never move (see decode.py), so a replay needs no arguments and gives no result.
Its random numbers are a hash of numbers in these buffers (see sampling/samplers.py): no generator's state is kept.
Nothing that changes how compiled code runs may be active while a step is captured, a dispatch mode for example: the
graph would hold other kernels than the ones that were compiled, without an error.
Source: PyTorch documentation, "CUDA semantics", section on CUDA graphs.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from qwen3fast.engine.compile import end_broken_capture, exclusive, only_compiled

logger = logging.getLogger(__name__)

Step = Callable[[], None]

ATTEMPTS = 2  # another thread of the program that waits for the device breaks a capture; the next one may succeed


class Recorder(Protocol):
    """A way to make of a step something that can be replayed."""

    def warm_up(self, step: Step) -> None:
        """Run the step once; it does its work."""

    def record(self, step: Step) -> Step:
        """Record the step without doing its work. Returns: a function that replays it.

        Raises: RuntimeError if it cannot be recorded; everything can go on as before then.
        """


class CudaRecorder:
    """A recorder by `torch.cuda.CUDAGraph`. All graphs share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    def warm_up(self, step: Step) -> None:
        """Run the step on the stream that it will be captured on: libraries set up what they need there."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                step()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, step: Step) -> Step:
        """Capture into a new graph.

        Raises: RuntimeError, with the first cause, if the step cannot be captured; OutOfMemoryError as it is.
        """
        with torch.cuda.device(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Other threads of the program may use the device meanwhile: this one alone is captured.
                with (
                    only_compiled(),
                    torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
                ):
                    step()
            except RuntimeError as err:
                # Where the end of a capture fails, PyTorch leaves the stream and the allocator in the middle of it.
                torch.cuda.set_stream(stream)
                end_broken_capture(self._device, self._pool)
                self._pool = torch.cuda.graph_pool_handle()
                if isinstance(err, torch.OutOfMemoryError):
                    raise
                # Ending a capture that has failed raises as well; its cause is the error before that.
                raise RuntimeError(str(err.__context__ or err)) from err
            return graph.replay


class GraphCache:
    """A cache of steps, each captured when its key is first seen, then replayed.

    A step that cannot be captured runs uncaptured from then on; steps of other keys are still captured.
    failures: why, by key.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._replays: dict[Hashable, Step] = {}
        self.failures: dict[Hashable, str] = {}

    def run(self, key: Hashable, step: Step) -> None:
        """Run the step for this key, capturing it if it is new."""
        replay = self._replays.get(key)
        if replay is not None:
            replay()
        elif key in self.failures:
            step()
        else:
            with exclusive, _no_garbage_collection():
                # Compiled code must not be called for the first time while capturing, and capturing runs nothing.
                self._recorder.warm_up(step)
                self._capture(key, step)

    def _capture(self, key: Hashable, step: Step) -> None:
        for _ in range(ATTEMPTS):
            try:
                self._replays[key] = self._recorder.record(step)
                return
            except torch.OutOfMemoryError as err:
                reason = f"out of memory: {err}"
                break
            except RuntimeError as err:
                reason = str(err)
        logger.warning("step %s could not be captured: %s", key, reason)
        if not self.failures:
            warnings.warn(
                f"a step could not be captured as a CUDA graph and runs without, slower: {reason}. cuda_graphs=False "
                "silences this.",
                stacklevel=2,
            )
        self.failures[key] = reason

    @property
    def failure(self) -> str:
        """Why steps could not be captured; empty if all could."""
        return "; ".join(dict.fromkeys(self.failures.values()))

    def __len__(self) -> int:
        return len(self._replays)

    def clear(self) -> None:
        """Release all graphs and their memory."""
        self._replays.clear()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Let no object be freed by chance meanwhile: freeing graphs, events or memory breaks a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
