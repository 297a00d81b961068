"""Weights and caches on several memory nodes (NUMA): a process that computes on all of them reads evenly from each.

Linux puts memory on the node of the thread that first writes to it. Ranks that keep to cores of one node (own_cores.py)
have all of theirs there: nothing is moved.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen3fast.checks import checked_variable
from qwen3fast.engine.threads import SYSTEM, memory_node, usable_cpus
from qwen3fast.kernels.cpu.huge_pages import HUGE_PAGE, whole_pages

logger = logging.getLogger(__name__)

VARIABLE = "QWEN3FAST_INTERLEAVE"
NUMBERS = {"x86_64": (237, 239), "aarch64": (235, 236)}  # of Linux's calls mbind and get_mempolicy
MPOL_DEFAULT, MPOL_PREFERRED, MPOL_INTERLEAVE, MPOL_MF_MOVE, MPOL_F_MEMS_ALLOWED = 0, 1, 3, 2, 4
UNKNOWN = (-1, 0)  # instead of a policy and its nodes
MAX_NODES = 1024


def interleave(tensors: Iterable[Tensor], is_wanted: Callable[[], bool] = lambda: True) -> int:
    """Have the system spread the memory of tensors evenly over the nodes of this process; contents and addresses stay.

    Addresses alternate between nodes every 2 MiB. Other threads may read and write the tensors meanwhile.
    Pages of files that `use_huge_pages` has not copied may stay on the node that the system read them to.
    Nothing happens on one node, where the user has chosen a policy of memory (numactl), on systems other than Linux,
    where the system refuses (as containers do), and with QWEN3FAST_INTERLEAVE=0.
    is_wanted: whether to go on, asked for each huge page.
    Returns: the number of bytes that the system was asked to spread.
    Raises: ValueError as `checked_variable`.
    """
    if checked_variable(VARIABLE) == "0" or sys.platform != "linux" or platform.machine() not in NUMBERS:
        return 0
    nodes, policy = usable_nodes(), _policy()
    if len(nodes) > 1 and policy == UNKNOWN:
        _log_refusal(nodes)
    if len(nodes) < 2 or policy != (MPOL_DEFAULT, 0):
        return 0
    storages = [x.untyped_storage() for x in tensors if x.device.type == "cpu"]  # in use until the end
    spread = 0
    for begin, end in whole_pages((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages):
        for page in range(begin, end, HUGE_PAGE):
            if not is_wanted():
                return spread
            # MPOL_INTERLEAVE moves no page that already lies on one of its nodes. It serves pages that are written
            # later, and keeps the system from moving these to other nodes again (NUMA balancing).
            is_moved = _bind(page, MPOL_PREFERRED, [nodes[page // HUGE_PAGE % len(nodes)]], MPOL_MF_MOVE)
            if not (_bind(page, MPOL_INTERLEAVE, nodes) and is_moved):
                _log_refusal(nodes)
                return spread
            spread += HUGE_PAGE
    logger.info("%.2f GB spread over memory nodes %s", spread / 1e9, nodes)
    return spread


def usable_nodes(system: Path = SYSTEM) -> list[int]:
    """Return the memory nodes of the CPUs that this process may run on, without nodes known to be closed to it.

    system: as of `num_cores`.
    """
    nodes, open_nodes = {memory_node(cpu, system) for cpu in usable_cpus()}, _policy(MPOL_F_MEMS_ALLOWED)
    return sorted(node for node in nodes if open_nodes == UNKNOWN or open_nodes[1] >> node & 1)


def _log_refusal(nodes: Sequence[int]) -> None:
    logger.info("memory is not spread over nodes %s: %s", nodes, os.strerror(ctypes.get_errno()))


def _policy(flags: int = 0) -> tuple[int, int]:
    """Return this thread's policy of memory and its nodes, as bits; UNKNOWN where the system does not tell.

    flags: MPOL_F_MEMS_ALLOWED asks for the nodes that are open to this process instead.
    """
    policy, mask = ctypes.c_int(), ctypes.create_string_buffer(MAX_NODES // 8)
    is_told = _call(NUMBERS[platform.machine()][1], ctypes.byref(policy), mask, MAX_NODES + 1, 0, flags)
    return (policy.value, int.from_bytes(mask.raw, "little")) if is_told else UNKNOWN


def _bind(page: int, policy: int, nodes: Sequence[int], flags: int = 0) -> bool:
    """Set the policy of a huge page's memory. Returns whether the system allowed it."""
    mask = sum({1 << node for node in nodes}).to_bytes(MAX_NODES // 8, "little")
    return _call(NUMBERS[platform.machine()][0], page, HUGE_PAGE, policy, mask, MAX_NODES + 1, flags)


def _call(*arguments: Any) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(*(ctypes.c_long(x) if isinstance(x, int) else x for x in arguments)) == 0)
