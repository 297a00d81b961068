"""The state that kernels choose their form by: compiled code, or uncompiled code with C++ operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch.compiler import is_compiling

__all__ = ["is_compiling", "may_use_operations", "operations"]

# Per thread: one thread may run with operations while another one compares with the plain forms.
_uses_operations: ContextVar[bool] = ContextVar("uses_operations", default=False)


def may_use_operations() -> bool:
    """Return whether C++ operations may replace PyTorch's: in compiled code, and inside `operations()`.

    `torch.compile` knows the first value and does not trace further.
    """
    return is_compiling() or _uses_operations.get()


@contextmanager
def operations() -> Iterator[None]:
    """Let uncompiled code inside the block use C++ operations."""
    token = _uses_operations.set(True)
    try:
        yield
    finally:
        _uses_operations.reset(token)
