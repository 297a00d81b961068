"""The number of CPU threads: by default one per core, not one per hardware thread.

Two threads on one core share its arithmetic units and memory bandwidth, the only resources that matrix products need.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from qwen3fast.checks import checked_integer
from qwen3fast.model.memory import control_groups

Result = TypeVar("Result")
SYSTEM = Path("/sys")
CHOICES = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
PROCESS_ID = os.getpid()  # of the process that imported PyTorch; another one is a fork of it


def use_threads(threads: int | None = None) -> None:
    """Set PyTorch's number of CPU threads for the whole process.

    threads: None means `num_cores`, unless OMP_NUM_THREADS, MKL_NUM_THREADS or `torch.set_num_threads` has set another.
    PyTorch begins with all cores, or all hardware threads, whatever the quota: these numbers are no choice.
    Raises: ValueError as `checked_threads`.
    """
    threads, current = checked_threads(threads), torch.get_num_threads()
    is_default = current in (len(usable_cores()), len(usable_cpus())) and not CHOICES & os.environ.keys()
    if threads is not None:
        torch.set_num_threads(threads)
    elif is_default:
        torch.set_num_threads(min(current, num_cores()))


def set_own_threads(number: int, others: int) -> None:
    """Set the number of CPU threads of the calling thread alone.

    others: the number of threads that begin later, which PyTorch gives the number that any thread has set last.
    """
    torch.set_num_threads(number)
    if number != others:
        with ThreadPoolExecutor(1, "qwen3fast-threads") as pool:
            pool.submit(torch.set_num_threads, others).result()


class SparedThreads:
    """The threads that steps leave out while other programs use their cores.

    A step's threads wait for each other after each of its many short products. A thread that shares its core is
    descheduled for milliseconds at a time, and all wait: with one thread less, steps take less time. After some steps,
    all threads are tried again, less often each time that this fails.

    number: of threads to leave out, now.
    """

    # Of its time that a thread is off its core, from which on a step counts as slow. For two threads on one core it is
    # less than a half: while one computes, the other sleeps for a part, which does not count.
    LOST = 0.25
    SLOW_STEPS = 2  # one after another, until a thread is left out
    STEPS = (32, 256)  # until one more is used again: at first, and at most

    def __init__(self) -> None:
        self.number = 0
        self._slow = self._left = 0
        self._steps = self.STEPS[0]

    def note(self, lost: float, threads: int) -> None:
        """Note a step of some threads. lost: the largest share of its time for which one of them was off its core."""
        self._slow = self._slow + 1 if lost > self.LOST and threads > 1 else 0
        if self._slow == self.SLOW_STEPS:
            self.number, self._slow, self._left = self.number + 1, 0, self._steps
            self._steps = min(2 * self._steps, self.STEPS[1])
            return
        self._left -= 1
        if self._left <= 0:
            self._left = self._steps
            if self.number:
                self.number -= 1
            else:
                self._steps = self.STEPS[0]


def on_live_threads(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a thread with working OpenMP threads. Returns: its result.

    OpenMP's threads do not survive os.fork(): in the child process, a thread that had used them would wait for them
    forever. A new thread gets new ones: a forked process calls the function in a new thread.
    """
    if os.getpid() == PROCESS_ID:
        return function(*arguments)
    with ThreadPoolExecutor(1, "qwen3fast-forked") as pool:
        return pool.submit(function, *arguments).result()


def checked_threads(threads: int | None) -> int | None:
    """Return a number of threads, or None.

    Raises: ValueError unless it is None, or an integer from 1 to the larger of 64 and four per CPU: OpenMP ends the
    process if the system refuses a thread.
    """
    if threads is None:
        return None
    return checked_integer("threads", threads, 1, max(64, 4 * (os.cpu_count() or 1)))


def num_cores(system: Path = SYSTEM) -> int:
    """Return the number of cores that this process may use, at least 1.

    They are limited by CPU affinity and the quotas of control groups, as containers set them. system: the folder where
    the kernel's files are mounted.
    """
    cores = len(usable_cores(system))
    return max(1, min(cores, _quota(system) or cores))


def usable_cores(system: Path = SYSTEM) -> list[frozenset[int]]:
    """Return the hardware threads of each core that CPU affinity allows; cores of one memory node are neighbors."""
    cores: dict[str, set[int]] = {}
    for cpu in usable_cpus():
        try:
            siblings = (_folder(cpu, system) / "topology/thread_siblings_list").read_text("ascii")
        except OSError:  # not Linux, or hidden
            siblings = str(cpu)
        cores.setdefault(siblings.strip(), set()).add(cpu)
    return sorted(map(frozenset, cores.values()), key=lambda core: (memory_node(min(core), system), min(core)))


def _folder(cpu: int, system: Path) -> Path:
    return system / f"devices/system/cpu/cpu{cpu}"


def memory_node(cpu: int, system: Path) -> int:
    """Return the number of a CPU's memory node (NUMA), 0 where it is not known."""
    return next((int(link.name.removeprefix("node")) for link in _folder(cpu, system).glob("node[0-9]*")), 0)


def usable_cpus() -> set[int]:
    """Return the numbers of the hardware threads that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quota(system: Path) -> int | None:
    """Return the smallest CPU quota of the process's control groups in CPUs, rounded up; None without one."""
    quotas = []
    for version, group in control_groups("cpu", system / "fs/cgroup"):
        files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            limit, period = (int(n) for file in files for n in (group / file).read_text("ascii").split())
        except (OSError, ValueError):  # no such folder, or no limit ("max")
            continue
        if limit > 0 and period > 0:  # version 1 has -1 for no limit
            quotas.append(-(-limit // period))
    return min(quotas, default=None)
