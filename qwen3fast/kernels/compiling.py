"""Whether the code that runs is being compiled, or is to run fast uncompiled: kernels choose their form by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch.compiler import is_compiling

__all__ = ["is_compiling", "may_use_operations", "operations"]

# A thread's own: one thread may run with operations while another compares with the plain forms.
_uses_operations: ContextVar[bool] = ContextVar("uses_operations", default=False)


def may_use_operations() -> bool:
    """Return whether C++ operations may take the place of PyTorch's: in compiled code, and inside of `operations()`.

    `torch.compile` knows the first answer, and does not look any further.
    """
    return is_compiling() or _uses_operations.get()


@contextmanager
def operations() -> Iterator[None]:
    """Let what runs inside, which is not compiled, use C++ operations all the same."""
    token = _uses_operations.set(True)
    try:
        yield
    finally:
        _uses_operations.reset(token)
