"""StaticKVCache: keys and values of every layer, preallocated once, written in place, never moved.

R rows (one request each)   K key/value heads   S positions allocated   D head_dim
"""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from qwen3fast.config import ModelConfig

logger = logging.getLogger(__name__)


class StaticKVCache:
    """Memory for `max_batch_size` requests of up to `max_seq_len` tokens.

    keys, values: one contiguous (R, K, S, D) tensor a layer, zero at first (a masked slot must hold a finite number:
    0 * NaN is NaN). S is max_seq_len rounded up to `granularity`, so that padded prefill chunks always fit, plus one:
    the positions read are then never *all* positions, a special case that would have to be compiled separately.
    Attention reads the first `bucket(used)` positions only, so cost follows the used length.
    Source of the fixed-address design: gpt-fast and transformers' StaticCache (CUDA graphs need constant addresses).
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
        """Allocate.

        Raises: ValueError for sizes below 1; MemoryError, with the arithmetic, if the device cannot hold it.
        """
        for name, value in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.max_batch_size, self.max_seq_len, self.granularity = max_batch_size, max_seq_len, granularity
        self.allocated_len = -(-max_seq_len // granularity) * granularity
        shape = (max_batch_size, config.num_key_value_heads, self.allocated_len + 1, config.head_dim)
        self.num_bytes = config.kv_bytes_per_token(dtype) * max_batch_size * (self.allocated_len + 1)
        arithmetic = (
            f"2 (keys, values) x {config.num_hidden_layers} layers x {max_batch_size} rows x "
            f"{config.num_key_value_heads} heads x {self.allocated_len + 1} positions x {config.head_dim} x "
            f"{dtype.itemsize} bytes = {self.num_bytes / 1e9:.2f} GB"
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

    def bucket(self, used: int) -> int:
        """Positions to read when `used` are in use: the next multiple of `granularity`.

        Raises: ValueError if `used` does not fit.
        """
        if not 1 <= used <= self.allocated_len:
            raise ValueError(f"{used} positions do not fit a KV cache of {self.allocated_len}")
        return -(-used // self.granularity) * self.granularity


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            available = next(line for line in meminfo if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
