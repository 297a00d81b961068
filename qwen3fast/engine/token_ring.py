"""TokenRing: copies of sampled tokens from the device to the host, which may read them some steps later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TokenRing:
    """A ring of buffers for the tokens of launched steps, oldest first.

    On CUDA, a buffer is pinned memory, filled by a copy that is queued after its step: the host continues to launch,
    and waits only when it reads a step's tokens, for that step. On other devices, a copy is done when it returns.
    """

    def __init__(
        self,
        rows: int,
        num_slots: int,
        device: torch.device,
        make_event: Callable[[], Any] | None = None,
        width: tuple[int, ...] = (),
        dtype: torch.dtype = torch.int64,
    ) -> None:
        """Allocate. width, dtype: of a row's numbers; a token is one int64.

        make_event: makes objects like `torch.cuda.Event`; None means this on CUDA devices, and no events on others.
        """
        is_cuda = device.type == "cuda"
        if make_event is None and is_cuda:
            make_event = torch.cuda.Event
        self._slots = torch.zeros(num_slots, rows, *width, dtype=dtype, device="cpu", pin_memory=is_cuda)
        self._events = [make_event() for _ in range(num_slots)] if make_event is not None else None
        self._oldest = self._count = 0

    def push(self, token_B: Tensor) -> None:
        """Queue a copy of a step's tokens, (B, *width) on the device, B up to `rows`."""
        assert self._count < len(self._slots), "take the oldest tokens first"
        slot = (self._oldest + self._count) % len(self._slots)
        self._slots[slot, : len(token_B)].copy_(token_B, non_blocking=True)
        if self._events is not None:
            self._events[slot].record()
        self._count += 1

    def pop(self) -> list[Any]:
        """Wait for the oldest step's tokens and return them; rows outside that step contain older numbers."""
        assert self._count > 0, "no step is under way"
        if self._events is not None:
            self._events[self._oldest].synchronize()
        tokens = self._slots[self._oldest].tolist()
        self._oldest = (self._oldest + 1) % len(self._slots)
        self._count -= 1
        return tokens

    def clear(self) -> None:
        """Discard all unread tokens, without waiting: copies into a buffer stay in order."""
        self._oldest = (self._oldest + self._count) % len(self._slots)
        self._count = 0

    def __len__(self) -> int:
        return self._count
