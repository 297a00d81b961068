"""Launches of a decode step's kernels: each may start before the previous kernel has ended.

With programmatic dependent launch (compute capability 9.0 and newer), a kernel may start while the previous one runs.
It may then load data that no kernel writes (weights), must wait before it accesses anything else, and lets its own
successor start as early as possible. All programs of all kernels wait: after the wait, all earlier kernels have ended.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3fast.checks import checked_variable

MIN_CAPABILITY = (9, 0)

# Inside `only_compile`: the kernels that `launch` was called with so far. Otherwise None.
_compiled: ContextVar[set[Any] | None] = ContextVar("compiled", default=None)


@functools.cache
def uses_dependent_launch(device: torch.device) -> bool:
    """Return whether kernels overlap on this device; the environment variable QWEN3FAST_PDL=0 switches this off."""
    return (
        device.type == "cuda"
        and checked_variable("QWEN3FAST_PDL") == "1"
        and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    )


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches kernels on this device: it takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, num_warps: int = 4, **constants: Any
) -> None:
    """Launch `kernel[grid](*arguments, **constants)`; its last constant, DEPENDENT, says whether it overlaps."""
    is_dependent = uses_dependent_launch(device)
    options = {"launch_pdl": True} if is_dependent else {}
    constants |= {"DEPENDENT": is_dependent, "num_warps": num_warps}
    compiled = _compiled.get()
    with current(device):
        if compiled is None:
            kernel[grid](*arguments, **constants, **options)
            return
        types = [argument.dtype if isinstance(argument, Tensor) else type(argument) for argument in arguments]
        key = (id(kernel), *types, *constants.items())
        if key not in compiled:
            compiled.add(key)
            kernel.run(*arguments, grid=grid, warmup=True, **constants, **options)


def only_compile(steps: Callable[[], None]) -> None:
    """Run steps in which `launch` compiles kernels, each once, and launches none."""
    token = _compiled.set(set())
    try:
        steps()
    finally:
        _compiled.reset(token)


@triton.jit
def start_next(DEPENDENT: tl.constexpr):
    """Let the next kernel start once all programs of this one have reached this point."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Wait until the previous kernel has ended and its writes are visible."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointer, num_bytes, DEPENDENT: tl.constexpr):
    """Prefetch contiguous constant memory (16-byte aligned, a multiple of 16 bytes) into the L2 cache."""
    if DEPENDENT:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .b32 t;
            mov.u32 t, %tid.x;
            setp.eq.u32 p, t, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [pointer, num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
