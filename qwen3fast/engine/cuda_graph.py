"""CUDA graphs: a whole decode step recorded once and replayed with one launch. Used on CUDA devices only.

A step reads and writes buffers that never move (see decode.py), so a replay needs no arguments and gives no result.
Its random numbers are a hash of numbers in these buffers (see sampling/samplers.py): no generator's state is kept.
Not yet run on a GPU; tests/cuda_static checks on the CPU what can be checked there, on the uncompiled step.
Source: PyTorch documentation, "CUDA semantics", section on CUDA graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], None]


class Recorder(Protocol):
    """How a step becomes something that can be replayed."""

    def warm_up(self, step: Step) -> None:
        """Run the step once; it does its work."""

    def record(self, step: Step) -> Step:
        """Record the step without doing its work. Returns what replays it.

        Raises: RuntimeError, naming the operation, if it cannot be recorded.
        """


class CudaRecorder:
    """Records with `torch.cuda.CUDAGraph`. All graphs share one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def warm_up(self, step: Step) -> None:
        """Run the step on the stream that it will be recorded on, so that libraries set up what they need there."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, step: Step) -> Step:
        """Record into a new graph.

        Raises: RuntimeError, naming the operation, if it cannot be recorded; OutOfMemoryError as it is.
        """
        graph, operations = torch.cuda.CUDAGraph(), LastOperation()
        stream = torch.cuda.current_stream()
        try:
            # Other threads of the program may use the device meanwhile: this one alone is recorded.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
            with operations, capture:
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as err:
            # Ending a capture that has failed raises as well; what went wrong is the error before that.
            raise RuntimeError(f"{operations.name}: {err.__context__ or err}") from err
        finally:
            torch.cuda.set_stream(stream)
        return graph.replay


class LastOperation(TorchDispatchMode):
    """Remembers the name of the operation called last."""

    name = "before the first operation"

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.name = str(operation)
        return operation(*args, **(kwargs or {}))


class GraphCache:
    """Runs steps, each recorded when its key (batch bucket, cache bucket, sampler) is first seen, then replayed.

    If a step cannot be recorded, this one and all others run as they are, with one warning.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        """recorder: for tests; by default a `CudaRecorder`."""
        self._recorder = recorder or CudaRecorder()
        self._replays: dict[Hashable, Step] = {}
        self.failure = ""  # why a step could not be recorded

    def run(self, key: Hashable, step: Step) -> None:
        """Run the step for this key, recording it if it is new."""
        replay = self._replays.get(key)
        if replay is not None:
            replay()
        elif self.failure:
            step()
        else:
            # Compiled code must not be called for the first time while recording, and recording itself runs nothing.
            self._recorder.warm_up(step)
            try:
                self._replays[key] = self._recorder.record(step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as err:
                self.failure = str(err)
                warnings.warn(
                    f"a decode step could not be recorded as a CUDA graph and runs without, slower; failed at {err}. "
                    "cuda_graphs=False silences this.",
                    stacklevel=2,
                )

    def __len__(self) -> int:
        return len(self._replays)

    def clear(self) -> None:
        """Release all graphs and their memory."""
        self._replays.clear()
