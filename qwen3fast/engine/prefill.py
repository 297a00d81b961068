"""Prefill: a prompt is computed in chunks of a few fixed sizes, and its keys and values fill one row of the KV cache.

A chunk has one of a few sizes (`chunk_sizes`), the last one with padding: prompts of all lengths run the same compiled
code and graphs. Decode steps of other rows can run between two chunks. Row r is slot r of the cache.
`Parts` holds the functions of a forward pass, compiled or not (parts.py).

    T tokens of a chunk   L cache positions read   E hidden_size   D head_dim
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.engine.parts import CHUNK_SIZES, Parts
from qwen3fast.engine.prompt_logprobs import WantedLogprobs, chunk_logprobs
from qwen3fast.engine.staging import to_device
from qwen3fast.engine.state import Logprobs
from qwen3fast.model import Qwen3
from qwen3fast.model.kv_cache import StaticKVCache

# One more chunk reads all weights once more, which takes as long as this many more tokens in a chunk. Extrapolated from
# the times of 32 and 512 tokens: about 20 on the machine of benchmarks/results, 40 on a faster one (32ad6ce).
CHUNK_COST = 40

Fixed = tuple[Qwen3, Parts, StaticKVCache, Tensor, Tensor]  # the first arguments of `prefill_chunk`


def split_into_chunks(num_tokens: int, room: int, sizes: tuple[int, ...] = CHUNK_SIZES) -> list[int]:
    """Return the sizes of chunks, in order, that cover `num_tokens` and take at most `room` positions together.

    The last chunk is padded where this costs less than another chunk. Padding needs room: `room` must be a multiple of
    the smallest size, or exceed num_tokens by the smallest size.
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
    """Return how many tokens of a prompt to reuse, if keys and values of its first `shared` tokens are in the cache.

    The last token is always computed, for its logits. multiple: the result is a multiple of this number.
    """
    if num_tokens + CHUNK_SIZES[0] > allocated_len:  # near the end of the cache, padded chunks must be aligned to fit
        multiple = CHUNK_SIZES[0]
    return min(shared, num_tokens - 1) // multiple * multiple


@dataclass
class Prefill:
    """The progress of a prompt.

    Attributes:
        row: of the cache. token_ids: the whole prompt.
        done: number of tokens whose keys and values are in the cache. chunks: sizes of the remaining chunks.
        adapter: the slot of the prompt's adapter; 0 for none.
        wanted: the tokens whose log-probabilities are computed on the way; None for none. logprobs: of the tokens after
            each token computed so far, in order; the caller may take them out between chunks.
    """

    row: int
    token_ids: list[int]
    done: int
    chunks: list[int]
    wanted: WantedLogprobs | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    adapter: int = 0

    @classmethod
    def begin(
        cls,
        row: int,
        token_ids: list[int],
        reused: int,
        allocated_len: int,
        wanted: WantedLogprobs | None = None,
        adapter: int = 0,
        sizes: tuple[int, ...] = CHUNK_SIZES,
    ) -> Prefill:
        """Return the prefill of a prompt whose first `reused` tokens (see `usable_prefix`) are in the row already.

        sizes: of chunks, see `chunk_sizes`.
        """
        assert wanted is None or reused < wanted.first, "reused tokens give no logits"
        chunks = split_into_chunks(len(token_ids) - reused, allocated_len - reused, sizes)
        return cls(row, token_ids, reused, chunks, wanted, adapter=adapter)


def prefill_step(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    cos_SD: Tensor,
    sin_SD: Tensor,
    prefill: Prefill,
    captured: CapturedChunks | None = None,
) -> Tensor | None:
    """Compute the next chunk. Returns: the logits after the prompt, (1, V), if it is the last chunk; otherwise None.

    captured: the graphs of chunks, on CUDA; chunks whose log-probabilities are wanted run without.
    """
    device, start, size = cos_SD.device, prefill.done, prefill.chunks.pop(0)
    chunk = prefill.token_ids[start : start + size]
    row_1 = to_device([prefill.row], device)
    token_1T = to_device([chunk + [0] * (size - len(chunk))], device)
    fixed, last = (model, parts, cache, cos_SD, sin_SD), len(chunk) - 1
    prefill.done += len(chunk)
    wanted = prefill.wanted.after(start, len(chunk), len(prefill.token_ids)) if prefill.wanted is not None else None
    if captured is not None and captured.serves(start) and not wanted:
        logits_1V = captured.run(fixed, row_1, token_1T, start, last, prefill.adapter > 0)
        return None if prefill.chunks else logits_1V.clone()
    x_1TE = prefill_chunk(*fixed, row_1, token_1T, start)
    if prefill.wanted is not None and wanted:
        targets = prefill.token_ids[wanted.start + 1 : wanted.stop + 1]
        states_1TE = x_1TE[:, wanted.start - start : wanted.stop - start]
        prefill.logprobs += chunk_logprobs(parts.head, model.config.vocab_size, states_1TE, targets, prefill.wanted.top)
    if prefill.chunks:
        return None
    # Only the last position goes through the output projection. The copy has the same strides for all sizes of chunks,
    # which one compiled form serves.
    x_11E = x_1TE[:, last : last + 1].clone(memory_format=torch.contiguous_format)
    logits_11V: Tensor = parts.logits(parts.head, x_11E)
    return logits_11V.squeeze(1)


