"""StaticKVCache: keys and values of all layers, allocated once and written in place, at fixed addresses.

A slot is one request's place in the cache. The engine calls it a row.

B batch rows   T tokens in this call   R slots   K key/value heads   D head_dim
S positions of a slot   L positions read
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3fast.model.config import ModelConfig
from qwen3fast.model.memory import free_bytes

logger = logging.getLogger(__name__)


class StaticKVCache:
    """Memory for the keys and values of `max_batch_size` requests, of up to `max_seq_len` tokens each.

    Attention reads the first `bucket(used)` positions, where `used` is the length of the longest text of a step;
    some kernels read only the used positions of each row. Its cost follows the used length, not the allocated one.

    `allocated_len` is max_seq_len rounded up to a multiple of `granularity`, to make room for padded prefill chunks. A
    slot has S = allocated_len + 1 positions. Nothing reads the last one: batch rows without a request write there (to
    position -1). Because of it, attention never reads *all* positions, a case that would be compiled separately.

    Attributes:
        keys, values: one contiguous (R, K, S, D) tensor per layer, zero at first. Positions that a mask hides must
            also hold finite numbers, as 0 * NaN is NaN.
        key_scales, value_scales: for int8, one (R, K, S) tensor per layer, see `CacheLayer`; otherwise empty lists.
        buckets: the numbers of positions that attention may read: multiples of `granularity`; on CUDA fewer (128, 256,
            384, 512, 768, 1024, 1536, ...), since each has graphs of its own.
        allocated_len: the largest bucket. num_bytes: of all tensors.

    Source: gpt-fast and transformers' StaticCache, for fixed addresses (CUDA graphs need them).
    """

    def __init__(
        self,
        config: ModelConfig,
        max_batch_size: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
        granularity: int = 128,
    ) -> None:
        """Allocate. dtype: of keys and values; int8 quantizes each vector with a scale of its own.

        Raises: ValueError for sizes below 1; MemoryError, with the arithmetic, if the device cannot hold it.
        """
        for name, value in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_batch_size, self.max_seq_len, self.granularity = max_batch_size, max_seq_len, granularity
        self.allocated_len = -(-max_seq_len // granularity) * granularity
        self.buckets = list(range(granularity, self.allocated_len + 1, granularity))
        if device.type == "cuda":
            blocks = {n: n // granularity for n in self.buckets}  # kept: powers of two, and three times a power of two
            self.buckets = [n for n, b in blocks.items() if n == self.allocated_len or b // (b & -b) in (1, 3)]
        shape = (max_batch_size, config.num_key_value_heads, self.allocated_len + 1, config.head_dim)
        self.num_bytes = config.kv_bytes_per_token(dtype) * max_batch_size * (self.allocated_len + 1)
        scales = " + 4 bytes per vector" if dtype == torch.int8 else ""
        arithmetic = (
            f"2 (keys, values) x {config.num_hidden_layers} layers x {max_batch_size} slots x "
            f"{config.num_key_value_heads} heads x {self.allocated_len + 1} positions x {config.head_dim} x "
            f"{dtype.itemsize} bytes{scales} = {self.num_bytes / 1e9:.2f} GB"
        )
        free = free_bytes(device)
        if free is not None and self.num_bytes > free:
            raise MemoryError(
                f"KV cache needs {arithmetic}, but {device} has {free / 1e9:.2f} GB free; "
                "lower max_seq_len or max_batch_size"
            )
        logger.info("KV cache: %s", arithmetic)
        layers = range(config.num_hidden_layers)
        self.keys: list[Tensor] = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values: list[Tensor] = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.key_scales: list[Tensor] = []
        self.value_scales: list[Tensor] = []
        if dtype == torch.int8:
            self.key_scales = [torch.zeros(shape[:-1], dtype=torch.float32, device=device) for _ in layers]
            self.value_scales = [torch.zeros(shape[:-1], dtype=torch.float32, device=device) for _ in layers]

    def layers(self, row_B: Tensor | None = None) -> list[CacheLayer]:
        """Return each layer's keys and values, for a batch in the given slots (see `CacheLayer`)."""
        none: list[Tensor | None] = [None] * len(self.keys)
        scales = (self.key_scales or none, self.value_scales or none)
        every = zip(self.keys, self.values, *scales, strict=True)
        return [CacheLayer(k, v, row_B, k_scale, v_scale) for k, v, k_scale, v_scale in every]

    def tensors(self) -> list[Tensor]:
        """Return all tensors; slots are the first dimension of each, positions the third."""
        return [*self.keys, *self.values, *self.key_scales, *self.value_scales]

    def bucket(self, used: int) -> int:
        """Return the number of positions to read when `used` are in use: the smallest of `buckets` that holds them.

        Raises: ValueError if `used` does not fit.
        """
        if not 1 <= used <= self.allocated_len:
            raise ValueError(f"{used} positions do not fit a KV cache of {self.allocated_len}")
        return self.buckets[bisect_left(self.buckets, used)]


