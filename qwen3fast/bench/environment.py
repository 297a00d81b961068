"""The machine, the versions and the commit of a measurement."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from qwen3fast._version import __version__
from qwen3fast.kernels.cpu.levels import cpu_info, processor_features

# Instruction sets that inference uses.
NOTED_FLAGS = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 "
    "asimd asimddp i8mm bf16 sve sve2"
).split()


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return machine and versions, for the record of a run."""
    environment: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_flags": [flag for flag in NOTED_FLAGS if flag in cpu_flags()],
        "cpu_caches": _cpu_caches(),
        "memory_bytes": _memory_bytes(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} != set(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qwen3fast": __version__,
    }
    if level := os.environ.get("QWEN3FAST_CPU_LEVEL"):
        environment["cpu_level"] = level
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        environment["gpu_driver"] = _gpu_driver()
    return environment


def describe_run(program: str = "python -m qwen3fast.bench") -> dict[str, Any]:
    """Return UTC time, command, git commit and whether there were uncommitted changes (None outside of git).

    program: the beginning of the command, to which this process's arguments are added.
    """
    commit = git("rev-parse", "HEAD")
    return {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([program, *map(shlex.quote, sys.argv[1:])]),
        "git_commit": commit,
        "git_dirty": bool(git("status", "--porcelain")) if commit else None,
    }


def git(*arguments: str, folder: Path = Path(__file__).parent) -> str | None:
    """Return git's output in a folder; None if it fails, as outside of a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    name = cpu_info("model name") or platform.processor() or platform.machine()
    family, model = cpu_info("cpu family"), cpu_info("model")
    # The name may be no more than a brand in virtual machines.
    return f"{name}, family {family} model {model}" if family and model else name


def cpu_flags() -> set[str]:
    """Return the instruction sets of the processor, in Linux's names; empty elsewhere."""
    return set(processor_features().split())


def _cpu_caches(cpu: Path = Path("/sys/devices/system/cpu/cpu0")) -> dict[str, str]:
    """Return the sizes of the first processor's caches on Linux: {"L1d": "32K", "L2": "1024K"}; empty elsewhere."""
    caches = {}
    for folder in sorted((cpu / "cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        caches[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return caches


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu_driver() -> str | None:
    """Return the version of NVIDIA's driver on Linux."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return None
