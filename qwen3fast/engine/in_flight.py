"""StepsInFlight: the results of launched steps on their way to the host, which may read them some steps later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen3fast.engine.state import Logprobs, LogprobState, StepKind


class StepResult(NamedTuple):
    """The token of each row of a step, and their log-probabilities, None unless the step was to compute them."""

    tokens: list[int]
    logprobs: list[Logprobs] | None


class StepsInFlight:
    """The tokens, and log-probabilities if computed, of steps that were launched and not collected."""

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        """Allocate. rows: of a step. slots: steps at the same time."""
        self._rows, self._slots, self._device = rows, slots, device
        self._kinds: deque[StepKind] = deque()
        self._tokens = TokenRing(rows, slots, device)
        self._logprobs: list[TokenRing] = []  # allocated when a request first needs them

    def __len__(self) -> int:
        return len(self._kinds)

    def push(self, kind: StepKind, output_B: Tensor, logprobs: LogprobState | None) -> None:
        """Queue copies of a step's tokens, (B,), and of the log-probabilities of its rows 0..B-1."""
        self._tokens.push(output_B)
        if logprobs is not None:
            tensors = (logprobs.chosen_R, logprobs.id_RN, logprobs.value_RN)
            if not self._logprobs:
                self._logprobs = [
                    TokenRing(self._rows, self._slots, self._device, width=tuple(t.shape[1:]), dtype=t.dtype)
                    for t in tensors
                ]
            for ring, tensor in zip(self._logprobs, tensors, strict=True):
                ring.push(tensor[: len(output_B)])
        self._kinds.append(kind)

    def pop(self) -> StepResult:
        """Wait for the oldest step and return its results; entries beyond its rows have no meaning."""
        tokens, kind = self._tokens.pop(), self._kinds.popleft()
        if not kind.has_logprobs:
            return StepResult(tokens, None)
        columns = [ring.pop() for ring in self._logprobs]
        return StepResult(tokens, [Logprobs(*row) for row in zip(*columns, strict=True)])

    def clear(self) -> None:
        """Discard all results, without waiting."""
        self._kinds.clear()
        for ring in (self._tokens, *self._logprobs):
            ring.clear()


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
