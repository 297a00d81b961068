"""Watches Triton's interpreter for faults that only a GPU would show.

Programs of a grid run in no certain order: here in any order, and no address may be written by two. A read or write
outside of the kernel's arguments may hit other memory, or none.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from torch import Tensor


def watch_memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Check all reads and writes from now on. Returns: a list that accesses outside of arguments are put into."""
    from triton.runtime import interpreter

    kind, call = type(interpreter.interpreter_builder), interpreter.GridExecutor.__call__
    load, store = kind.create_masked_load, kind.create_masked_store
    outside: list[str] = []
    kernel, extents = "", np.zeros((0, 2), dtype=np.uint64)

    def noted_call(executor: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal kernel, extents
        tensors = [t for t in (*arguments, *options.values()) if isinstance(t, Tensor) and t.numel()]
        kernel, extents = executor.fn.__name__, np.array([_extent(t) for t in tensors], dtype=np.uint64)
        return call(executor, *arguments, **options)

    def check(access: str, pointers: Any, mask: Any) -> None:
        address = pointers.data[mask.data.astype(bool)]
        first, last = (address.min(), address.max()) if address.size else (0, 0)
        if not address.size or any(start <= first and last < end for start, end in extents):
            return  # all of them in one argument, which takes less time to see
        is_inside = np.zeros(address.shape, dtype=bool)
        for start, end in extents:
            is_inside |= (address >= start) & (address < end)
        if not is_inside.all():
            outside.append(f"{kernel} {access} outside of its arguments")

    def checked_load(self: Any, pointers: Any, mask: Any, *options: Any, **others: Any) -> Any:
        check("reads", pointers, mask)
        return load(self, pointers, mask, *options, **others)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        check("writes", pointers, mask)
        return store(self, pointers, value, mask, *options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", noted_call)
    monkeypatch.setattr(kind, "create_masked_load", checked_load)
    monkeypatch.setattr(kind, "create_masked_store", checked_store)
    return outside


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def watch_programs(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> list[str]:
    """Run each grid's programs in a random order from now on. Returns: a list that conflicts of writes are put into."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    kind, call, store = type(builder), interpreter.GridExecutor.__call__, type(builder).create_masked_store
    set_index = kind.set_grid_idx
    writer: dict[int, Any] = {}
    conflicts: list[str] = []

    def shuffled_call(executor: Any, *arguments: Any, **options: Any) -> Any:
        sizes = [*executor.grid, 1, 1][:3]
        order = [(x, y, z) for x in range(sizes[0]) for y in range(sizes[1]) for z in range(sizes[2])]
        shuffled = dict(zip(order, random.Random(seed).sample(order, len(order)), strict=True))
        monkeypatch.setattr(kind, "set_grid_idx", lambda self, *at: set_index(self, *shuffled[at]))
        writer.clear()
        return call(executor, *arguments, **options)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        for address in pointers.data[mask.data].flatten().tolist():
            if writer.setdefault(address, self.grid_idx) != self.grid_idx:
                conflicts.append(f"programs {writer[address]} and {self.grid_idx} write to one address")
        return store(self, pointers, value, mask, *options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", shuffled_call)
    monkeypatch.setattr(kind, "create_masked_store", watched_store)
    return conflicts
