"""PrefixCache: records the tokens that slots of the KV cache hold, for prompts that begin with the same tokens.

Keys and values of a token depend only on the tokens up to it, and on the adapter that computed them: a common prefix
has the same ones in all requests with the same adapter (up to rounding, as chunks and steps of other sizes sum in other
orders).
Source: prefix caching in vLLM; RadixAttention, arXiv:2312.07104.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qwen3fast.engine.parts import CHUNK_SIZES
from qwen3fast.engine.prefill import usable_prefix
from qwen3fast.scheduling.request import Adapter, Request

MAX_HEADER = 64  # tokens that a chat template writes between the last turn and the reply


@dataclass
class CachedPrefix:
    """The contents of one slot without a request.

    tokens: whose keys and values it holds, from position 0.
    prompt_ids, logits_1V: the prompt of its last request and the logits after it, if the slot holds the whole prompt.
    turn_end: the number of tokens up to the end of the prompt's last turn, which a stop id ends; 0 without one.
    owner: its last request. used_at: a count of requests.
    unproven: number of tokens whose keys and values may be NaN: no valid token was computed from them.
    """

    tokens: list[int] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    logits_1V: Tensor | None = None
    turn_end: int = 0
    owner: Request | None = None
    used_at: int = 0
    unproven: int = 0


@dataclass(frozen=True)
class Plan:
    """The slot that a request gets.

    evicted: the slot whose contents are dropped; it changes places with `slot` first. source: the slot, as
    numbered before the swap, from which keys and values of the prompt's first `reused` tokens are then copied.
    logits_1V: the logits after the prompt, if the whole prompt is reused.
    """

    slot: int
    evicted: int
    source: int
    reused: int
    logits_1V: Tensor | None = None


class PrefixCache:
    """The contents of all slots. It plans copies and evictions; the scheduler carries them out."""

    def __init__(self, slots: int, allocated_len: int, multiple: int = 1, is_enabled: bool = True) -> None:
        """Begin with empty slots.

        allocated_len: positions per slot. multiple: reuse multiples of this number of tokens only. is_enabled: False
        never reuses anything.
        """
        self._slots = [CachedPrefix() for _ in range(slots)]
        self._allocated_len, self._multiple, self._is_enabled = allocated_len, multiple, is_enabled
        self._clock = 0

    def plan(
        self,
        prompt_ids: list[int],
        active: Mapping[int, Request],
        continues: Request | None = None,
        most_reused: int | None = None,
        adapter: Adapter | None = None,
    ) -> Plan:
        """Return a free slot for a prompt: the lowest one.

        Of the free slots' contents, the least recently used are evicted. Contents are taken over instead of copied if
        the prompt continues them (`continues`), contains them completely, or contains their last turn and more: chat
        templates write an earlier reply without its reasoning, and the rest of the slot is of no further use.
        most_reused: tokens of the prompt that may be reused; None for all.
        adapter: of the prompt; None for the base model.
        """
        most = len(prompt_ids) if most_reused is None else most_reused
        free = [slot for slot in range(len(self._slots)) if slot not in active]
        source, reused, logits_1V = free[0], 0, None
        if self._is_enabled:
            source, reused, logits_1V = self._longest(prompt_ids, active, most, adapter)
        evicted = min(free, key=lambda slot: (bool(self._slots[slot].tokens), self._slots[slot].used_at))
        if reused and source in free:
            cached = self._slots[source]
            is_next_turn = 0 < cached.turn_end < reused + self._multiple and len(prompt_ids) > len(cached.prompt_ids)
            if reused == len(cached.tokens) or is_next_turn or (continues is not None and cached.owner is continues):
                evicted = source
        return Plan(free[0], evicted, source, reused, logits_1V)

    def is_coming(
        self, prompt_ids: list[int], active: Mapping[int, Request], most_reused: int, adapter: Adapter | None
    ) -> bool:
        """Return whether prompts that are being computed will hold more of this one than the slots do now.

        Only a difference of the smallest chunk or more counts, or one that leaves the last token alone to compute.
        Arguments are as in `plan`.
        """
        others = [r.prompt_ids for r in active.values() if r.prefill is not None and r.adapter is adapter]
        if not self._is_enabled or not others:
            return False
        most, last = min(most_reused, len(prompt_ids)), len(prompt_ids) - 1
        coming = max(min(most, common_prefix(prompt_ids, other)) for other in others)
        if coming < min(CHUNK_SIZES[0], last):
            return False
        reused = self._longest(prompt_ids, active, most, adapter)[1]
        return coming > reused and coming - reused >= min(CHUNK_SIZES[0], last - reused)

    def _longest(
        self, prompt_ids: list[int], active: Mapping[int, Request], most: int, adapter: Adapter | None
    ) -> tuple[int, int, Tensor | None]:
        """Return the slot with the longest common prefix, the number of tokens to reuse, and logits if all are."""
        source, shared = 0, 0
        for slot in range(len(self._slots)):
            holder = active[slot] if slot in active else self._slots[slot].owner
            if holder is not None and holder.adapter is not adapter:
                continue
            length = min(most, common_prefix(prompt_ids, self.tokens(slot, active)))
            if length == len(prompt_ids):
                logits_1V = self._logits(slot, prompt_ids, active)
                if logits_1V is not None:
                    return slot, length, logits_1V
            if length > shared:
                source, shared = slot, length
        return source, usable_prefix(shared, len(prompt_ids), self._allocated_len, self._multiple), None

    def _logits(self, slot: int, prompt_ids: list[int], active: Mapping[int, Request]) -> Tensor | None:
        if slot in active:
            return active[slot].prompt_logits_1V if active[slot].prompt_ids == prompt_ids else None
        return self._slots[slot].logits_1V if self._slots[slot].prompt_ids == prompt_ids else None

    def tokens(self, slot: int, active: Mapping[int, Request]) -> list[int]:
        """Return the tokens whose keys and values a slot holds, from position 0."""
        return active[slot].cached_ids if slot in active else self._slots[slot].tokens

    def keep(self, slot: int, request: Request) -> None:
        """Record the contents of a slot whose request has ended."""
        self._clock += 1
        tokens = request.cached_ids if self._is_enabled and request.error is None else []
        is_whole = len(tokens) >= len(request.prompt_ids)
        logits_1V = request.prompt_logits_1V if is_whole else None
        unproven = len(request.cached_ids) if not request.proven_ids and request.error is None else 0
        turn_end = _turn_end(request)
        self._slots[slot] = CachedPrefix(
            tokens, request.prompt_ids, logits_1V, turn_end, request, self._clock, unproven
        )
        request.prompt_logits_1V = request.prefill = request.continues = None  # free memory early

    def take(self, slot: int) -> int:
        """Record that a slot was given to a request. Returns: `CachedPrefix.unproven` of its old contents."""
        cached, self._slots[slot] = self._slots[slot], CachedPrefix()
        return cached.unproven

    def swap(self, slot: int, other: int) -> None:
        """Record that the contents of two slots were exchanged."""
        self._slots[slot], self._slots[other] = self._slots[other], self._slots[slot]

    def forget_all(self) -> None:
        """Forget the contents of all slots."""
        self._slots = [CachedPrefix() for _ in self._slots]


def _turn_end(request: Request) -> int:
    ids = request.prompt_ids
    ends = (n for n in range(len(ids), max(0, len(ids) - MAX_HEADER), -1) if ids[n - 1] in request.stop_ids)
    return next(ends, 0)


def common_prefix(ids: list[int], others: list[int]) -> int:
    """Return the length of the common prefix of two lists, by bisection (comparing slices runs in C)."""
    low, high = 0, min(len(ids), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if ids[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
