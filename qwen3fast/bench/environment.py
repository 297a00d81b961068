"""What a measurement ran on: machine, versions, commit, and the memory's measured read bandwidth."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qwen3fast._version import __version__

# Much more than caches hold; on a GPU so much that the launch and the wait are little beside it.
PROBE_BYTES = {"cpu": 2**29, "cuda": 2**32}


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Machine and versions, for the record of a run."""
    environment: dict[str, Any] = {
        "device": str(device),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": _cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} != set(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qwen3fast": __version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return environment


def describe_run(program: str = "python -m qwen3fast.bench") -> dict[str, Any]:
    """When and from which commit: UTC time, command, git commit and whether the tree was changed (None outside git).

    program: how the command begins; its options are those of this process.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([program, *sys.argv[1:]]),
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
    }


class BandwidthProbe:
    """Measures how fast the device reads memory, by summing a buffer much larger than its caches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        num_bytes = PROBE_BYTES.get(device.type, PROBE_BYTES["cpu"])
        self._buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
        self.samples: list[float] = []

    def measure(self, repetitions: int = 5) -> None:
        """Add samples in GB/s."""
        for _ in range(repetitions):
            synchronize(self._device)
            started = time.perf_counter()
            self._buffer.sum()
            synchronize(self._device)
            self.samples.append(self._buffer.nbytes / (time.perf_counter() - started) / 1e9)

    @property
    def gb_s(self) -> float:
        """Median of all samples, GB/s."""
        return median(self.samples)


class PeakMemory:
    """Peak memory since the last reset: of the device on CUDA, of the process elsewhere (where the system tells)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Not Linux, or not allowed: the peak is then that of the whole run.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int | None:
        """Bytes; None where it cannot be told."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
        except (OSError, StopIteration):
            return None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_info(field: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), None)


def _cpu_model() -> str:
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    family, model = _cpu_info("cpu family"), _cpu_info("model")
    # Virtual machines may tell no more of the name than its brand.
    return f"{name}, family {family} model {model}" if family and model else name


def _cpu_flags() -> set[str]:
    return set((_cpu_info("flags") or _cpu_info("Features") or "").split())
