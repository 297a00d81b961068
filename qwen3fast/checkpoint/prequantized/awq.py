"""AWQ checkpoints of version "gemm", 4 bits: words of eight rows in an order of their own, groups of neighbors.

`qweight` (K, N/8) int32; `qzeros` (G, N/8) int32; `scales` (G, N). From its lowest bits on, a word holds rows 0, 2, 4,
6, 1, 3, 5 and 7 of its eight.
Source: AWQ, arXiv:2306.00978; the layout is AutoAWQ's.

N out_features   K in_features   G groups   n some rows
"""

from __future__ import annotations

from torch import Tensor

from qwen3fast.checkpoint.prequantized.format import FLOATS, ExpectedTensor, PrequantizedFormat
from qwen3fast.checkpoint.prequantized.levels import Levels, unpack

PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # of each row in its word


def expected_tensors(stored: PrequantizedFormat, N: int, K: int) -> dict[str, ExpectedTensor]:
    """Return the tensors of a layer by the ends of their names; none for a shape that the format cannot store."""
    if N % 8 or K % stored.group_size:
        return {}
    G = K // stored.group_size
    return {
        "qweight": ExpectedTensor((K, N // 8), ("I32",)),
        "qzeros": ExpectedTensor((G, N // 8), ("I32",)),
        "scales": ExpectedTensor((G, N), FLOATS),
    }


def levels(stored: PrequantizedFormat, tensors: dict[str, Tensor], rows: slice) -> Levels:
    """Return the levels of some rows; the first one is a multiple of 8."""
    words = slice(rows.start // 8, rows.stop // 8)
    level_nK, zero_nG = (_rows(tensors[name][:, words]) for name in ("qweight", "qzeros"))
    return Levels.of(level_nK, zero_nG, tensors["scales"][:, rows].float().T, stored.group_size)


def _rows(word: Tensor) -> Tensor:
    """Return (X, n/8) words as (n, X) levels."""
    level_Xn8: Tensor = unpack(word, 4, dim=1).unflatten(1, (-1, 8))
    return level_Xn8[..., PLACE].flatten(1).T.contiguous()
