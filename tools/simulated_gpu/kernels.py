"""Triton's kernels on simulated devices: their PTX runs in the emulator of `compile_for_gpu`, or nothing does."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from compile_for_gpu.emulator.device import run_grid
from compile_for_gpu.emulator.numbers import Array
from compile_for_gpu.emulator.program import EmulatorError
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.compiler.compiler import CompiledKernel

from simulated_gpu.runtime import Runtime

FLOATS = {"fp32": "f", "fp64": "d", "fp16": "e", "f32": "f", "f64": "d"}


class Code(NamedTuple):
    """A kernel that was loaded."""

    name: str
    ptx: str
    shared_bytes: int


class DeviceMemory:
    """The memory of simulated devices, which kernels see by its addresses."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._begin, self._size = runtime, runtime.arena, runtime.arena_bytes
        memory = (ctypes.c_uint8 * runtime.arena_bytes).from_address(runtime.arena)
        self._bytes = np.frombuffer(memory, np.uint8)
        self.may_access_all = True
        self._allowed: tuple[int, int] = (0, 0)  # the buffer that was accessed last

    def check(self, first: Array, size: int, *, is_write: bool = False) -> Array:
        """Return the places of `size` bytes from each address, which lie in buffers."""
        first = first.astype(np.int64)
        if (first % size).any():
            raise EmulatorError(f"access of {size} bytes that is not aligned to them")
        rest = first
        while True:
            low, high = self._allowed
            rest = rest[(rest < low) | (rest + size > high)]
            if not len(rest):
                break
            address = int(rest[0])
            count = self._runtime.bytes_at(address) if 0 <= address - self._begin < self._size else 0
            if count < size:
                raise EmulatorError(f"access outside of the buffers, at {address:#x}")
            self._allowed = (address, address + count)
        return (first - self._begin)[:, None] + np.arange(size)

    def load(self, first: Array, size: int) -> Array:
        """Return the bytes at each address, [addresses, size]."""
        return self._bytes[self.check(first, size)]

    def store(self, first: Array, data: Array) -> None:
        """Write bytes [addresses, size]."""
        self._bytes[self.check(first, data.shape[1])] = data


class Utilities:
    """Functions of a driver that Triton calls."""

    ptx = ""  # of the kernel that is loaded now

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return the module, the function, its registers, spills and greatest number of threads."""
        code = Code(name, self.ptx, shared)
        return code, code, 32, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Do nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what Triton wants to know of a device."""
        found = torch.cuda.get_device_properties(device)
        return {
            "max_shared_mem": 232448,
            "max_num_regs": 65536,
            "multiprocessor_count": found.multi_processor_count,
            "warpSize": 32,
            "sm_clock_rate": 1980000,
            "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }


class Driver(GPUDriver):
    """Triton's driver of simulated devices."""

    def __init__(self, runtime: Runtime) -> None:
        self.utils = Utilities()
        self.launcher_cls = functools.partial(Launcher, runtime, DeviceMemory(runtime) if runtime.runs_all else None)
        super().__init__()

    def get_current_target(self) -> GPUTarget:
        """Return the architecture to compile for."""
        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_active_torch_device(self) -> torch.device:
        """Return the current device."""
        return torch.device("cuda", torch.cuda.current_device())

    def get_device_interface(self) -> Any:
        """Return PyTorch's module of devices."""
        return torch.cuda

    @staticmethod
    def is_active() -> bool:
        """Return True."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return the name of a type in C++."""
        from triton.backends.nvidia.driver import ty_to_cpp

        return str(ty_to_cpp(ty))

    def get_benchmarker(self) -> Any:
        """Return a function that measures nothing: each form of a kernel is as good as any other."""
        return lambda *_, **__: [1.0, 1.0, 1.0]

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        """Return a tensor that nobody needs."""
        return torch.empty(1, dtype=torch.int, device="cuda")

    def clear_cache(self, cache: torch.Tensor) -> None:
        """Do nothing."""


class Launcher:
    """A kernel's launches. memory: None if no kernel runs."""

    def __init__(self, runtime: Runtime, memory: DeviceMemory | None, source: Any, metadata: Any) -> None:
        self._runtime, self._memory = runtime, memory
        self._types = list(source.signature.values())

    def __call__(self, x: int, y: int, z: int, stream: int, code: Code, *rest: Any) -> None:
        """Put a launch into a stream."""
        *_, enter, leave = rest[:4]
        if enter is not None:
            enter(rest[1])
        arguments = rest[4:]
        assert len(arguments) == len(self._types), (code.name, self._types, arguments)
        pairs = zip(self._types, arguments, strict=True)
        parameters = [_bits(kind, value) for kind, value in pairs if kind != "constexpr"] + [0, 0]
        if min(x, y, z) > 0:
            self._runtime.launch(stream, code.name, lambda: self._run((x, y, z), code, parameters))
        if leave is not None:
            leave(rest[1])

    def _run(self, grid: tuple[int, int, int], code: Code, parameters: list[int]) -> None:
        if self._memory is None:
            return
        try:
            run_grid(code.ptx, grid, code.shared_bytes, self._memory, parameters)
        except EmulatorError as err:
            raise EmulatorError(f"{code.name}: {err}") from err


def _bits(kind: str, value: Any) -> int:
    if kind.startswith("*"):
        return 0 if value is None else value if isinstance(value, int) else int(value.data_ptr())
    if kind in FLOATS:
        form = FLOATS[kind]
        return int.from_bytes(struct.pack(f"<{form}", value), "little")
    return int(value) & (2**64 - 1)


def install(runtime: Runtime) -> None:
    """Let Triton take simulated devices for its own."""

    class Own(Driver):
        def __init__(self) -> None:
            super().__init__(runtime)

    triton.backends.backends["nvidia"] = dataclasses.replace(triton.backends.backends["nvidia"], driver=Own)
    triton.runtime.driver.set_active(Own())
    load, lock = CompiledKernel._init_handles, threading.Lock()

    def loaded(self: CompiledKernel) -> None:
        with lock:
            Utilities.ptx = self.asm["ptx"]
            load(self)

    CompiledKernel._init_handles = loaded
    from torch._inductor.runtime.benchmarking import Benchmarker

    for name in [name for name in dir(Benchmarker) if name.startswith("benchmark")]:
        setattr(Benchmarker, name, lambda *_, **__: 1.0)
