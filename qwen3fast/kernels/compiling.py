"""Whether the code that runs is being compiled, or is to run fast as it is: kernels choose their form by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# A thread's own: while one thread compiles, another may run the same code eagerly.
_is_compiling: ContextVar[bool] = ContextVar("is_compiling", default=False)
_uses_operations: ContextVar[bool] = ContextVar("uses_operations", default=False)


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


def may_use_operations() -> bool:
    """True where C++ operations may take the place of PyTorch's: in compiled code, and inside of `operations()`."""
    return is_compiling() or _uses_operations.get()


@contextmanager
def operations() -> Iterator[None]:
    """What runs inside is not compiled, but may use C++ operations all the same."""
    token = _uses_operations.set(True)
    try:
        yield
    finally:
        _uses_operations.reset(token)
