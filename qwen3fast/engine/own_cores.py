"""Ranks on the CPUs of one machine: each keeps to cores of its own, of one memory node (NUMA) where that is possible.

Linux puts memory on the node of the thread that first writes to it: weights and cache of a rank lie beside its cores.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from qwen3fast.engine.threads import SYSTEM, num_cores, usable_cores, usable_cpus
from qwen3fast.parallel import Ranks


def keep_to_own_cores(ranks: Ranks, system: Path = SYSTEM) -> None:
    """Bind this process to an equal share of the machine's cores, with a thread per core. All ranks call this together.

    Nothing changes where ranks have been bound differently already, where there are more of them than cores, or for an
    OMP_NUM_THREADS beyond a share; torchrun's own OMP_NUM_THREADS=1 does not count as a choice.
    system: as of `num_cores`.
    """
    own = (socket.gethostname(), sorted(usable_cpus()))
    every = ranks.collect(own)
    here = [rank for rank, (host, _) in enumerate(every) if host == own[0]]
    is_shared = all(every[rank] == own for rank in here)
    cores, count, index = usable_cores(system), len(here), here.index(ranks.rank)
    threads = _chosen_threads()
    if count == 1 or not is_shared or len(cores) // count < (threads or 1) or not hasattr(os, "sched_setaffinity"):
        return
    share = cores[len(cores) * index // count : len(cores) * (index + 1) // count]
    if threads is None:
        torch.set_num_threads(max(1, len(share) * num_cores(system) // len(cores)))  # a quota may allow fewer
    os.sched_setaffinity(0, frozenset().union(*share))


def _chosen_threads() -> int | None:
    """Return the user's OMP_NUM_THREADS."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    is_default_of_torchrun = value == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    return int(value) if value.isdigit() and not is_default_of_torchrun else None
