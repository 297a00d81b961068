"""Whether the code that runs is being compiled: kernels choose their form by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# A thread's own: while one thread compiles, another may run the same code eagerly.
_is_compiling: ContextVar[bool] = ContextVar("is_compiling", default=False)


def is_compiling() -> bool:
    """True while `engine/compile.py` records this thread's operations, and only then."""
    return not torch.compiler.is_dynamo_compiling() and _is_compiling.get()


@contextmanager
def compiling() -> Iterator[None]:
    """What runs inside is being compiled."""
    token = _is_compiling.set(True)
    try:
        yield
    finally:
        _is_compiling.reset(token)
