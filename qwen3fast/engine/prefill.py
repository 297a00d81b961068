"""Prefill: a prompt is computed in chunks of a few fixed sizes, and its keys and values fill one row of the KV cache.

A chunk has one of a few sizes (`chunk_sizes`), the last one with padding: prompts of all lengths run the same compiled
code and graphs. Decode steps of other rows can run between two chunks. Row r is slot r of the cache.
Small chunks of several prompts are computed together, one batch row each: a few tokens are bound by reading the
weights, or by launches. `Parts` holds the functions of a forward pass, compiled or not (parts.py).

    B prompts   T tokens of a chunk   L cache positions read   E hidden_size   D head_dim   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.engine.cuda_graph import GraphCache
from qwen3fast.engine.parts import CHUNK_SIZES, MAX_PROMPTS, Forward, Parts
from qwen3fast.engine.prompt_logprobs import WantedLogprobs, chunk_logprobs
from qwen3fast.engine.staging import staged, to_device
from qwen3fast.engine.state import EMPTY, Logprobs
from qwen3fast.kernels.attention import finds_used_length_of_chunks
from qwen3fast.kernels.cpu.prefill import tile_length

# One more chunk reads all weights once more, which takes as long as this many more tokens in a chunk. Extrapolated from
# the times of 32 and 512 tokens: about 20 on the machine of benchmarks/results, 40 on a faster one (32ad6ce).
CHUNK_COST = 40
# The same where C++ operations compute chunks without tiles, and arithmetic is the limit more than weights (57a8b58).
CPP_CHUNK_COST = 8
# Prompts in one graph, where that many tokens make a chunk of the largest size at most; missing ones are padding.
GRAPH_PROMPTS = (4, MAX_PROMPTS)

NOWHERE = -CHUNK_SIZES[-1]  # the start of a batch row without a prompt: all of its positions are EMPTY


def split_into_chunks(
    num_tokens: int, room: int, sizes: tuple[int, ...] = CHUNK_SIZES, chunk_cost: int = CHUNK_COST
) -> list[int]:
    """Return the sizes of chunks, in order, that cover `num_tokens` and take at most `room` positions together.

    The last chunk is padded where this costs less than another chunk, which takes as long as `chunk_cost` tokens.
    Padding needs room: `room` must be a multiple of the smallest size, or exceed num_tokens by the smallest size.
    """
    has_room = num_tokens + sizes[0] <= room or (num_tokens <= room and room % sizes[0] == 0)
    assert num_tokens > 0 and has_room, f"{num_tokens} tokens, room for {room}"
    chunks = []
    while num_tokens > 0:
        covering = [size for size in sizes if num_tokens <= size <= min(num_tokens + chunk_cost, room)]
        fitting = [size for size in sizes if size <= num_tokens]
        size = (covering or fitting[-1:] or sizes)[0]
        chunks.append(size)
        num_tokens -= size
        room -= size
    return chunks


def max_prompts(size: int, slots: int) -> int:
    """Return how many prompts may share a forward pass, each with a chunk of this size.

    Together they have at most as many tokens as the largest chunk, which running replies wait for in any case.
    """
    return min(CHUNK_SIZES[-1] // size, MAX_PROMPTS, slots)


def graph_prompts(size: int, slots: int) -> list[int]:
    """Return the numbers of prompts, at least 2, for which chunks of this size have a graph."""
    return sorted({min(number, max_prompts(size, slots)) for number in GRAPH_PROMPTS} - {0, 1})


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
        room: positions of a row, which padding may take.
        adapter: the slot of the prompt's adapter; 0 for none. chunk_cost: of one more chunk, in tokens of padding.
        wanted: the tokens whose log-probabilities are computed on the way; None for none. logprobs: of the tokens after
            each token computed so far, in order; the caller may take them out between chunks.
    """

    row: int
    token_ids: list[int]
    done: int
    chunks: list[int]
    room: int
    wanted: WantedLogprobs | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    adapter: int = 0
    chunk_cost: int = CHUNK_COST

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
        chunk_cost: int = CHUNK_COST,
    ) -> Prefill:
        """Return the prefill of a prompt whose first `reused` tokens (see `usable_prefix`) are in the row already.

        sizes: of chunks, see `chunk_sizes`.
        """
        assert wanted is None or reused < wanted.first, "reused tokens give no logits"
        chunks = split_into_chunks(len(token_ids) - reused, allocated_len - reused, sizes, chunk_cost)
        return cls(row, token_ids, reused, chunks, allocated_len, wanted, adapter=adapter, chunk_cost=chunk_cost)

    def fits(self, size: int) -> bool:
        """Return whether the next chunk can be computed with others of this size.

        It is of this size; or it is the last one, and padding it costs less than another chunk. A prompt whose
        log-probabilities are wanted is computed alone.
        """
        if self.wanted is not None or self.chunks[0] == size:
            return self.wanted is None
        has_room = self.done + size <= self.room
        return len(self.chunks) == 1 and 0 < size - self.chunks[0] <= self.chunk_cost and has_room

    def take_chunk(self, size: int = 0) -> Chunk:
        """Return the next chunk, which is counted as done from now on. size: to pad it to, where it `fits`."""
        start, size = self.done, max(size, self.chunks.pop(0))
        token_ids = self.token_ids[start : start + size]
        self.done += len(token_ids)
        return Chunk(token_ids + [0] * (size - len(token_ids)), start, len(token_ids) - 1)


