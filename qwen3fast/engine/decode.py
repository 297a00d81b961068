"""Decode: one step makes one token for each row, reading and writing only buffers that were allocated once.

The step feeds itself: it samples, writes the token into the input buffer and advances the positions on the device.
Rule of this file: no `.item()`, no shape that depends on data, no new address between steps.

    B rows of this step   L cache positions read   D head_dim   V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qwen3fast.engine.parts import Parts
from qwen3fast.kv_cache import StaticKVCache
from qwen3fast.model import Qwen3
from qwen3fast.sampling import SamplerKind, SamplerRows


@dataclass(frozen=True)
class DecodeState:
    """What a step reads and writes, one entry a row. Fields of `SamplerRows` have the same meaning here.

    input_R: the token to feed, int64. output_R: the token sampled last, -1 for invalid logits. position_R: where the
    input token stands. advance_R: 1 for rows in use, 0 for empty ones, which run along without moving.
    """

    input_R: Tensor
    output_R: Tensor
    position_R: Tensor
    advance_R: Tensor
    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    step_R: Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device) -> DecodeState:
        """Buffers for `rows` rows, all empty."""
        real = {"temperature_R", "top_p_R", "min_p_R"}
        return cls(
            **{
                f.name: torch.zeros(rows, dtype=torch.float32 if f.name in real else torch.int64, device=device)
                for f in fields(cls)
            }
        )

    def sampler_rows(self, rows: slice | Tensor) -> SamplerRows:
        """The sampling parameters of some rows."""
        return SamplerRows(
            self.temperature_R[rows],
            self.top_k_R[rows],
            self.top_p_R[rows],
            self.min_p_R[rows],
            self.seed_R[rows],
            self.step_R[rows],
        )


def decode_step(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    cos_SD: Tensor,
    sin_SD: Tensor,
    state: DecodeState,
    num_rows: int,
    length: int,
    kind: SamplerKind,
) -> None:
    """Run rows 0..num_rows-1 one token further; `length` must cover every row's position. Results are in `state`."""
    rows = slice(num_rows)
    position_B1 = state.position_R[rows, None]
    x_B1E = model.embed(state.input_R[rows, None])
    if parts.decode_layers is not None and parts.decode_layers.serves(num_rows):
        x_B1E = parts.decode_layers(x_B1E, cos_SD, sin_SD, position_B1)
    else:
        x_B1E = _run_blocks(model, parts, cache, x_B1E, cos_SD[position_B1], sin_SD[position_B1], position_B1, length)
    logits_BV = parts.logits(parts.head, x_B1E).squeeze(1)
    token_B = parts.samplers[kind](None, logits_BV, *state.sampler_rows(rows))
    state.output_R[rows] = token_B
    # An invalid token (-1) is the host's to notice; what is fed on must be an id.
    state.input_R[rows] = token_B.clamp(min=0)
    state.position_R[rows] += state.advance_R[rows]
    state.step_R[rows] += state.advance_R[rows]


def _run_blocks(
    model: Qwen3,
    parts: Parts,
    cache: StaticKVCache,
    x_B1E: Tensor,
    cos_B1D: Tensor,
    sin_B1D: Tensor,
    position_B1: Tensor,
    length: int,
) -> Tensor:
    mask_B1L = torch.arange(length, device=position_B1.device) <= position_B1[..., None]
    shared = (cos_B1D, sin_B1D, position_B1, mask_B1L)
    layers = cache.layers()
    run_block = parts.decode_block.choose(model.model.layers[0], x_B1E, *shared, *layers[0])
    for block, layer in zip(model.model.layers, layers, strict=True):
        x_B1E = run_block(block, x_B1E, *shared, *layer)
    return x_B1E
