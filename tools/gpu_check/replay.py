"""The kernels of a decode step on the device, by the profiler: how many, which, how long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SHORT, LONG = 6, 16  # tokens of two runs, whose difference is LONG - SHORT steps
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
ANNOTATIONS = ("##", "Torch-Compiled Region", "ProfilerStep")  # ranges on the device's timeline, which are no kernels
# What PyTorch launches for an operation that no compiler fused; attention kernels of PyTorch's own are not among them.
EAGER = ("at::native::", "at_cuda_detail::")
LIBRARIES = ("flash", "fmha", "cudnn", "cutlass", "cublas", "gemm", "gemv")


@dataclass
class Profile:
    """Counts by name: kernels on the device (copies included), their microseconds, and calls that launch something."""

    kernels: Counter[str] = field(default_factory=Counter)
    micros: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def minus(self, other: Profile) -> Profile:
        """Return this profile less the other one."""
        pairs = ((self.kernels, other.kernels), (self.micros, other.micros), (self.launches, other.launches))
        return Profile(*(_difference(mine, others) for mine, others in pairs))


def _difference(mine: Counter[str], others: Counter[str]) -> Counter[str]:
    return Counter({name: count - others[name] for name, count in mine.items() if count != others[name]})


def profile_run(run: Callable[[], object], device: torch.device) -> Profile:
    """Run once under the profiler. On the CPU there are no kernels."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    result = Profile()
    for event in profiler.key_averages():
        if getattr(event, "is_user_annotation", False) or event.key.startswith(ANNOTATIONS):
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            result.kernels[event.key] += event.count
            result.micros[event.key] += event.self_device_time_total
        elif event.key.startswith(LAUNCHES):
            result.launches[event.key] += event.count
    return result


def step_profile(run: Callable[[int], object], device: torch.device) -> dict[str, Any]:
    """Return what one decode step launches, as the difference of two runs that generate SHORT and LONG tokens.

    Counts per step are cut off: a generator may clear a request's row only after its reply is there, in the next run.
    run: generates so many tokens. Returns: `kernels` a step and their `kernel_us`; `graph_launches` and `launches` from
    the host a step (copies included); `eager_kernels`, names of PyTorch's own kernels of single operations, which a
    compiled step should not have; `by_name`, the kernels that take longest, with their count and microseconds a step.
    """
    run(LONG)  # whatever is compiled or captured late
    steps = LONG - SHORT
    shorter = profile_run(lambda: run(SHORT), device)
    difference = profile_run(lambda: run(LONG), device).minus(shorter)
    kernels = Counter(
        {
            name: per_step
            for name, count in difference.kernels.items()
            if not name.startswith(("Memcpy", "Memset")) and (per_step := int(count / steps))
        }
    )
    longest = sorted(kernels, key=lambda name: -difference.micros[name])
    return {
        "kernels": sum(kernels.values()),
        "kernel_us": sum(difference.micros[name] for name in kernels) / steps,
        "graph_launches": difference.launches["cudaGraphLaunch"] / steps,
        "launches": sum(difference.launches.values()) / steps,
        "eager_kernels": eager_kernels(kernels),
        "by_name": {name[:120]: [kernels[name], difference.micros[name] / steps] for name in longest[:25]},
    }


def eager_kernels(names: Counter[str]) -> list[str]:
    """Return the names of kernels that PyTorch launches for single operations that run eagerly, sorted."""
    return sorted(n for n in names if any(e in n for e in EAGER) and not any(lib in n.lower() for lib in LIBRARIES))