class Chunk(NamedTuple):
    """The next tokens of a prompt: their ids, padded; the position of the first; the index of the last real one."""

    token_ids: list[int]
    start: int
    last: int


def prefill_together(
    forward: Forward, prefills: Sequence[Prefill], captured: CapturedChunks | None = None
) -> list[Tensor | None]:
    """Compute the next chunk of a prompt, or of several in one forward pass.

    Of several, each must fit the size of the largest (`Prefill.fits`). captured: the graphs of chunks, on CUDA; chunks
    whose log-probabilities are wanted run without.
    Returns: for each prompt, the logits after it, (1, V), if this was its last chunk; otherwise None.
    """
    size, is_one, first = max(prefill.chunks[0] for prefill in prefills), len(prefills) == 1, prefills[0]
    assert is_one or all(prefill.fits(size) for prefill in prefills), "each chunk has the same size, or is padded"
    device, config, wanted = forward.cos_SD.device, forward.model.config, range(0)
    chunks, rows = [prefill.take_chunk(size) for prefill in prefills], [prefill.row for prefill in prefills]
    ends = [b for b, prefill in enumerate(prefills) if not prefill.chunks]
    token_ids, starts, lasts = zip(*chunks, strict=True)
    if first.wanted is not None:  # such a prompt is alone
        wanted = first.wanted.after(starts[0], lasts[0] + 1, len(first.token_ids))
    if captured is not None and not wanted and all(map(captured.serves, starts)):
        logits_BV = captured.run(forward, rows, chunks, any(prefill.adapter > 0 for prefill in prefills))
        return [logits_BV[b : b + 1].clone() if b in ends else None for b in range(len(prefills))]
    token_BT, row_B = to_device(token_ids, device), to_device(rows, device)
    start, length = starts[0] if is_one else to_device(starts, device), None
    if not is_one and not finds_used_length_of_chunks(device, config.head_dim):
        length = max(starts) + size
    x_BTE = prefill_chunk(forward, row_B, token_BT, start, length, None if wanted else lasts)
    if first.wanted is not None and wanted:
        targets = first.token_ids[wanted.start + 1 : wanted.stop + 1]
        states_1TE = x_BTE[:, wanted.start - starts[0] : wanted.stop - starts[0]]
        first.logprobs += chunk_logprobs(forward.parts, config.vocab_size, states_1TE, targets, first.wanted.top)
    logits: list[Tensor | None] = [None] * len(prefills)
    if ends:
        logits_RV = logits_at(forward.parts, x_BTE, ends, [lasts[b] for b in ends])
        for b, logits_1V in zip(ends, logits_RV.split(1), strict=True):
            logits[b] = logits_1V.clone()
    return logits


def logits_at(parts: Parts, x_BTE: Tensor, rows: list[int], tokens: list[int]) -> Tensor:
    """Return the logits after one token of each of some batch rows, (rows, V), from the last block's output.

    Only these go through the output projection. They are a copy: it has the same strides for chunks of all sizes, which
    one compiled form serves.
    """
    row, token = to_device([rows, tokens], x_BTE.device)
    logits_R1V: Tensor = parts.logits(parts.head, x_BTE[row, token][:, None])
    return logits_R1V.squeeze(1)


