"""Rows: the buffers of an engine that have one entry per slot of the cache, and the operations on single rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import torch

from qwen3fast.engine.state import EMPTY, GREEDY, DecodeState, ProcessorState, RowSampling
from qwen3fast.model.kv_cache import StaticKVCache

Method = TypeVar("Method", bound=Callable[..., Any])


def on_device(method: Method) -> Method:
    """Run a method without gradients, with `self.device` as the current device: kernels and events go there."""

    @wraps(method)
    def run(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with torch.no_grad(), torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return method(self, *arguments, **keywords)

    return cast(Method, run)


class Rows:
    """Keys and values, sampling state and logits processors of all rows.

    Attributes:
        processors: allocated when a request first needs them, since they are as wide as the vocabulary; None before.
    """

    def __init__(self, cache: StaticKVCache, vocab_size: int, device: torch.device) -> None:
        self.cache, self.device, self._vocab_size = cache, device, vocab_size
        self.state = DecodeState.allocate(cache.max_batch_size, device)
        self.processors: ProcessorState | None = None

    @on_device
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` positions from one row to another."""
        for tensor in self.cache.tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    @on_device
    def swap_rows(self, row: int, other: int, length: int) -> None:
        """Exchange two rows: the first `length` positions of the cache, and all buffers of steps."""
        processors = self.processors.tensors if self.processors is not None else ()
        pairs = [(t[row, :, :length], t[other, :, :length]) for t in self.cache.tensors()]
        pairs += [(t[row : row + 1], t[other : other + 1]) for t in (*vars(self.state).values(), *processors)]
        for mine, others in pairs:
            kept = mine.clone()
            mine.copy_(others)
            others.copy_(kept)

    @on_device
    def set_row(self, row: int, length: int, sampling: RowSampling = GREEDY) -> None:
        """Begin a request in a row whose cache holds `length` tokens.

        Steps of a row with an adapter must be of a kind with `has_adapters`.
        """
        self.state.begin([row], [length], [sampling])

    @on_device
    def set_rows(self, rows: list[int], lengths: list[int], samplings: list[RowSampling]) -> None:
        """Begin requests in several rows: as `set_row` for each."""
        self.state.begin(rows, lengths, samplings)

    @on_device
    def set_processors(self, row: int, *arguments: Any) -> None:
        """Set the logits processors of a row until it is cleared; see `ProcessorState.begin` for the arguments.

        Steps of the row must be of a kind with `is_processed`.
        """
        if self.processors is None:
            self.processors = ProcessorState(self.cache.max_batch_size, self._vocab_size, self.device)
        self.processors.begin(row, *arguments)

    @on_device
    def set_allowed(self, row: int, words_W: np.ndarray) -> None:
        """Set the tokens that a row may choose from: bit v % 32 of word v // 32, int32. Call `set_processors` first."""
        assert self.processors is not None, "the row needs processors"
        self.processors.allow(row, words_W)

    @on_device
    def clear_row(self, row: int) -> None:
        """Make a row empty: it can still take part in steps, and its cache does not change."""
        for tensor in (self.state.advance_R, self.state.input_R, self.state.temperature_R, self.state.adapter_R):
            tensor[row : row + 1].zero_()
        self.state.position_R[row : row + 1].fill_(EMPTY)

    @on_device
    def erase(self, row: int, start: int, end: int) -> None:
        """Write zeros to positions start..end-1 of a row: a NaN there would reach later requests as 0 * NaN."""
        for tensor in self.cache.tensors():
            tensor[row, :, start:end].zero_()

    @on_device
    def clear_processors(self, row: int) -> None:
        """Remove the logits processors of a row."""
        if self.processors is not None:
            self.processors.clear(row)

    def clear_all(self) -> None:
        """Make all rows empty."""
        for row in range(self.cache.max_batch_size):
            self.clear_row(row)
