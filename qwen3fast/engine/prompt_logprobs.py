"""Log-probabilities of a prompt's tokens, from the states that prefill computes.

Every position goes through the final norm and the output projection, a few at a time: the logits of a whole chunk of
Qwen3-0.6B would take 311 MB. The head runs uncompiled: a product of many rows leaves little to fuse, and no request
compiles anything.

    T tokens of a chunk   M of these at a time   E hidden_size   V vocabulary   N most likely tokens
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qwen3fast.engine.parts import Parts, run_logits
from qwen3fast.engine.staging import to_device
from qwen3fast.engine.state import Logprobs
from qwen3fast.sampling.processors import log_probabilities

MAX_LOGITS = 2**23  # computed at a time: 32 MiB in float32, and as much again for their log-probabilities


@dataclass(frozen=True)
class WantedLogprobs:
    """The log-probabilities that a prefill computes: of the prompt's tokens from index `first` (at least 1) on.

    top: how many of the most likely tokens to record beside each token of the prompt.
    """

    first: int
    top: int

    def after(self, start: int, size: int, num_tokens: int) -> range:
        """Return the positions among start .. start + size - 1 whose logits are needed.

        Position p gives the log-probability of token p + 1, so the prompt's last position is never among them.
        """
        return range(max(start, self.first - 1), min(start + size, num_tokens - 1))


def chunk_logprobs(parts: Parts, vocab_size: int, x_1TE: Tensor, targets: list[int], top: int) -> list[Logprobs]:
    """Return the log-probability of each target, and of the `top` most likely tokens, after the states x_1TE.

    targets: T token ids. The host waits for the device.
    """
    entries, rows = list[Logprobs](), max(1, MAX_LOGITS // vocab_size)
    for begin in range(0, len(targets), rows):
        some = targets[begin : begin + rows]
        logits_MV = run_logits(parts.head, x_1TE[:, begin : begin + len(some)])[0]
        columns = log_probabilities(logits_MV, to_device(some, x_1TE.device), min(top, vocab_size))
        entries += [Logprobs(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    return entries
