"""What happens to logits before a sampler sees them, and the log-probabilities reported beside the tokens.

Every row has its own parameters. Neutral ones leave its logits as they are, bit for bit: a request gets the same tokens
whoever runs beside it. Rule of this file: plain tensor operations, no `.item()`, no shape that depends on data.

    B rows   V vocabulary   N likeliest tokens   W words of 32 bits, ceil(V / 32)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ProcessorRows(NamedTuple):
    """Parameters and history of B rows.

    Attributes:
        repetition_penalty_B, presence_penalty_B, frequency_penalty_B: float32; neutral are 1, 0 and 0.
        in_prompt_BV: bool, whether the prompt holds the token.
        count_BV: int32, how many times the reply holds the token.
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
        """Buffers for `rows` rows that change nothing."""
        return cls(
            torch.ones(rows, device=device),
            torch.zeros(rows, device=device),
            torch.zeros(rows, device=device),
            torch.zeros(rows, vocab_size, dtype=torch.bool, device=device),
            torch.zeros(rows, vocab_size, dtype=torch.int32, device=device),
            torch.zeros(rows, vocab_size, device=device),
            torch.full((rows, num_words(vocab_size)), -1, dtype=torch.int32, device=device),
        )


def process_logits(logits_BV: Tensor, rows: ProcessorRows) -> Tensor:
    """The logits to sample from, (B, V) float32.

    Order as in transformers: repetition penalty, presence and frequency penalty, bias, mask. NaN stays NaN, forbidden
    or not, and +inf stays +inf or becomes NaN: either way the sampler sees that the model's logits are invalid.
    Source of the repetition penalty: CTRL, arXiv:1909.05858, section 4.1; of the other two: OpenAI's API reference.
    """
    x_BV = logits_BV.float()
    penalty_B1 = rows.repetition_penalty_B[:, None]
    penalised_BV = torch.where(x_BV < 0, x_BV * penalty_B1, x_BV / penalty_B1)
    # x / 1 is x, but not every GPU's fast division promises so.
    is_penalised_BV = (rows.in_prompt_BV | (rows.count_BV > 0)) & (penalty_B1 != 1)
    x_BV = torch.where(is_penalised_BV, penalised_BV, x_BV)
    presence_BV = rows.presence_penalty_B[:, None] * (rows.count_BV > 0)
    frequency_BV = rows.frequency_penalty_B[:, None] * rows.count_BV
    x_BV = x_BV - (presence_BV + frequency_BV)
    # Adding a bias of 0 would turn -0 into +0.
    x_BV = torch.where(rows.bias_BV == 0, x_BV, x_BV + rows.bias_BV)
    # Not simply -inf, which would hide a NaN.
    return torch.where(_unpack(rows.allowed_BW, x_BV.shape[-1]), x_BV, x_BV - math.inf)


def num_words(vocab_size: int) -> int:
    """Words of a bitmask over the vocabulary."""
    return -(-vocab_size // 32)


def _unpack(mask_BW: Tensor, vocab_size: int) -> Tensor:
    """The bits of a bitmask, (B, V) bool."""
    bit_32 = torch.arange(32, dtype=torch.int32, device=mask_BW.device)
    return (((mask_BW[:, :, None] >> bit_32) & 1) != 0).flatten(1)[:, :vocab_size]


def count_token(count_BV: Tensor, token_B: Tensor, advance_B: Tensor) -> None:
    """Add advance_B (int64, 0 or 1) at each row's token (int64) of count_BV (int32), in place; token -1 counts nothing.

    count_BV may be a slice of a larger buffer.
    """
    increment_B = torch.where(token_B >= 0, advance_B, 0).to(count_BV.dtype)
    count_BV.scatter_add_(1, token_B.clamp(min=0)[:, None], increment_B[:, None])


def log_probabilities(logits_BV: Tensor, token_B: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen tokens and of the n likeliest, n <= V, from the model's own logits.

    Returns: the chosen tokens' (B,) float32 (0 for token -1); ids of the n likeliest, (B, N) int64, likeliest first;
    theirs, (B, N) float32. Among equally likely tokens, which are listed and in which order is topk's to say.
    """
    logits_BV = logits_BV.float()
    log_sum_B1 = logits_BV.logsumexp(dim=-1, keepdim=True)
    chosen_B1 = logits_BV.gather(1, token_B.clamp(min=0)[:, None]) - log_sum_B1
    chosen_B = torch.where(token_B >= 0, chosen_B1.squeeze(1), 0.0)
    if n == 0:  # topk of none is refused by some backends
        empty_B0 = logits_BV[:, :0]
        return chosen_B, empty_B0.long(), empty_B0.clone()
    top_BN, ids_BN = logits_BV.topk(n, dim=-1)
    return chosen_B, ids_BN, top_BN - log_sum_B1
