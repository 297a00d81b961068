"""The machine's own speed in the same hour: copying within the device's memory."""

from __future__ import annotations

import torch

from qwen3fast.bench.probes import median_rate

COPY_BYTES = {"cuda": 2**30, "cpu": 2**24}


class CopyProbe:
    """Measures a copy from one buffer of the device to another, much larger than its caches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        num_bytes = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
        self._from = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)

    def measure(self, repetitions: int = 3, copies: int = 10) -> float:
        """Return GB/s, bytes read and bytes written added up: the median of some runs."""

        def work() -> None:
            for _ in range(copies):
                self._to.copy_(self._from)

        return median_rate(work, 2 * copies * self._from.numel() / 1e9, repetitions, self._device)
