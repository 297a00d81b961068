"""The cores of ranks that share a machine's CPUs."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch

from qwen3fast.engine import own_cores, threads
from qwen3fast.engine.own_cores import keep_to_own_cores
from qwen3fast.engine.threads import usable_cores

HOST = socket.gethostname()
ALL = list(range(8))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Four cores of two hardware threads, n and n + 4; cores 0 and 2 at memory node 1, cores 1 and 3 at node 0."""
    for cpu in ALL:
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology/thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n", "ascii")
        (folder / f"node{1 - cpu % 2}").mkdir()
    use_cpus(monkeypatch, ALL)
    return tmp_path


@pytest.fixture
def bound(monkeypatch):
    """What the process was bound to, and its number of threads; 3 at first."""
    seen = SimpleNamespace(cpus=None, threads=3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: setattr(seen, "cpus", sorted(cpus)))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(seen, "threads", number))
    return seen


def use_cpus(monkeypatch, cpus):
    for module in (threads, own_cores):
        monkeypatch.setattr(module, "usable_cpus", lambda: set(cpus))


def rank_of(rank, every):
    """Ranks whose host and CPUs are given."""

    def collect(message):
        assert message == every[rank]
        return every

    return SimpleNamespace(rank=rank, collect=collect)


def test_cores_of_one_node_are_neighbors(machine):
    assert usable_cores(machine) == [{1, 5}, {3, 7}, {0, 4}, {2, 6}]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(2, [[1, 3, 5, 7], [0, 2, 4, 6]]), (4, [[1, 5], [3, 7], [0, 4], [2, 6]]), (3, [[1, 5], [3, 7], [0, 2, 4, 6]])],
)
def test_ranks_take_whole_cores_node_by_node(size, expected, machine, bound):
    for rank, cpus in enumerate(expected):
        keep_to_own_cores(rank_of(rank, [(HOST, ALL)] * size), machine)
        assert (bound.cpus, bound.threads) == (cpus, len(cpus) // 2)


def test_only_ranks_of_the_same_machine_share(machine, bound):
    every = [("elsewhere", ALL), (HOST, ALL), ("elsewhere", ALL), (HOST, ALL)]
    keep_to_own_cores(rank_of(3, every), machine)
    assert bound.cpus == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "every",
    [
        [(HOST, ALL)],
        [("elsewhere", ALL), (HOST, ALL)],
        [(HOST, [0, 1, 2, 3]), (HOST, ALL)],  # bound by somebody else
        [(HOST, ALL)] * 5,
    ],
    ids=["one", "one per machine", "bound already", "more than cores"],
)
def test_other_ranks_stay_where_they_are(every, machine, bound):
    keep_to_own_cores(rank_of(len(every) - 1, every), machine)
    assert (bound.cpus, bound.threads) == (None, 3)


@pytest.mark.parametrize(
    ("chosen", "by_torchrun", "expected"),
    [
        ("1", True, ([1, 3, 5, 7], 2)),
        ("1", False, ([1, 3, 5, 7], 3)),
        ("2", True, ([1, 3, 5, 7], 3)),
        ("3", True, (None, 3)),
    ],
)
def test_a_chosen_number_of_threads_is_kept(chosen, by_torchrun, expected, machine, bound, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    keep_to_own_cores(rank_of(0, [(HOST, ALL)] * 2), machine)
    assert (bound.cpus, bound.threads) == expected


def test_a_quota_of_processor_time_is_shared(machine, bound):
    (machine / "fs/cgroup").mkdir(parents=True)
    (machine / "fs/cgroup/cpu.max").write_text("200000 100000\n", "ascii")
    keep_to_own_cores(rank_of(0, [(HOST, ALL)] * 2), machine)
    assert bound.threads == 1
