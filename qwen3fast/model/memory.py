"""The memory that a device has left, and the control groups that limit this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on the device; None if the system does not report them.

    On Linux, the limits of the process's control groups count, as containers set them.
    """
    if device.type == "cuda":
        # PyTorch's allocator keeps what tensors no longer use, and gives it to new ones.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    try:
        available = _field(MEMINFO, "MemAvailable:") * 1024
    except (OSError, StopIteration):
        try:
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    return min((available, *_left_in_groups()))


def control_groups(controller: str, mounts: Path | None = None) -> Iterator[tuple[int, Path]]:
    """Yield version and folder of each control group of Linux that this process is in, the innermost first.

    controller: "memory" or "cpu". mounts: the folder where groups are mounted.
    """
    mounts = mounts or GROUPS
    try:
        lines = [line.split(":", 2) for line in GROUP.read_text(errors="replace").splitlines()]
    except OSError:  # hidden: a container's own group is the root
        lines = [["0", "", "/"]]
    for number, controllers, name in lines:
        if number != "0" and controller not in controllers.split(","):
            continue
        version, root = (2, mounts) if number == "0" else (1, mounts / controller)
        # Inside of a container, the name may be of a folder outside; the container's own is the root then.
        for group in (folder := root / name.strip("/"), *folder.parents[: len(folder.parts) - len(root.parts)]):
            yield version, group


def _left_in_groups() -> list[int]:
    """Return the free bytes of each control group of the process; pages of files in memory make room."""
    left = []
    for version, group in control_groups("memory"):
        limits = ("max", "high") if version == 2 else ("limit_in_bytes",)
        used, total = ("current", "") if version == 2 else ("usage_in_bytes", "total_")
        for limit in limits:
            try:
                states = (f"{total}{state}_file" for state in ("active", "inactive"))
                files = sum(_field(group / "memory.stat", state) for state in states)
                most, now = (int((group / f"memory.{file}").read_text()) for file in (limit, used))
            except (OSError, StopIteration, ValueError):  # no such folder, or no limit ("max")
                continue
            left.append(max(0, most - now + files))
    return left


def _field(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [name])
