"""The runtime of runtime.cpp: how it is built, and functions of the host that stand for kernels."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("runtime.cpp")
LIBRARY = "libcuda.so.1"  # the name by which PyTorch and Triton look for the driver


def build(folder: Path) -> Path:
    """Compile the runtime into a folder, unless it is there. Returns: its file.

    Raises: RuntimeError if PyTorch is no build for CUDA 13, which brings the headers.
    """
    packages = Path(torch.__file__).parents[1]
    headers = [packages / "nvidia/cu13/include", packages / "triton/backends/nvidia/include"]
    if not (headers[0] / "cuda_runtime_api.h").is_file():
        raise RuntimeError(f"expected a PyTorch built for CUDA 13, found {torch.__version__}")
    library = folder / f"{torch.__version__}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}" / LIBRARY
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_name(f"{os.getpid()}.so")
        options = ["-std=c++20", "-O1", "-g", "-shared", "-fPIC", *(f"-I{path}" for path in headers)]
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.replace(library)
    return library


class Runtime:
    """The loaded runtime.

    Attributes:
        runs_all: False if some kernels do nothing. errors: the last that a function on the device raised.
    """

    def __init__(self, runs_all: bool = True) -> None:
        self.runs_all = runs_all
        self._library = ctypes.CDLL(LIBRARY)
        self._library.simulated_kernel.argtypes = [ctypes.c_void_p, ctypes.c_char_p, _Run, ctypes.c_void_p]
        self._library.simulated_arena.restype = self._library.simulated_log_end.restype = ctypes.c_void_p
        self._library.simulated_bytes_at.restype = ctypes.c_size_t
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._functions: dict[int, tuple[Callable[[], None], bool]] = {}  # by number; True: of a graph, which stay
        self._numbers = itertools.count(1)
        self._run = _Run(self._run_function)
        self.errors: list[BaseException] = []
        size = ctypes.c_size_t()
        self.arena = self._library.simulated_arena(ctypes.byref(size))
        self.arena_bytes = size.value

    def launch(self, stream: int, name: str, function: Callable[[], None]) -> None:
        """Put a function into a stream, or into the graph that is captured there. name: of the kernel it stands for.

        Raises: RuntimeError if a function failed and no call has told it, or if the capture is broken.
        """
        number = next(self._numbers)
        self._functions[number] = function, self.is_capturing(stream)
        self._check(self._library.simulated_kernel(stream, name.encode(), self._run, number))

    def is_capturing(self, stream: int) -> bool:
        """Return whether operations of a stream go into a graph."""
        return bool(self._library.simulated_is_capturing(ctypes.c_void_p(stream)))

    def synchronize(self, stream: int) -> None:
        """Wait for a stream. Raises: RuntimeError during a capture."""
        self._check(self._library.cudaStreamSynchronize(ctypes.c_void_p(stream)))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy bytes from one address to another, and wait for it. Raises: RuntimeError during a capture."""
        addresses = (ctypes.c_void_p(target), ctypes.c_void_p(source))
        self._check(self._library.cudaMemcpyAsync(*addresses, ctypes.c_size_t(size), 4, ctypes.c_void_p(stream)))
        self.synchronize(stream)

    def _check(self, error: int) -> None:
        if error:
            self._library.cudaGetLastError()
            cause = self.errors.pop() if self.errors else None
            raise RuntimeError(f"CUDA error: {self._library.cudaGetErrorString(error).decode()}") from cause

    def bytes_at(self, address: int) -> int:
        """Return how many bytes from an address on belong to the same buffer; 0 if none."""
        return int(self._library.simulated_bytes_at(ctypes.c_void_p(address)))

    def begin_log(self) -> None:
        """Begin to note kernels."""
        self._library.simulated_log_begin()

    def end_log(self) -> list[tuple[str, str]]:
        """Return what was noted since: pairs ("launch", name) by the host, ("run", name) on the device."""
        text = self._library.simulated_log_end()
        lines = ctypes.string_at(text).decode().splitlines()
        self._library.simulated_free(ctypes.c_void_p(text))
        return [(kind, name) for kind, _, name in (line.partition(" ") for line in lines)]

    def _run_function(self, number: int) -> int:
        """Run a function. Returns: 1 if it failed."""
        try:
            function, is_kept = self._functions[number]
            if not is_kept:
                del self._functions[number]
            function()
        except BaseException as err:  # nothing above would see it
            if not self.runs_all:
                return 0  # an index that no kernel has computed
            traceback.print_exc(file=sys.stderr)
            self.errors = [err]
            return 1
        return 0


_Run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
