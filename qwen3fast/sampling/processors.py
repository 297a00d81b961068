"""Penalties, biases and masks, applied to logits before sampling; and log-probabilities of tokens.

Each row has its own parameters. Neutral ones leave its logits unchanged, bit for bit: a request's tokens do not depend
on the requests beside it. Rule of this file: plain tensor operations, no `.item()`, no shape that depends on data.

    B rows   V vocabulary   N most likely tokens   W words of 32 bits, ceil(V / 32)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # tokens whose largest logit is found first, to find the most likely ones


class ProcessorRows(NamedTuple):
    """Parameters and token counts of B rows.

    Attributes:
        repetition_penalty_B, presence_penalty_B, frequency_penalty_B: float32; the neutral values are 1, 0 and 0.
        in_prompt_BV: bool, True for tokens of the prompt.
        count_BV: int32, the number of times that the reply contains the token.
        bias_BV: float32, added to the logits; -inf forbids the token.
        allowed_BW: int32 bitmask; bit v % 32 of word v // 32 allows token v. Neutral is -1, all bits.
    """

    repetition_penalty_B: Tensor
    presence_penalty_B: Tensor
    frequency_penalty_B: Tensor
    in_prompt_BV: Tensor
    count_BV: Tensor
    bias_BV: Tensor
    allowed_BW: Tensor

    @classmethod
    def neutral(cls, rows: int, vocab_size: int, device: torch.device) -> ProcessorRows:
        """Allocate buffers for `rows` rows, with neutral parameters."""
        return cls(
            torch.ones(rows, dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.float32, device=device),
            torch.zeros(rows, dtype=torch.float32, device=device),
            torch.zeros(rows, vocab_size, dtype=torch.bool, device=device),
            torch.zeros(rows, vocab_size, dtype=torch.int32, device=device),
            torch.zeros(rows, vocab_size, dtype=torch.float32, device=device),
            torch.full((rows, num_words(vocab_size)), -1, dtype=torch.int32, device=device),
        )


def process_logits(logits_BV: Tensor, rows: ProcessorRows) -> Tensor:
    """Return the logits to sample from, (B, V) float32.

    In the order of transformers: repetition penalty, presence and frequency penalties, bias, mask. NaN stays NaN,
    also for forbidden tokens, and +inf stays +inf or becomes NaN: either way the sampler detects invalid logits.
    Source of the repetition penalty: CTRL, arXiv:1909.05858, section 4.1; of the other two: OpenAI's API reference.
    """
    x_BV = logits_BV.float()
    penalty_B1 = rows.repetition_penalty_B[:, None]
    penalized_BV = torch.where(x_BV < 0, x_BV * penalty_B1, x_BV / penalty_B1)
    # x / 1 is x, but a GPU's fast division may return another number.
    is_penalized_BV = (rows.in_prompt_BV | (rows.count_BV > 0)) & (penalty_B1 != 1)
    x_BV = torch.where(is_penalized_BV, penalized_BV, x_BV)
    presence_BV = rows.presence_penalty_B[:, None] * (rows.count_BV > 0)
    frequency_BV = rows.frequency_penalty_B[:, None] * rows.count_BV
    x_BV = x_BV - (presence_BV + frequency_BV)
    # Adding a bias of 0 would turn -0 into +0.
    x_BV = torch.where(rows.bias_BV == 0, x_BV, x_BV + rows.bias_BV)
    # A constant -inf would hide a NaN.
    return torch.where(_unpack(rows.allowed_BW, x_BV.shape[-1]), x_BV, x_BV - math.inf)


def num_words(vocab_size: int) -> int:
    """Return the number of 32-bit words in a bitmask over the vocabulary."""
    return -(-vocab_size // 32)


def _unpack(mask_BW: Tensor, vocab_size: int) -> Tensor:
    """Return the bits of a bitmask, (B, V) bool."""
    bit_32 = torch.arange(32, dtype=torch.int32, device=mask_BW.device)
    return (((mask_BW[:, :, None] >> bit_32) & 1) != 0).flatten(1)[:, :vocab_size]


def count_token(count_BV: Tensor, token_B: Tensor, advance_B: Tensor) -> None:
    """Add advance_B (int64, 0 or 1) to the count of each row's token, in place.

    count_BV: int32, possibly a slice of a larger buffer. token_B: int64; -1 is not counted.
    """
    increment_B = torch.where(token_B >= 0, advance_B, 0).to(count_BV.dtype)
    # A row has one place: scatter_add_ would add to it atomically, and for scatter_ Inductor copies all counts.
    row_B = torch.arange(count_BV.shape[0], device=count_BV.device)
    count_BV[row_B, token_B.clamp(min=0)] += increment_B


def log_probabilities(logits_BV: Tensor, token_B: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities of the chosen and the n most likely tokens, from unprocessed logits.

    token_B: int64, the chosen tokens. n: at most V.
    Returns: log-probabilities of the chosen tokens, (B,) float32 (0 for token -1); ids of the most likely tokens,
    (B, N) int64, in descending order; their log-probabilities, (B, N) float32. Of equal logits, CPUs take the first.
    """
    logits_BV = logits_BV.float()
    logprob_BV = logits_BV.log_softmax(dim=-1)
    chosen_B1 = logprob_BV.gather(1, token_B.clamp(min=0)[:, None])
    chosen_B = torch.where(token_B >= 0, chosen_B1.squeeze(1), 0.0)
    if n == 0:  # some backends do not support topk with k = 0
        empty_B0 = logprob_BV[:, :0]
        return chosen_B, empty_B0.long(), empty_B0.clone()
    ids_BN = _largest(logits_BV, n)
    return chosen_B, ids_BN, logprob_BV.gather(1, ids_BN)


def _largest(x_BV: Tensor, n: int) -> Tensor:
    """Return the indices of the n largest numbers of each row, in descending order; on CPUs, of equal ones the first.

    On CPUs, they are found in the n blocks with the largest maxima, which is faster than topk.
    """
    if x_BV.device.type != "cpu":
        return x_BV.topk(n, dim=-1).indices
    if n * BLOCK >= x_BV.shape[1]:
        return _first_largest(x_BV, n)
    missing = -x_BV.shape[1] % BLOCK
    x_BKS = (F.pad(x_BV, (0, missing), value=-math.inf) if missing else x_BV).unflatten(1, (-1, BLOCK))
    block_BN = _first_largest(x_BKS.amax(dim=2), n).sort().values
    at_BN = _first_largest(x_BKS.gather(1, block_BN[..., None].expand(-1, -1, BLOCK)).flatten(1), n)
    ids_BN: Tensor = block_BN.gather(1, at_BN // BLOCK) * BLOCK + at_BN % BLOCK
    return ids_BN


def _first_largest(x_BV: Tensor, n: int) -> Tensor:
    bits_BV = torch.where(x_BV.isnan(), math.nan, x_BV + 0.0).view(torch.int32)  # one NaN, one zero
    ordered_BV = torch.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV).long()  # as the numbers are, NaN above all
    key_BV = (ordered_BV << 32) - torch.arange(x_BV.shape[1], device=x_BV.device)  # no two are equal
    return key_BV.topk(n, dim=-1).indices
