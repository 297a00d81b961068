"""Programs of a Triton grid run in no certain order. In the interpreter: any order, and no address written by two."""

from __future__ import annotations

import random
from typing import Any

import pytest


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
