"""What is read from the machine beside a measurement: memory bandwidth, matrix product rate, peak memory, energy."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

# Much more than caches hold; on a GPU so much that the launch and the wait are little beside it.
PROBE_BYTES = {"cpu": 2**29, "cuda": 2**32}


class BandwidthProbe:
    """Measures how fast the device reads memory, by summing a buffer much larger than its caches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        num_bytes = PROBE_BYTES.get(device.type, PROBE_BYTES["cpu"])
        self._buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)

    def measure(self, repetitions: int = 2) -> float:
        """GB/s, the median of some runs."""
        rates = []
        for _ in range(repetitions):
            synchronize(self._device)
            started = time.perf_counter()
            self._buffer.sum()
            synchronize(self._device)
            rates.append(self._buffer.nbytes / (time.perf_counter() - started) / 1e9)
        return median(rates)


class GemmProbe:
    """Measures the rate of the library's bfloat16 matrix product: the yardstick of prefill.

    (512, 1024) by (1024, 3072) on a CPU, which is a chunk of prefill in Qwen3-0.6B; 4096 cubed on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        m, k, n = (512, 1024, 3072) if device.type == "cpu" else (4096, 4096, 4096)
        self._device = device
        self._x = torch.randn(m, k, device=device).bfloat16()
        self._weight = torch.randn(n, k, device=device).bfloat16()

    def measure(self, repetitions: int = 3) -> float:
        """FLOP/s, the median of some runs."""
        rates = []
        for _ in range(repetitions):
            synchronize(self._device)
            started = time.perf_counter()
            for _ in range(8):
                F.linear(self._x, self._weight)
            synchronize(self._device)
            rates.append(8 * 2 * self._x.numel() * self._weight.shape[0] / (time.perf_counter() - started))
        return median(rates)


class EnergyMeter:
    """Energy that the processor's packages use, as Linux's powercap counts it (RAPL); where it may be read."""

    def __init__(self, folder: Path = Path("/sys/class/powercap")) -> None:
        self._zones = [
            zone
            for zone in sorted(folder.glob("intel-rapl:?"))
            if self._is_package(zone) and self._read(zone, "energy_uj") is not None
        ]
        self._started: list[int | None] = []

    def start(self) -> None:
        """Begin to count."""
        self._started = [self._read(zone, "energy_uj") for zone in self._zones]

    def joules(self) -> float | None:
        """Since `start`; None where the machine does not tell."""
        if not self._zones:
            return None
        total = 0.0
        for zone, before in zip(self._zones, self._started, strict=True):
            now = self._read(zone, "energy_uj")
            if now is None or before is None:
                return None
            if now < before:  # the counter started anew at the end of its range
                if (whole := self._read(zone, "max_energy_range_uj")) is None:
                    return None
                now += whole
            total += now - before
        return total / 1e6

    @staticmethod
    def _is_package(zone: Path) -> bool:
        # The zone "psys", the whole platform, counts the packages again.
        try:
            return (zone / "name").read_text().startswith("package")
        except OSError:
            return False

    @staticmethod
    def _read(zone: Path, name: str) -> int | None:
        try:
            return int((zone / name).read_text())
        except (OSError, ValueError):
            return None


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
