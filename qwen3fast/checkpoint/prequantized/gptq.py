"""GPTQ checkpoints, 4 or 8 bits: words of neighboring channels, each channel with the number of its group.

`qweight` (K*bits/32, N) int32, packed along channels; `qzeros` (G, N*bits/32) int32, packed along rows; `scales`
(G, N); `g_idx` (K,) int32, without which groups are neighbors. The first format stores zero points less one.
Source: GPTQ, arXiv:2210.17323; the layout is AutoGPTQ's and GPTQModel's.

N out_features   K in_features   G groups   n some rows
"""

from __future__ import annotations

from torch import Tensor

from qwen3fast.checkpoint.prequantized.format import FLOATS, ExpectedTensor, PrequantizedFormat
from qwen3fast.checkpoint.prequantized.levels import Levels, unpack

ONES = {4: 0x11111111, 8: 0x01010101}  # a one in each number of a word


def expected_tensors(stored: PrequantizedFormat, N: int, K: int) -> dict[str, ExpectedTensor]:
    """Return the tensors of a layer by the ends of their names; none for a shape that the format cannot store."""
    in_word = 32 // stored.bits
    if N % in_word or K % in_word:
        return {}
    G = 1 if stored.group_size == -1 else -(-K // stored.group_size)
    return {
        "qweight": ExpectedTensor((K // in_word, N), ("I32",)),
        "qzeros": ExpectedTensor((G, N // in_word), ("I32",)),
        "scales": ExpectedTensor((G, N), FLOATS),
        "g_idx": ExpectedTensor((K,), ("I32",), is_optional=not stored.has_act_order),
    }


def levels(stored: PrequantizedFormat, tensors: dict[str, Tensor], rows: slice) -> Levels:
    """Return the levels of some rows; the first one is a multiple of 8. Raises: ValueError for unknown groups."""
    in_word, scale_Gn = 32 // stored.bits, tensors["scales"][:, rows].float()
    level_Kn = unpack(tensors["qweight"][:, rows], stored.bits, dim=0)
    zeros = tensors["qzeros"][:, rows.start // in_word : rows.stop // in_word]
    if stored.zeros_less_one:  # added to whole words: a zero point of 0 was stored with a borrow from the next one
        zeros = zeros + ONES[stored.bits]
    zero_nG = unpack(zeros, stored.bits, dim=1).T
    return Levels.of(level_Kn.T.contiguous(), zero_nG, scale_Gn.T, stored.group_size, tensors.get("g_idx"))
