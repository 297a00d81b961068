"""A stand-in for a GPU that the launches of the fused decode step go to, with tensors on the CPU."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from compile_for_gpu.cases import KernelCase, overlapping, replaced_launch
from compile_for_gpu.emulator import arithmetic, bits, transfers, warps  # noqa: F401  which make the instructions known
from compile_for_gpu.emulator.block import Block
from compile_for_gpu.emulator.memory import GlobalMemory
from compile_for_gpu.emulator.program import Program
from qwen3fast.kernels.cuda.decode_step.launch import MIN_CAPABILITY

MAX_THREADS = 2**13
CONSTANTS = {"norm", "w", "scale", "q_norm", "k_norm", "cos", "sin"}  # arguments that no kernel of a step writes


COMPILE = """
import importlib, json, sys
from triton.backends.compiler import GPUTarget
from compile_for_gpu.cases import KernelCase
(major, minor), cases = json.load(sys.stdin)
found = {}
for name, (module, kernel), *arguments in cases:
    case = KernelCase(name, getattr(importlib.import_module(module), kernel), *arguments)
    compiled = case.compile(GPUTarget("cuda", 10 * major + minor, 32))
    found[name] = compiled.asm["ptx"], compiled.metadata.shared
print(json.dumps(found))
"""


class Code(NamedTuple):
    """A compiled kernel."""

    ptx: str
    shared_bytes: int


def case_of_launch(
    capability: tuple[int, int], kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> KernelCase:
    """Return the kernel that a call of `launch` needs on a GPU of this capability; its name tells all of it."""
    case = overlapping(KernelCase.of_launch(kernel, arguments, constants), capability >= MIN_CAPABILITY)
    return case._replace(name=f"{capability} {case.name} {case.signature} {case.constants} {case.options}")


@contextmanager
def noted_launches(capability: tuple[int, int]) -> Iterator[dict[str, KernelCase]]:
    """Give the kernels that are launched inside of the context, by name; none of them runs."""
    found: dict[str, KernelCase] = {}

    def note(kernel: Any, grid: Any, *arguments: Any, device: torch.device, **constants: Any) -> None:
        case = case_of_launch(capability, kernel, arguments, constants)
        found[case.name] = case

    with replaced_launch(note):
        yield found


def compile_elsewhere(cases: Mapping[str, KernelCase], capability: tuple[int, int]) -> dict[str, Code]:
    """Return the code of kernels for a GPU of this capability.

    A process of its own compiles them: in one that interprets Triton's kernels they are Python functions.
    """
    given = []
    for case in cases.values():
        function = getattr(case.kernel, "fn", case.kernel)
        kernel = (function.__module__, function.__name__)
        given.append((case.name, kernel, case.signature, case.constants, case.options))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    text = json.dumps([capability, given])
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"kernels were not compiled: {done.stderr}")
    return {name: Code(*code) for name, code in json.loads(done.stdout).items()}


@contextmanager
def emulated_launches(
    capability: tuple[int, int], code: Mapping[str, Code], change: Callable[[str], str] = str
) -> Iterator[None]:
    """Run all kernels that are launched inside of the context by the emulator. change: of a kernel's PTX.

    Memory that nothing has written is a tensor of NaN, or of the smallest integer.
    """
    memory = _TensorMemory()

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **constants: Any) -> None:
        ptx, shared_bytes = code[case_of_launch(capability, kernel, arguments, constants).name]
        named = list(zip(kernel.arg_names, arguments, strict=False))
        written = {a.data_ptr() for name, a in named if isinstance(a, Tensor) and name not in CONSTANTS}
        parameters = [
            memory.address(argument, argument.data_ptr() not in written)
            if isinstance(argument, Tensor)
            else _bits_of(argument)
            for argument in arguments
        ]
        run_grid(change(ptx), (*grid, 1, 1)[:3], shared_bytes, memory.bytes, parameters)
        memory.read_back()

    with replaced_launch(launch):
        yield


class _TensorMemory:
    """Copies of tensors in global memory, by their own addresses."""

    def __init__(self) -> None:
        self.bytes = GlobalMemory()
        self._known: dict[tuple[int, int], tuple[Tensor, int]] = {}  # which keeps the tensors alive

    def address(self, tensor: Tensor, is_constant: bool) -> int:
        assert tensor.is_contiguous(), "kernels take contiguous tensors"
        key = (tensor.data_ptr(), tensor.nbytes)
        if key not in self._known:
            array = _bytes_of(tensor)
            is_new = _is_empty(tensor)
            place = self.bytes.reserve(array.nbytes) if is_new else self.bytes.place(array, is_constant)
            self._known[key] = (tensor, place)
        return self._known[key][1]

    def read_back(self) -> None:
        for tensor, address in self._known.values():
            _bytes_of(tensor)[:] = self.bytes.read(address, tensor.nbytes)


def run_grid(
    ptx: str, grid: tuple[int, int, int], shared_bytes: int, memory: GlobalMemory, parameters: Sequence[int]
) -> None:
    """Run all blocks of a grid, MAX_THREADS at once. parameters: the bits of each.

    Raises: EmulatorError, with the instruction.
    """
    program = parsed(ptx)
    places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    count = max(1, MAX_THREADS // program.num_threads)
    for i in range(0, len(places), count):
        Block(program, grid, places[i : i + count], shared_bytes, memory, parameters).run()


parsed = functools.lru_cache(maxsize=1024)(Program.parse)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """Return a tensor's memory."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _is_empty(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        return bool(tensor.isnan().all())
    return bool((tensor == torch.iinfo(tensor.dtype).min).all()) and tensor.dtype != torch.uint8


def _bits_of(number: float) -> int:
    return int(np.float32(number).view(np.uint32)) if isinstance(number, float) else number
