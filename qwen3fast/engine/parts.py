"""The pieces of a forward pass as plain functions: what `StepCompiler` compiles, and what runs as it is without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3fast.engine.compile import StepCompiler
from qwen3fast.model import Block, CacheLayer, Qwen3
from qwen3fast.sampling import SamplerKind, SamplerRows, sample


def run_block(
    block: Block,
    x_BTE: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    position_BT: Tensor,
    mask_BTL: Tensor,
    k_RKSD: Tensor,
    v_RKSD: Tensor,
    row_B: Tensor | None,
) -> Tensor:
    """One block over the KV cache; see `Attention.forward`."""
    return block(x_BTE, cos_BTD, sin_BTD, position_BT, mask_BTL, CacheLayer(k_RKSD, v_RKSD, row_B))


def run_block_uncached(block: Block, x_BTE: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """One block over the tokens at hand alone."""
    return block(x_BTE, cos_BTD, sin_BTD)


def run_logits(model: Qwen3, x_BTE: Tensor) -> Tensor:
    """Final norm and output projection, (B, 1, E) -> (B, 1, V)."""
    return model.logits(x_BTE)


@dataclass(frozen=True)
class Parts:
    """The functions above, compiled or not, and one sampler for each kind."""

    block: Callable[..., Tensor]
    block_uncached: Callable[..., Tensor]
    logits: Callable[..., Tensor]
    samplers: dict[SamplerKind, Callable[[Tensor, SamplerRows], Tensor]]

    @classmethod
    def build(cls, compiler: StepCompiler) -> Parts:
        """Wrap each part with the compiler; nothing is compiled before its first call."""
        return cls(
            block=compiler.compile(run_block),
            block_uncached=compiler.compile(run_block_uncached),
            logits=compiler.compile(run_logits),
            samplers={
                SamplerKind.GREEDY: compiler.compile(_sample_greedy),
                SamplerKind.WINDOW: compiler.compile(_sample_window),
                SamplerKind.FULL: compiler.compile(_sample_full),
            },
        )


def mark_dynamic(*tensors_and_dims: Any) -> None:
    """Tell the compiler which dimensions vary: pairs of a tensor and a dimension, one after the other."""
    for tensor, dim in zip(tensors_and_dims[::2], tensors_and_dims[1::2], strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)


# A function each: compiled code is kept per function, so a batch looks among its own sampler's variants only.
def _sample_greedy(logits_BV: Tensor, rows: SamplerRows) -> Tensor:
    return sample(logits_BV, rows, SamplerKind.GREEDY)


def _sample_window(logits_BV: Tensor, rows: SamplerRows) -> Tensor:
    return sample(logits_BV, rows, SamplerKind.WINDOW)


def _sample_full(logits_BV: Tensor, rows: SamplerRows) -> Tensor:
    return sample(logits_BV, rows, SamplerKind.FULL)
