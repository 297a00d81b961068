"""Rows of a layer as levels, with a scale and a zero point per group of channels: the common form of AWQ and GPTQ.

n some rows   K in_features   G groups
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.quantization.formats import GROUP, Packed, pack_int4, pack_int8
from qwen3fast.quantization.uint4 import pack_zeros

OTHER_WAY = "use quantization='int8' or 'dequantize'"


class Levels(NamedTuple):
    """weight[n, k] = (level[n, k] - zero[n, g]) * scale[n, g], where g = group[k].

    level_nK, zero_nG: uint8. scale_nG: float32. group_K: int64.
    """

    level_nK: Tensor
    zero_nG: Tensor
    scale_nG: Tensor
    group_K: Tensor

    @classmethod
    def of(
        cls, level_nK: Tensor, zero_nG: Tensor, scale_nG: Tensor, group_size: int, index_K: Tensor | None = None
    ) -> Levels:
        """Return rows whose groups are `group_size` neighbors each (-1: all channels), or as index_K numbers them.

        Raises: ValueError for numbers of unknown groups.
        """
        K, G = level_nK.shape[1], scale_nG.shape[1]
        if index_K is None:
            index_K = torch.arange(K, device=level_nK.device) // (K if group_size == -1 else group_size)
        elif index_K.min() < 0 or index_K.max() >= G:
            raise ValueError(f"g_idx must be from 0 to {G - 1}, got {int(index_K.min())} to {int(index_K.max())}")
        return cls(level_nK, zero_nG, scale_nG, index_K.long())

    @property
    def has_sorted_groups(self) -> bool:
        """Return whether the channels of each group are neighbors, in the order of groups."""
        return bool((self.group_K.diff() >= 0).all())

    def in_order(self, order_K: Tensor) -> Levels:
        """Return the same rows with their channels in this order."""
        return self._replace(level_nK=self.level_nK[:, order_K], group_K=self.group_K[order_K])

    def weight(self) -> Tensor:
        """Return the dequantized rows, (n, K) float32; exact for scales in float16 or bfloat16."""
        distance_nK = self.level_nK.float() - self.zero_nG.float()[:, self.group_K]
        return distance_nK * self.scale_nG[:, self.group_K]

    def as_int4(self) -> Packed:
        """Return the same 4-bit levels in our format; scales are rounded to bfloat16, each by a share of 2^-8 at most.

        Raises: ValueError if zero points are not 8, or 32 neighboring channels are of several groups.
        """
        if (self.zero_nG != 8).any():
            raise ValueError(f"zero points other than 8, though 'sym' is true; {OTHER_WAY}")
        return pack_int4(self.level_nK, self.scale_nG[:, self._groups_of(GROUP)])

    def as_uint4(self, span: int) -> Packed:
        """Return the same 4-bit levels and zero points in our format; scales are rounded to float16, if they are not.

        Raises: ValueError if `span` neighboring channels are of several groups, or a scale is beyond float16.
        """
        group = self._groups_of(span)
        scale_nP = self.scale_nG[:, group]
        if (scale_nP.to(torch.float16).isinf() & scale_nP.isfinite()).any():
            raise ValueError(f"scales beyond the range of float16; {OTHER_WAY}")
        return pack_zeros(self.level_nK, scale_nP, self.zero_nG[:, group])

    def _groups_of(self, span: int) -> Tensor:
        """Return the groups of each `span` neighboring channels."""
        group = self.group_K.view(-1, span)
        if (group != group[:, :1]).any():
            unequal = f"groups must be multiples of {span} channels"
            problem = unequal if self.has_sorted_groups else "g_idx mixes channels, though 'desc_act' is false"
            raise ValueError(f"{problem}; {OTHER_WAY}")
        return group[:, 0]

    def is_int8(self) -> bool:
        """Return whether 8-bit levels are the ones of our format: a single group with its zero point in the middle."""
        return self.scale_nG.shape[1] == 1 and bool((self.zero_nG == 128).all())

    def as_int8(self) -> Packed:
        """Return the same 8-bit levels and scales in our format."""
        return pack_int8(self.level_nK, self.scale_nG[:, 0])


def unpack(word: Tensor, bits: int, dim: int) -> Tensor:
    """Return the unsigned numbers of `bits` bits in int32 words as uint8, lowest bits first; `dim` grows."""
    shift = torch.arange(0, 32, bits, device=word.device, dtype=torch.int32)
    shift = shift.view(-1, *[1] * (word.dim() - 1 - dim))
    return (word.unsqueeze(dim + 1) >> shift).bitwise_and_(2**bits - 1).to(torch.uint8).flatten(dim, dim + 1)