class CacheLayer(NamedTuple):
    """One layer of a `StaticKVCache`, (R, K, S, D) each for keys and values, and the slots that a batch uses.

    row_B: (B,) int64, the slot of each batch row; None means slots 0..B-1 in order, which needs no gathering.
    k_scale_RKS, v_scale_RKS: float32, for an int8 cache one scale per key vector and per value vector; otherwise None.
    sdpa_from, tiles_from: settings, not memory: the used lengths from which PyTorch's attention (SDPA) and AMX's tiles
        take over from our C++ for chunks of prompts on CPUs, one per size of chunk (kernels/cpu/prefill.py); empty for
        never.
    """

    k_RKSD: Tensor
    v_RKSD: Tensor
    row_B: Tensor | None = None
    k_scale_RKS: Tensor | None = None
    v_scale_RKS: Tensor | None = None
    sdpa_from: tuple[int, ...] = ()
    tiles_from: tuple[int, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All fields except settings: tensors, or None."""
        return self[:-2]

    def write(self, k_BTKD: Tensor, v_BTKD: Tensor, position_BT: Tensor) -> None:
        """Store new keys and values in place.

        k_BTKD, v_BTKD: any float dtype, converted to the cache's. position_BT: int64, the positions to write.
        """
        row_B = self.row_B if self.row_B is not None else torch.arange(k_BTKD.shape[0], device=position_BT.device)
        # Indexing dimensions 0 and 2 around a slice moves the indexed dimensions to the front: (B, T, K, D).
        place = (row_B[:, None], slice(None), position_BT)
        for x_BTKD, x_RKSD, scale_RKS in (
            (k_BTKD, self.k_RKSD, self.k_scale_RKS),
            (v_BTKD, self.v_RKSD, self.v_scale_RKS),
        ):
            if scale_RKS is not None:
                x_BTKD, scale_RKS[place] = quantize_vectors(x_BTKD)
            x_RKSD[place] = x_BTKD.to(x_RKSD.dtype)

    def read(self, num_rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values of the batch's slots, first `length` positions: (B, K, L, D) each, as `dtype`."""
        read = []
        for x_RKSD, scale_RKS in ((self.k_RKSD, self.k_scale_RKS), (self.v_RKSD, self.v_scale_RKS)):
            x_BKLD = self._gather(x_RKSD[:, :, :length], num_rows)
            if scale_RKS is not None:
                x_BKLD = x_BKLD * self._gather(scale_RKS[:, :, :length], num_rows)[..., None]
            read.append(x_BKLD.to(dtype))
        return read[0], read[1]

    def _gather(self, x: Tensor, num_rows: int) -> Tensor:
        return x[:num_rows] if self.row_B is None else x.index_select(0, self.row_B)


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the vectors of the last dimension to int8, -127 to 127, with one float32 scale per vector.

    NaN and infinity are kept: they make the scale NaN or infinite.
    Returns: int8 of the shape of x, and the scales without the last dimension.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1)
    level = (x * torch.where(largest > 0, 127 / largest, 0.0)[..., None]).round()
    return level.to(torch.int8), largest / 127


CACHE_DTYPES = ("auto", "int8")


def parse_cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of keys and values for a model of `dtype`. Raises: ValueError for a name not in CACHE_DTYPES."""
    if name not in CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {name!r}")
    return torch.int8 if name == "int8" else dtype
