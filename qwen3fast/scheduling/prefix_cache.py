"""PrefixCache: what each row of the cache still holds, so that a prompt that begins alike takes it over or copies it.

Keys and values of a token depend on the tokens before it alone, so those of a common prefix are the same, computed by
whichever request. (The same numbers up to rounding: chunks and steps of other sizes sum in other orders.)
Source of the idea: prefix caching in vLLM and RadixAttention, arXiv:2312.07104.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qwen3fast.engine.prefill import usable_prefix
from qwen3fast.scheduling.request import Request


@dataclass
class Kept:
    """One row without a request. prompt_ids, logits_1V: of its last request, if its prompt is here whole.

    unproven: so many of the tokens' keys and values may be NaN, as no token has come of them yet.
    """

    tokens: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    logits_1V: Tensor | None = None
    owner: Request | None = None
    used_at: int = 0  # a count of requests
    unproven: int = 0


@dataclass(frozen=True)
class Plan:
    """Where a request goes: `row`, which is first to be exchanged with row `given_up`; then the first `reused` tokens
    of its prompt are to come from row `source`. logits_1V: those after the prompt, if all of it is reused.
    """

    row: int
    given_up: int
    source: int
    reused: int
    logits_1V: Tensor | None = None


class PrefixCache:
    """Bookkeeping alone: it says what to copy, and the scheduler has it copied."""

    def __init__(self, rows: int, allocated_len: int, multiple: int = 1, is_enabled: bool = True) -> None:
        """allocated_len: positions of a row. multiple: of what the reused tokens' number must be one. is_enabled: False
        never reuses anything."""
        self._rows = [Kept() for _ in range(rows)]
        self._allocated_len, self._multiple, self._is_enabled = allocated_len, multiple, is_enabled
        self._clock = 0

    def plan(self, prompt_ids: list[int], active: Mapping[int, Request], continues: Request | None = None) -> Plan:
        """A free row for a prompt: the lowest one, since steps run all rows up to the last in use.

        What is given up for it is the least recently used of what free rows hold, wherever it lies. But what the prompt
        goes on from, or would lose nothing of, it takes over.
        """
        free = [row for row in range(len(self._rows)) if row not in active]
        source, reused, logits_1V = self._longest(prompt_ids, active) if self._is_enabled else (free[0], 0, None)
        given_up = min(free, key=lambda row: (bool(self._rows[row].tokens), self._rows[row].used_at))
        if reused and source in free:
            kept = self._rows[source]
            if reused == len(kept.tokens) or (continues is not None and kept.owner is continues):
                given_up = source
        return Plan(free[0], given_up, source, reused, logits_1V)

    def _longest(self, prompt_ids: list[int], active: Mapping[int, Request]) -> tuple[int, int, Tensor | None]:
        """The row that shares most with a prompt, how many tokens of it can be reused, logits if that is all."""
        source, shared = 0, -1
        for row in range(len(self._rows)):
            length = common_prefix(prompt_ids, self.tokens(row, active))
            if length == len(prompt_ids):
                logits_1V = self._logits(row, prompt_ids, active)
                if logits_1V is not None:
                    return row, length, logits_1V
            if length > shared:
                source, shared = row, length
        return source, usable_prefix(shared, len(prompt_ids), self._allocated_len, self._multiple), None

    def _logits(self, row: int, prompt_ids: list[int], active: Mapping[int, Request]) -> Tensor | None:
        if row in active:
            return active[row].prompt_logits_1V if active[row].prompt_ids == prompt_ids else None
        return self._rows[row].logits_1V if self._rows[row].prompt_ids == prompt_ids else None

    def tokens(self, row: int, active: Mapping[int, Request]) -> list[int]:
        """Tokens whose keys and values a row holds, from position 0."""
        return active[row].cached_ids if row in active else self._rows[row].tokens

    def keep(self, row: int, request: Request) -> None:
        """A request has left its row."""
        self._clock += 1
        tokens = request.cached_ids if self._is_enabled and request.error is None else []
        is_whole = len(tokens) >= len(request.prompt_ids)
        logits_1V = request.prompt_logits_1V if is_whole else None
        unproven = len(request.cached_ids) if not request.proven_ids and request.error is None else 0
        self._rows[row] = Kept(tokens, request.prompt_ids, logits_1V, request, self._clock, unproven)
        request.prompt_logits_1V = request.prefill = request.continues = None  # nothing is held longer than needed

    def take(self, row: int) -> int:
        """A request has been given a row; what it held is the request's now, or gone. Returns: `Kept.unproven`."""
        kept, self._rows[row] = self._rows[row], Kept()
        return kept.unproven

    def swap(self, row: int, other: int) -> None:
        """Two rows' contents have been exchanged."""
        self._rows[row], self._rows[other] = self._rows[other], self._rows[row]

    def forget_all(self) -> None:
        """What rows hold cannot be trusted."""
        self._rows = [Kept() for _ in self._rows]


def common_prefix(ids: list[int], others: list[int]) -> int:
    """How many tokens two lists begin with alike. By halves: slices are compared at the speed of C."""
    low, high = 0, min(len(ids), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