def prefill_chunk(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    cos_SD: Tensor,
    sin_SD: Tensor,
    row_1: Tensor,
    token_1T: Tensor,
    start: int | Tensor,
) -> Tensor:
    """Run all blocks over one chunk, at positions start, start + 1, ... of one row. Returns: their output, (1, T, E).

    start: a number; or, where attention needs no mask, an int64 tensor (1,), which the host does not read.
    Padding at the end writes keys and values as well; real tokens overwrite them before attention can see them.
    """
    size = token_1T.shape[1]
    mask_1TL = None
    if isinstance(start, Tensor):
        position_1T = (torch.arange(size, device=token_1T.device) + start)[None]
    else:
        position_1T = torch.arange(start, start + size, device=token_1T.device)[None]
        mask_1TL = torch.arange(start + size, device=token_1T.device) <= position_1T[..., None]
    cos_1TD, sin_1TD = cos_SD[position_1T], sin_SD[position_1T]
    x_1TE = model.embed(token_1T)
    for block, layer in zip(model.model.layers, cache.layers(row_1), strict=True):
        x_1TE = parts.prefill_block(block, x_1TE, cos_1TD, sin_1TD, position_1T, mask_1TL, *layer.tensors)
    return x_1TE


class CapturedChunks:
    """CUDA graphs of a chunk and the logits after it, two per size: for a prompt's first chunk, and for later ones.

    A first chunk begins at position 0: only its tokens, its row and the index of its last token vary, which a graph
    reads from buffers. A later chunk has its start in a buffer as well, and needs attention that reads it there
    (`finds_used_length_of_chunks`); without such attention, later chunks are launched kernel by kernel.
    """

    def __init__(self, graphs: GraphCache, vocab_size: int, device: torch.device, serves_later: bool) -> None:
        """Allocate the buffers. serves_later: whether attention reads a chunk's positions on the device."""
        self._graphs = graphs
        self.serves_later = serves_later
        self._row_1, self._start_1, self._last_1 = torch.zeros(3, 1, dtype=torch.int64, device=device)
        self._token_1T = torch.zeros(1, CHUNK_SIZES[-1], dtype=torch.int64, device=device)
        self._logits_1V = torch.zeros(1, vocab_size, device=device)

    def serves(self, start: int) -> bool:
        """Return whether there are graphs for chunks that begin at this position."""
        return start == 0 or self.serves_later

    def run(
        self, fixed: Fixed, row_1: Tensor, token_1T: Tensor, start: int, last: int, has_adapter: bool = False
    ) -> Tensor:
        """Run a chunk; capture its graph first if its size is new.

        has_adapter: whether the model in `fixed` adds an adapter, which has graphs of its own.
        Returns: the logits after token `last`, (1, V), in a buffer that the next chunk overwrites.
        """
        size, parts = token_1T.shape[1], fixed[1]
        self._row_1.copy_(row_1)
        self._token_1T[:, :size].copy_(token_1T)
        self._start_1.fill_(start)
        self._last_1.fill_(last)

        def step() -> None:
            begin = self._start_1 if start else 0
            x_1TE = prefill_chunk(*fixed, self._row_1, self._token_1T[:, :size], begin)
            logits_11V = parts.logits(parts.head, x_1TE.index_select(1, self._last_1))
            self._logits_1V.copy_(logits_11V.squeeze(1))

        name = "later chunk" if start else "prefill"
        self._graphs.run((f"{name} with adapter" if has_adapter else name, size), step)
        return self._logits_1V
