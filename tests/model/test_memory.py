"""Free memory: what the system has, and what control groups allow."""

import pytest
import torch

from qwen3fast.model import memory
from qwen3fast.model.memory import free_bytes

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Write files of a system: with `system(name=text)`, where names have folders."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")

    write({"meminfo": f"MemTotal: 9 kB\nMemAvailable:   {8 * GB // 1024} kB\nMemFree: 1 kB"})
    return write


def group(folder, limit, used, files):
    """A group of version 2; files: bytes of pages of files, which make room for others."""
    stat = f"anon 5\nactive_file {files // 2}\ninactive_file {files - files // 2}"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def old_group(folder, limit, used, files):
    """The same of version 1."""
    stat = f"active_file 1\ntotal_active_file {files}\ntotal_inactive_file 0"
    names = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"{folder}/memory.{name}": text for name, text in names.items()}


WHOLE = 8 * GB // 1024 * 1024
CASES = {
    "no groups": ({}, WHOLE),
    "a limit that slows down": (
        {"cgroup": "0::/a", **group("groups/a", "max", GB, 0), "groups/a/memory.high": 3 * GB},
        2 * GB,
    ),
    "a limit": ({"cgroup": "0::/a/b", **group("groups/a/b", 3 * GB, 2 * GB, GB // 2)}, 3 * GB // 2),
    "a limit above": ({"cgroup": "0::/a/b", **group("groups/a/b", "max", 0, 0), **group("groups/a", GB, 0, 0)}, GB),
    "a limit of all memory": ({"cgroup": "0::/a", **group("groups/a", 50 * GB, 0, 0)}, WHOLE),
    "more than the limit": ({"cgroup": "0::/a", **group("groups/a", GB, 2 * GB, 0)}, 0),
    "inside of a container": ({"cgroup": "0::/", **group("groups", GB, 0, 0)}, GB),
    "a hidden name": (group("groups", GB, 0, 0), GB),
    "a name outside of the container": ({"cgroup": "0::/../x", **group("groups", GB, 0, 0)}, GB),
    "version 1": ({"cgroup": "5:cpu:/\n4:memory:/a", **old_group("groups/memory/a", 2 * GB, GB, GB // 4)}, 5 * GB // 4),
    "version 1, without a limit": (
        {"cgroup": "4:memory:/a", **old_group("groups/memory/a", 2**63 - 4096, GB, 0)},
        WHOLE,
    ),
    "unreadable": ({"cgroup": "0::/a", **group("groups/a", "much", 0, 0)}, WHOLE),
}


@pytest.mark.parametrize("name", CASES)
def test_limits_of_control_groups_count(system, name):
    files, expected = CASES[name]
    system(files)
    assert free_bytes(CPU) == expected


def test_memory_that_the_allocator_keeps_for_new_tensors_counts_as_free(monkeypatch):
    """As after another Generator on the same GPU was closed."""
    for name, value in (("mem_get_info", (3, 100)), ("memory_reserved", 60), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda", 0)) == 3 + 60 - 20
