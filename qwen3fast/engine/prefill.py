"""Prefill: a prompt goes into one row of the KV cache in chunks of a few fixed sizes, so that any length runs on
code and graphs that exist already.

    T tokens of a chunk   L cache positions read   E hidden_size   D head_dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3fast.engine.parts import CHUNK_SIZES, Parts
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import StaticKVCache

# What a chunk costs beside its tokens, in tokens: weights are read once more. A line through the times of 32 and 512
# tokens of a machine meets zero tokens there: at about 20 on the one of benchmarks/results; 40 was chosen by the record
# of a faster machine that this one replaced (commit 32ad6ce).
CHUNK_COST = 40


def split_into_chunks(num_tokens: int, room: int, sizes: tuple[int, ...] = CHUNK_SIZES) -> list[int]:
    """Chunk sizes, in order, that cover `num_tokens` and together take at most `room` positions.

    The last chunk is padded where that costs less than another chunk. `room` must be a multiple of the smallest size,
    or hold that much more than the tokens.
    """
    has_room = num_tokens + sizes[0] <= room or (num_tokens <= room and room % sizes[0] == 0)
    assert num_tokens > 0 and has_room, f"{num_tokens} tokens, room for {room}"
    chunks = []
    while num_tokens > 0:
        covering = [size for size in sizes if num_tokens <= size <= min(num_tokens + CHUNK_COST, room)]
        fitting = [size for size in sizes if size <= num_tokens]
        size = (covering or fitting[-1:] or sizes)[0]
        chunks.append(size)
        num_tokens -= size
        room -= size
    return chunks


def usable_prefix(shared: int, num_tokens: int, allocated_len: int, multiple: int = 1) -> int:
    """How many of a prompt's first `shared` tokens need not be computed, if their keys and values are there.

    The last token is always computed, for its logits. multiple: of what the number must be one.
    """
    if num_tokens + CHUNK_SIZES[0] > allocated_len:  # near the end, padded chunks fit if they begin where others end
        multiple = CHUNK_SIZES[0]
    return min(shared, num_tokens - 1) // multiple * multiple


@dataclass
class Prefill:
    """A prompt on its way into a row of the cache.

    done: tokens whose keys and values are there. chunks: sizes to come.
    """

    row: int
    token_ids: list[int]
    done: int
    chunks: list[int]

    @classmethod
    def begin(cls, row: int, token_ids: list[int], reused: int, allocated_len: int) -> Prefill:
        """A prompt of which the first `reused` tokens are in the row already: as many as `usable_prefix` says."""
        return cls(row, token_ids, reused, split_into_chunks(len(token_ids) - reused, allocated_len - reused))


def prefill_step(
    model: Qwen3, parts: Parts, cache: StaticKVCache, cos_SD: Tensor, sin_SD: Tensor, prefill: Prefill
) -> Tensor | None:
    """Compute the next chunk. Returns: after the last one, the last token's logits, (1, V); otherwise None."""
    device, start, size = cos_SD.device, prefill.done, prefill.chunks.pop(0)
    chunk = prefill.token_ids[start : start + size]
    row_1 = torch.tensor([prefill.row], device=device)
    padded = torch.tensor([chunk + [0] * (size - len(chunk))], device=device)
    x_1TE = prefill_chunk(model, parts, cache, cos_SD, sin_SD, row_1, padded, start)
    prefill.done += len(chunk)
    if prefill.chunks:
        return None
    # Only the last position goes through the output projection.
    x_11E = x_1TE[:, len(chunk) - 1 : len(chunk)].clone(memory_format=torch.contiguous_format)
    return parts.logits(parts.head, x_11E).squeeze(1)


def prefill_chunk(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    cos_SD: Tensor,
    sin_SD: Tensor,
    row_1: Tensor,
    token_1T: Tensor,
    start: int,
) -> Tensor:
    """One chunk at positions start.. of one row; earlier positions are in the cache. Returns (1, T, E).

    Padding at the end writes keys and values that no mask shows before a real token has overwritten them.
    """
    size = token_1T.shape[1]
    position_1T = torch.arange(start, start + size, device=token_1T.device)[None]
    mask_1TL = torch.arange(start + size, device=token_1T.device) <= position_1T[..., None]
    cos_1TD, sin_1TD = cos_SD[position_1T], sin_SD[position_1T]
    x_1TE = model.embed(token_1T)
    for block, layer in zip(model.model.layers, cache.layers(row_1), strict=True):
        x_1TE = parts.prefill_block(block, x_1TE, cos_1TD, sin_1TD, position_1T, mask_1TL, *layer.tensors)
    return x_1TE
