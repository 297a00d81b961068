"""PrefixTable: which replica has answered requests that begin alike, for routing to the one whose KV cache holds them.

Requests are compared as text, in blocks: a router need not tokenize, and a conversation's next turn begins with the text
of the turn before. Source: prefix-aware routing in SGLang's router and Ray Serve LLM.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Mapping

PROMPT_FIELDS = ("model", "system", "instructions", "tools", "prompt", "messages", "input")
BLOCK = 64  # bytes of a request's text
MAX_BLOCKS = 2**16  # remembered; the ones not seen for longest go first
MAX_AHEAD = 8  # running requests that a replica may have more than the least busy one


def blocks_of(body: bytes) -> list[bytes]:
    """Return a digest per whole block of a request's prompt; each covers the text from the beginning to its block.

    body: a JSON object of any endpoint. Other bodies, and short ones, have no blocks.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(fields, dict):
        return []
    given = [[name, fields[name]] for name in PROMPT_FIELDS if fields.get(name) is not None]
    text = json.dumps(given, ensure_ascii=False).encode("utf-8", "replace")
    digest, digests = hashlib.blake2b(digest_size=16), []
    for begin in range(0, len(text) - BLOCK + 1, BLOCK):
        digest.update(text[begin : begin + BLOCK])
        digests.append(digest.digest())
    return digests


class PrefixTable:
    """The latest blocks, and the replica that got each last."""

    def __init__(self, max_blocks: int = MAX_BLOCKS, max_ahead: int = MAX_AHEAD) -> None:
        """max_ahead: running requests that the chosen replica may have more than the least busy one."""
        self._max_blocks, self._max_ahead = max_blocks, max_ahead
        self._replicas: OrderedDict[bytes, str] = OrderedDict()

    def add(self, blocks: list[bytes], replica: str) -> None:
        """Note the replica that a request was sent to."""
        for block in reversed(blocks):  # the first block of all is the last to go
            self._replicas[block] = replica
            self._replicas.move_to_end(block)
        while len(self._replicas) > self._max_blocks:
            self._replicas.popitem(last=False)

    def choose(self, blocks: list[bytes], running: Mapping[str, int]) -> str | None:
        """Return the replica with the longest common prefix; None if there is none, or it is too busy.

        running: the number of running requests of each replica that may be chosen.
        """
        for block in reversed(blocks):
            replica = self._replicas.get(block)
            if replica in running:
                return replica if running[replica] <= min(running.values()) + self._max_ahead else None
        return None

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        for block in [block for block, replica in self._replicas.items() if replica not in replicas]:
            del self._replicas[block]