def prefill_chunk(
    forward: Forward,
    row_B: Tensor,
    token_BT: Tensor,
    start: int | Tensor,
    length: int | None = None,
    lasts: Sequence[int] | None = None,
) -> Tensor:
    """Run all blocks over one chunk per batch row, at positions start, start + 1, ... of the cache's rows row_B.

    start: a number, for one batch row; or an int64 tensor (B,), which the host does not read, with `length`, the number
    of positions that are read, or None where attention needs no mask. A batch row that begins at NOWHERE writes nothing
    that is read. Padding at the end of a chunk writes keys and values as well; real tokens overwrite them before
    attention can see them. lasts: the only token of each batch row whose output is needed; None for all.
    Returns: the output of the last block, (B, T, E).
    """
    model, parts, cache, cos_SD, sin_SD = forward
    size, device, mask_BTL = token_BT.shape[1], token_BT.device, None
    if isinstance(start, Tensor):
        position_BT = (torch.arange(size, device=device) + start[:, None]).clamp(min=EMPTY)
    else:
        position_BT = torch.arange(start, start + size, device=device)[None]
        length = start + size
    if length is not None:
        mask_BTL = torch.arange(length, device=device) <= position_BT[..., None]
    x_BTE = model.embed(token_BT)
    layers, num_tokens = parts.decode_layers, token_BT.numel()
    if layers is not None and length is not None and layers.serves_chunks(num_tokens):
        tiles = parts.forms.of_chunks(num_tokens, size, length)
        if tiles is not None:
            last_B = None if lasts is None else torch.tensor(lasts, device="cpu")
            tiles_from = tile_length(parts.forms.tiles_from, size)
            return layers.prefill(x_BTE, cos_SD, sin_SD, position_BT, row_B, tiles, last_B, tiles_from)
    cos_BTD, sin_BTD = cos_SD[position_BT], sin_SD[position_BT]
    for block, layer in zip(model.model.layers, cache.layers(row_B), strict=True):
        x_BTE = parts.prefill_block(block, x_BTE, cos_BTD, sin_BTD, position_BT, mask_BTL, *layer.tensors)
    return x_BTE


class CapturedChunks:
    """CUDA graphs of chunks and the logits after them: two per size for one prompt, and one or two for several prompts.

    Tokens, rows, starts and the indices of the last tokens vary; a graph reads them from buffers. The first chunk of a
    prompt begins at position 0, and its attention knows its length. Other graphs need attention that reads the starts
    on the device (`finds_used_length_of_chunks`); without it, later chunks are launched kernel by kernel, and prompts
    are computed one by one.
    """

    def __init__(
        self, graphs: GraphCache, vocab_size: int, slots: int, device: torch.device, serves_later: bool
    ) -> None:
        """Allocate the buffers. slots: of the cache. serves_later: whether attention reads starts on the device."""
        self._graphs, self._slots = graphs, slots
        self.serves_later = serves_later
        # The ids; and of each prompt its row, its start and the index of its last token.
        self._token, self._number = torch.zeros(2, CHUNK_SIZES[-1], dtype=torch.int64, device=device)
        self._logits_BV = torch.zeros(min(slots, MAX_PROMPTS), vocab_size, dtype=torch.float32, device=device)

    def serves(self, start: int) -> bool:
        """Return whether there are graphs for a prompt's chunks that begin at this position."""
        return start == 0 or self.serves_later

    def run(self, forward: Forward, rows: list[int], chunks: list[Chunk], has_adapter: bool = False) -> Tensor:
        """Run a chunk of each prompt, all of one size; capture the graph first if it is new.

        rows: of the cache. has_adapter: whether the model adds adapters, which has graphs of its own.
        Returns: the logits after the last tokens, in the order of the prompts, in a buffer that the next chunk
        overwrites; rows beyond the prompts have no meaning.
        """
        T, is_first, name = len(chunks[0].token_ids), False, "prompts"
        if len(chunks) > 1:
            missing = next(n for n in graph_prompts(T, self._slots) if n >= len(chunks)) - len(chunks)
            rows, chunks = rows + rows[:1] * missing, chunks + [Chunk([0] * T, NOWHERE, 0)] * missing
        else:
            is_first = chunks[0].start == 0
            name = "prefill" if is_first else "later chunk"
        token_ids, starts, lasts = zip(*chunks, strict=True)
        B, device = len(chunks), self._token.device
        token, numbers = self._token[: B * T].view(B, T), self._number[: 3 * B].view(3, B)
        for buffer, values in ((token, token_ids), (numbers, [rows, starts, lasts])):
            buffer.copy_(staged(torch.tensor(values, dtype=torch.int64, device="cpu"), device), non_blocking=True)
        row, start, last = numbers

        def step() -> None:
            x_BTE = prefill_chunk(forward, row, token, 0 if is_first else start)
            x_B1E = x_BTE.gather(1, last[:, None, None].expand(-1, -1, x_BTE.shape[2]))
            self._logits_BV[:B].copy_(forward.parts.logits(forward.parts.head, x_B1E).squeeze(1))

        key = (f"{name} with adapter" if has_adapter else name, T)
        self._graphs.run((*key, B) if name == "prompts" else key, step)
        return self._logits_BV[:B]
