"""Work of a step, in each of its forms: `kernels/forms.py` measures it, and the suite "forms" shows it.

T query tokens   L cache positions read   H query heads   K key/value heads   D head_dim   M rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3fast.kernels.compiling import operations
from qwen3fast.kernels.cpu import tiles
from qwen3fast.kernels.cpu.prefill import CHUNKS
from qwen3fast.kernels.cpu.structures import LOSSLESS_BITS, RowLimits, has_int8_tiles, packed_linear
from qwen3fast.kernels.forms import FormCase

CPP, SDPA, TILES, DEQUANTIZED, LINEAR = "C++", "SDPA", "tiles", "dequantized", "F.linear"
INT8_TILES = "int8 tiles"
BFLOAT16 = "bfloat16"  # the format of weights that are not quantized
LONG = 2048  # used length at which attention of a chunk is measured, beside the chunk's own
ROWS = (32, 128, 512)  # at which products are measured
LIMITS = {CPP: RowLimits(), INT8_TILES: RowLimits(int8_tiles=0), TILES: RowLimits(tiles=0)}
LIMITS |= dict.fromkeys((DEQUANTIZED, LINEAR), RowLimits(dequantized=0))

Calls = Mapping[str, Callable[[], Any]]


def prefill_attention_case(tokens: int, length: int, heads: tuple[int, int, int], dtype: torch.dtype) -> FormCase:
    """Return attention of a chunk of `tokens` that ends at `length`. heads: H, K, D. dtype: of the cache.

    All heads take the same time and are split over the threads: one per thread is measured, at least two.
    """
    H, K, D = heads
    measured_K = min(K, max(2, torch.get_num_threads()))
    key = f"{tokens} tokens at {length}, {H}/{K} heads of {D}, {str(dtype).removeprefix('torch.')}"
    names = (*_cpp_forms(), SDPA)
    calls = partial(_prefill_attention, names, tokens, length, (H // K * measured_K, measured_K, D), dtype)
    return FormCase("prefill attention", key, names, calls, (tokens, length))


@torch.no_grad()
def _prefill_attention(
    names: Sequence[str], tokens: int, length: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> Calls:
    H, K, D = heads
    is_int8 = dtype == torch.int8
    x_1KSD = torch.full((1, K, length + 1, D), 3 if is_int8 else 0.1, dtype=dtype)  # times do not depend on values
    scale_1KS = torch.full((1, K, length + 1), 1 / 30, dtype=torch.float32) if is_int8 else None
    q_1THD = torch.full((1, tokens, H, D), 0.1, dtype=torch.bfloat16)
    position_1T = torch.arange(length - tokens, length)[None]
    fixed = (q_1THD, x_1KSD, x_1KSD, position_1T, torch.zeros(1, dtype=torch.int64), scale_1KS, scale_1KS)
    always = [0] * len(CHUNKS)
    lengths = {CPP: ([], []), SDPA: (always, []), TILES: ([], always)}
    return {name: _without_grad(torch.ops.qwen3fast.prefill_attention, *fixed, *lengths[name]) for name in names}


def _cpp_forms() -> tuple[str, ...]:
    """Return our own forms. Until something is measured, the first serves: tiles, if any; they are much faster."""
    return (TILES, CPP) if tiles.are_announced() else (CPP,)


def linear_case(rows: int, weight: Sequence[Tensor], format: str = BFLOAT16) -> FormCase:
    """Return the product of `rows` rows with a weight; see `linear` and `quantized_linear` in kernels/cpu/ops.py.

    weight: one tensor in bfloat16, or packed weight and scale.
    """
    (N, K), names = weight[0].shape[:2], (*_cpp_forms(), LINEAR)
    if len(weight) > 1:
        linear = packed_linear(*weight)
        N, K = linear.N, linear.K
        int8 = (INT8_TILES,) if tiles.are_announced() and has_int8_tiles(linear) else ()
        names = (*_cpp_forms(), *int8, DEQUANTIZED)
    calls = partial(_linear, rows, K, weight, names)
    return FormCase(f"linear {format}", f"{rows} rows, {N} x {K}", names, calls, (rows,))


def experts_case(what: str, rows: int, chosen: int, gate_up: list[Tensor], down: list[Tensor]) -> FormCase:
    """Return the experts of `rows` tokens, `chosen` of them each; weights as `quantized_experts` takes them.

    Only `chosen` experts are measured, each with the number of tokens that falls to it on average.
    """
    first, second = packed_linear(*gate_up[:2]), packed_linear(*down)
    I, E = second.K, first.K  # noqa: E741
    X, names = second.N // E, (CPP,)
    if len(gate_up) == 2 and LOSSLESS_BITS not in (first.bits, second.bits):
        by_tiles = [INT8_TILES, TILES] if has_int8_tiles(first) or has_int8_tiles(second) else [TILES]
        names = (CPP, *(by_tiles if tiles.are_announced() else ()), DEQUANTIZED)
    calls = partial(_experts, max(1, rows * chosen // X), chosen, (gate_up, down), names)
    return FormCase(what, f"{rows} rows, {chosen} of {X} experts, {I} x {E}", names, calls, (rows,))


def _experts(rows: int, chosen: int, weights: tuple[list[Tensor], list[Tensor]], names: tuple[str, ...]) -> Calls:
    x_NE = torch.full((rows, packed_linear(*weights[0][:2]).K), 0.1, dtype=torch.bfloat16)
    expert_NC = torch.arange(chosen).repeat(rows, 1)
    operation = partial(torch.ops.qwen3fast.quantized_experts, x_NE, expert_NC, *weights)
    return {name: _without_grad(operation, LIMITS[name]) for name in names}


def _linear(rows: int, K: int, weight: Sequence[Tensor], names: tuple[str, ...]) -> Calls:
    x_MK = torch.full((rows, K), 0.1, dtype=torch.bfloat16)
    if len(weight) == 1:
        operation = partial(torch.ops.qwen3fast.linear, x_MK, *weight)
    else:
        operation = partial(torch.ops.qwen3fast.quantized_linear, x_MK, *([tensor] for tensor in weight))
    return {name: _without_grad(operation, LIMITS[name]) for name in names}


def _without_grad(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad(), operations():
            return function(*arguments)

    return call
