"""Compiles kernels before anything launches them, in several processes: Triton holds Python's lock while it compiles.

The processes leave machine code in Triton's cache on disk, where this process finds it. They use no GPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from qwen3fast.kernels.cuda.decode_step import attention, linear, sample, tail
from qwen3fast.kernels.cuda.decode_step.launch import only_compile

logger = logging.getLogger(__name__)

# Each process imports PyTorch, which takes as long as compiling some ten kernels.
MIN_PROCESSES, MAX_PROCESSES = 4, 8
MIN_KERNELS = 16
TIMEOUT_S = 120

Kernel = list[str]  # module, name, specialization (see `JITFunction.preload`), hash of the source


def compile_ahead(steps: Callable[[], None]) -> None:
    """Compile the kernels that `launch` is called with in `steps`, which launch nothing.

    What does not compile here is compiled, and its error raised, when it is launched.
    """
    try:
        kernels, number = _kernels_of(steps), min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
        name = hashlib.sha256(json.dumps([triton.__version__, kernels]).encode()).hexdigest()
        done = Path(triton.knobs.cache.dir, f"qwen3fast-{name}")  # tells that all of them are in the cache
        if len(kernels) >= MIN_KERNELS and number >= MIN_PROCESSES and not done.exists():
            _compile_in_processes(kernels, number)
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
        only_compile(steps)
    except Exception as err:
        logger.warning("not all kernels were compiled ahead: %s", err)


def _kernels_of(steps: Callable[[], None]) -> list[Kernel]:
    """Return the kernels that this process has not compiled yet."""
    kernels: list[Kernel] = []
    thread, runtime = threading.get_ident(), triton.knobs.runtime
    before = runtime.jit_cache_hook

    def note(**call: Any) -> bool:
        if threading.get_ident() != thread:  # another part of the program compiles
            return bool(before is not None and before(**call))
        kernel = call["fn"]
        specialization, source = call["compile"]["specialization_data"], kernel.jit_function.cache_key
        kernels.append([kernel.module, kernel.name, specialization, source])
        return True  # not to be compiled here

    runtime.jit_cache_hook = note
    try:
        only_compile(steps)
    finally:
        runtime.jit_cache_hook = before
    return kernels


def _compile_in_processes(kernels: list[Kernel], number: int) -> None:
    """Compile kernels in several processes. Raises: RuntimeError if one fails; subprocess.TimeoutExpired."""
    target = triton.runtime.driver.active.get_current_target()
    command = [sys.executable, "-m", __name__]
    # Modules are found where this process finds them: "" is its working folder, which -m alone would put first.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    processes = []
    try:
        for i in range(number):
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True))
            pipe = processes[i].stdin
            assert pipe is not None, "asked for"
            with pipe:
                json.dump([target.__dict__, kernels[i::number]], pipe)
        if any(process.wait(TIMEOUT_S) for process in processes):
            raise RuntimeError("a process that compiles has failed")
    finally:
        for process in processes:
            process.kill()
            process.wait()


class _NoDriver:
    """Takes the place of Triton's driver in the processes."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0


def main() -> None:
    """Compile the kernels that standard input lists."""
    target, kernels = json.load(sys.stdin)
    triton.runtime.driver.set_active(_NoDriver(GPUTarget(**target)))
    modules = {module.__name__: module for module in (attention, linear, sample, tail)}
    for module, name, specialization, _ in kernels:
        getattr(modules[module], name).preload(specialization)


if __name__ == "__main__":
    main()
