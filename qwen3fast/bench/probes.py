"""Probes of the machine beside a measurement: memory bandwidth, matrix product rate, peak memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

# Much larger than the caches; on a GPU large enough to make launching and waiting negligible.
PROBE_BYTES = {"cpu": 2**29, "cuda": 2**32}


class BandwidthProbe:
    """A probe of the device's read bandwidth, by the sum of a buffer much larger than its caches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        num_bytes = PROBE_BYTES.get(device.type, PROBE_BYTES["cpu"])
        self._buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)

    def measure(self, repetitions: int = 2) -> float:
        """Return GB/s, the median of some runs."""
        return median_rate(self._buffer.sum, self._buffer.nbytes / 1e9, repetitions, self._device)


class GemmProbe:
    """A probe of the rate of PyTorch's bfloat16 matrix product, the yardstick of prefill.

    (512, 1024) by (1024, 3072) on a CPU, as in a chunk of Qwen3-0.6B's prefill; 4096 cubed on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        m, k, n = (512, 1024, 3072) if device.type == "cpu" else (4096, 4096, 4096)
        self._device = device
        self._x = torch.randn(m, k, device=device).bfloat16()
        self._weight = torch.randn(n, k, device=device).bfloat16()

    def measure(self, repetitions: int = 3) -> float:
        """Return FLOP/s, the median of some runs."""

        def products() -> None:
            for _ in range(8):
                F.linear(self._x, self._weight)

        flop = 8 * 2 * self._x.numel() * self._weight.shape[0]
        return median_rate(products, flop, repetitions, self._device)


class PeakMemory:
    """Peak memory since the last reset: of the device on CUDA, of the process elsewhere, if the system reports it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Begin a new peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # Not Linux, or not allowed: the peak is then of the whole run.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def peak_bytes(self) -> int | None:
        """Return the bytes; None if they are unknown."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
        except (OSError, StopIteration):
            return None


def median_rate(work: Callable[[], object], amount: float, repetitions: int, device: torch.device) -> float:
    """Return the amount of work that a device does per second, the median of some runs. amount: of one run."""
    rates = []
    for _ in range(repetitions):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        rates.append(amount / (time.perf_counter() - started))
    return median(rates)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
