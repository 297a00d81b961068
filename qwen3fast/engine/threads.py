"""How many CPU threads to use: one for each core, not for each hardware thread.

Two threads on one core share its arithmetic units and its way to memory, which is all that products need.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

SYSTEM = Path("/sys")


def use_threads(threads: int | None = None) -> None:
    """Set PyTorch's number of CPU threads, which the whole process shares.

    threads: None takes the cores at hand, unless OMP_NUM_THREADS or `torch.set_num_threads` has chosen.
    Raises: ValueError for a number below 1.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    elif torch.get_num_threads() == len(usable_cpus()) and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_cores())


def num_cores(system: Path = SYSTEM) -> int:
    """Cores that this process may use: its affinity and its container's quota count; at least 1."""
    cores = set()
    for cpu in usable_cpus():
        try:
            siblings = (system / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
        except OSError:  # not Linux, or hidden
            siblings = str(cpu)
        cores.add(siblings.strip())
    return max(1, min(len(cores), _quota(system) or len(cores)))


def usable_cpus() -> set[int]:
    """Hardware threads that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quota(system: Path) -> int | None:
    """Processors that the container's time limit amounts to, rounded up; None without a limit (cgroup version 2)."""
    try:
        limit, period = (system / "fs/cgroup/cpu.max").read_text("ascii").split()
        return None if limit == "max" else -(-int(limit) // int(period))
    except (OSError, ValueError):
        return None
