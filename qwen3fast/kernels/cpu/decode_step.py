"""`qwen3fast_decode_step` of ops.h: a whole decode step in one call; weights, cache and buffers must stay in place."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.decode_layers import (
    MAX_DECODE_ROWS,
    AdaptersOfLayers,
    DecodeLayersCall,
    LayerWeight,
    has_whole_lanes,
    norm_pointer,
    table_pointers,
    weight_pointers,
)
from qwen3fast.kernels.cpu.library import functions
from qwen3fast.kernels.cpu.sampler import sampling_pointers
from qwen3fast.kernels.cpu.structures import Ends, NotServedError, Tiles, address, require


class EndTensors(NamedTuple):
    """Embedding (V, E), the final norm's weight (E,), and output projection (V, E)."""

    embedding: LayerWeight
    norm: Tensor
    head: LayerWeight


class StepTensors(NamedTuple):
    """The buffers of decode steps, (R,) int64, under their names in engine/state.py."""

    input: Tensor
    position: Tensor
    output: Tensor
    step: Tensor
    advance: Tensor


def end_pointers(ends: EndTensors, E: int) -> tuple[Structure, Structure, int]:
    """Return embedding, output projection and norm for blocks of this hidden size.

    Raises: NotServedError for other dtypes and sizes.
    """
    embedding, head = weight_pointers(*ends.embedding), weight_pointers(*ends.head)
    require(
        embedding.K == head.K == E and has_whole_lanes(embedding) and has_whole_lanes(head),
        "decode_step: embedding and output projection must be (V, E), sizes multiples of 16 (packed: E of 32)",
        NotServedError,
    )
    return embedding, head, norm_pointer(ends.norm, E)


class DecodeStepCall:
    """A call that runs a whole decode step, from input tokens to logits, or to the next step's input tokens."""

    def __init__(
        self,
        blocks: DecodeLayersCall,
        ends: EndTensors,
        state: StepTensors,
        sampling: Sequence[Tensor],
        cos_SD: Tensor,
        sin_SD: Tensor,
        adapters: AdaptersOfLayers | None = None,
    ) -> None:
        """Check all tensors, and keep their addresses.

        sampling: the fields of `SamplerRows`, (R,). cos_SD, sin_SD, adapters: as of blocks.
        Raises: ValueError for unsupported tensors.
        """
        self._blocks, self._adapters = blocks, adapters
        self._tensors = [
            x.detach()
            for x in (*ends.embedding, ends.norm, *ends.head, *state, *sampling, cos_SD, sin_SD)
            if x is not None
        ]
        buffers = [address("decode_step: buffers", tensor, torch.int64, blocks.R) for tensor in state]
        self._tables = table_pointers("decode_step", blocks.sizes.D, cos_SD, sin_SD)
        end = min(blocks.sizes.S, len(cos_SD), len(sin_SD))
        self._ends = Ends(*end_pointers(ends, blocks.sizes.E), *buffers, end)
        self._sampling = sampling_pointers(sampling, blocks.R)

    def choose(self, num_rows: int, is_greedy: bool, tiles: Tiles = Tiles.NONE) -> None:
        """Choose the tokens of rows 0..num_rows-1 as `sample` does, write them to the buffers, and advance.

        num_rows: up to MAX_DECODE_ROWS. is_greedy: whatever the sampling parameters are. tiles: of products with
        weights in bfloat16.
        Raises: ValueError for input tokens or positions that do not exist.
        """
        self._run(num_rows, None if is_greedy else byref(self._sampling), None, tiles)

    def logits(self, num_rows: int, tiles: Tiles = Tiles.NONE) -> Tensor:
        """Return the logits of rows 0..num_rows-1, (B, V) float32; arguments and errors as of `choose`."""
        logits_BV = torch.empty(num_rows, self._ends.head.N, dtype=torch.float32, device="cpu")
        self._run(num_rows, None, logits_BV.data_ptr(), tiles)
        return logits_BV

    def _run(self, num_rows: int, sampling: Any, logits: int | None, tiles: Tiles) -> None:
        most = min(MAX_DECODE_ROWS, self._blocks.R)
        require(1 <= num_rows <= most, f"decode_step: there must be 1 to {most} rows")
        adapters = None if self._adapters is None else byref(self._adapters.structure)
        lost = functions().qwen3fast_decode_step(
            *self._blocks.fixed(num_rows),
            *self._tables,
            byref(self._ends),
            adapters,
            sampling,
            logits,
            tiles,
            torch.get_num_threads(),
        )
        require(lost != -1, "decode_step: an input token is not in the vocabulary, or a position not in the cache")
        self._blocks.lost = lost
