"""Products of many rows by tiles (tiles.cpp), for processors with AMX; elsewhere the same code is plain C++, and slow.

A system may withhold tiles that its processor has, and on some the first tile instruction ends the program: they are
tried when the operations are loaded, in a child process. They are among the forms that are measured:
of products, in bfloat16 and, for weights in 4 to 8 bits, in int8; of prefill attention; and of decode steps with
weights in bfloat16. Those in bfloat16 are the first form, except of experts, and of decode steps of few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure

import torch
from torch import Tensor

from qwen3fast.kernels.cpu.levels import processor_features
from qwen3fast.kernels.cpu.library import functions, usable_levels
from qwen3fast.kernels.cpu.structures import LANES, LinearPointers, Tiles, require

_are_usable = _are_refused = False


def try_tiles() -> None:
    """Try tiles where they are announced; they are used from now on if they work."""
    global _are_usable, _are_refused
    if are_announced():
        _are_usable = functions().qwen3fast_try_tiles()
        _are_refused = not _are_usable


def are_announced() -> bool:
    """Return whether the processor lists tiles of bfloat16 and int8 among its features, and no other level is pinned.

    False also once they were tried without success.
    Raises: ValueError as `usable_levels`.
    """
    if _are_refused:
        return False
    levels = usable_levels()  # none: what is built for this processor
    is_level = not levels or levels[0].name == "amx"
    return is_level and {"amx_tile", "amx_bf16", "amx_int8"} <= set(processor_features().split())


def are_usable() -> bool:
    """Return whether tiles were tried with success: by `try_tiles`, in a child process (milliseconds)."""
    return _are_usable


def tile_linear(x: Tensor, weights: Sequence[Structure], tiles: Tiles = Tiles.BFLOAT16) -> Tensor:
    """Return x @ weight.T for weights of the same K, side by side, (..., N) bfloat16. x: (..., K) bfloat16.

    weights: in any formats. tiles: INT8 quantizes x for weights of which `has_int8_tiles` is true. K: a multiple of 32;
    each N: of 16.
    Raises: ValueError for other sizes.
    """
    K = x.shape[-1]
    require(
        K % 32 == 0 and all(linear.K == K and linear.N % LANES == 0 for linear in weights),
        "tile_linear: K must be a multiple of 32, N of 16",
    )
    linears = (LinearPointers * len(weights))(*weights)
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], sum(linear.N for linear in weights)))
    functions().qwen3fast_tile_linear(
        x.data_ptr(), linears, len(linears), y.data_ptr(), x.numel() // K, tiles, torch.get_num_threads()
    )
    return y
