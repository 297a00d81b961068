"""PrefixTable: routes requests to the replica whose KV cache holds their beginning.

Requests are compared as text, in blocks: a router need not tokenize. A conversation's next turn begins with the text
of the turn before. Source: prefix-aware routing in SGLang's router and Ray Serve LLM.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
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
        self._num_blocks: Counter[str] = Counter()  # by replica

    def add(self, blocks: list[bytes], replica: str) -> None:
        """Note the replica that a request was sent to."""
        for block in reversed(blocks):  # the first block of all is the last to go
            self._forget(block)
            self._replicas[block] = replica
        self._num_blocks[replica] += len(blocks)
        while len(self._replicas) > self._max_blocks:
            self._forget(next(iter(self._replicas)))

    def choose(self, blocks: list[bytes], running: Mapping[str, int]) -> str:
        """Return the replica with the longest common prefix, if it is not too busy.

        Otherwise the least busy one; of several, the one with the fewest blocks, whose KV cache has most room.
        running: the number of running requests of each replica that may be chosen, at least one.
        """
        for block in reversed(blocks):
            replica = self._replicas.get(block)
            if replica is not None and replica in running:
                if running[replica] > min(running.values()) + self._max_ahead:
                    break
                return replica
        return min(running, key=lambda replica: (running[replica], self._num_blocks[replica]))

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all replicas but these."""
        if self._num_blocks.keys() <= set(replicas):
            return
        for block in [block for block, replica in self._replicas.items() if replica not in replicas]:
            self._forget(block)

    def _forget(self, block: bytes) -> None:
        replica = self._replicas.pop(block, None)
        if replica is not None:
            self._num_blocks[replica] -= 1
            if not self._num_blocks[replica]:
                del self._num_blocks[replica]
