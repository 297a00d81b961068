"""Replaces PyTorch's and Triton's kernels in this process, which has the runtime already."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch

from simulated_gpu import kernels, operations
from simulated_gpu.runtime import Runtime

_kept: list[object] = []  # as long as the process runs


def install() -> None:
    """Let all kernels run on the simulated GPU; see main.py for SIMULATED_GPU_KERNELS."""
    if _kept:
        return
    runs = os.environ.get("SIMULATED_GPU_KERNELS") != "0"
    runtime = Runtime(runs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch: its kernels are replaced
        _kept.append(operations.install(runtime))
    kernels.install(runtime)
    _replace_profiler(runtime)


def _replace_profiler(runtime: Runtime) -> None:
    """Let tools and tests count kernels by the runtime's log: PyTorch's profiler asks the driver."""
    from gpu_check import replay

    def profile_run(run: Callable[[], object], device: torch.device) -> replay.Profile:
        torch.cuda.synchronize(device)
        runtime.begin_log()
        run()
        torch.cuda.synchronize(device)
        result = replay.Profile()
        for kind, name in runtime.end_log():
            if kind == "run":
                result.kernels[name] += 1
            else:
                result.launches["cudaGraphLaunch" if name == "graph" else "cudaLaunchKernel"] += 1
        return result

    replay.profile_run = profile_run
