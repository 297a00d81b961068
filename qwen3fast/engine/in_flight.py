"""StepsInFlight: the results of launched steps on their way to the host, oldest first."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.engine.state import Logprobs, LogprobState, StepKind
from qwen3fast.engine.token_ring import TokenRing


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
