"""CUDA graphs: a whole step, captured once and replayed with one launch. For CUDA devices only.

A step reads and writes buffers at fixed addresses (see state.py): a replay needs no arguments and returns nothing. Its
random numbers are a hash of numbers in these buffers (see sampling/samplers.py): there is no generator state.
Nothing that changes how compiled code runs, such as a dispatch mode, may be active during capture: the graph would
contain other kernels than the compiled ones, without an error.
Source: PyTorch documentation, "CUDA semantics", section on CUDA graphs.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from qwen3fast.engine.compile import end_broken_capture, exclusive, only_compiled

logger = logging.getLogger(__name__)

Step = Callable[[], None]

ATTEMPTS = 2  # a thread of the program that waits for the device breaks a capture; the next attempt may succeed


class CudaRecorder:
    """A recorder with `torch.cuda.CUDAGraph`. All graphs share one memory pool, as only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    def warm_up(self, step: Step) -> None:
        """Run the step once, on the stream of the capture, which lets libraries initialize there."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                step()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, step: Step) -> Step:
        """Capture into a new graph, without the step's effects. Returns: a function that replays it.

        Raises: RuntimeError, with the first cause, if the step cannot be captured; OutOfMemoryError as it is.
        """
        with torch.cuda.device(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # Only this thread is captured; other threads may use the device.
                with (
                    only_compiled(),
                    torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
                ):
                    step()
            except RuntimeError as err:
                # If ending a capture fails, PyTorch leaves the stream, the allocator and the generator in the capture.
                torch.cuda.set_stream(stream)
                end_broken_capture(self._device, self._pool)
                self._pool = torch.cuda.graph_pool_handle()
                generator = torch.cuda.default_generators[torch.cuda.current_device()]
                generator.graphsafe_set_state(generator.clone_state())  # equal, and not in a capture
                if isinstance(err, torch.OutOfMemoryError):
                    raise
                # Ending a failed capture raises as well; its cause is the earlier error.
                raise RuntimeError(str(err.__context__ or err)) from err
            return graph.replay


class GraphCache:
    """A cache of steps, each captured when its key is first used, then replayed.

    A step that cannot be captured runs uncaptured from then on; steps of other keys are still captured.
    failures: the reasons, by key.
    """

    def __init__(self, recorder: CudaRecorder) -> None:
        self._recorder = recorder
        self._replays: dict[Hashable, Step] = {}
        self.failures: dict[Hashable, str] = {}

    def run(self, key: Hashable, step: Step) -> None:
        """Run the step of this key; capture it first if the key is new."""
        replay = self._replays.get(key)
        if replay is not None:
            replay()
        elif key in self.failures:
            step()
        else:
            with exclusive, _no_garbage_collection():
                # Compiled code must not be called for the first time during capture; and capture executes nothing.
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
                "(--no-cuda-graphs) silences this.",
                stacklevel=2,
            )
        self.failures[key] = reason

    def __len__(self) -> int:
        return len(self._replays)

    def clear(self) -> None:
        """Release all graphs and their memory."""
        self._replays.clear()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection in the block: freeing graphs, events or memory breaks a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
