"""Sizes that vary at run time, and the properties of tensors that select a compiled form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Dynamic(NamedTuple):
    """A size that varies at run time, from min to max.

    example: the size to compile with. Sizes that may differ need different examples: `torch.compile` assumes that
    equal ones are always equal.
    """

    example: int
    min: int = 2
    max: int = 2**31 - 1

    def holds(self, size: int) -> bool:
        """Return whether a size is in the range."""
        return self.min <= size <= self.max


# A tensor's dynamic dimensions, each with one range or several, of which each has a form of its own.
Sizes = dict[int, tuple[Dynamic, ...]]
Ranges = Sequence[dict[int, Dynamic]]  # of one form


def find_ranges(tensors: Sequence[Tensor | None], dynamic: Sequence[Sizes]) -> Ranges:
    """Return the range of each dynamic size.

    A size outside all ranges is static and has a form of its own. All sizes are static if a tensor is not in order.
    """
    pairs = [(tensor, sizes if tensor is not None else {}) for tensor, sizes in zip(tensors, dynamic, strict=True)]
    if not all(tensor is None or not sizes or is_in_order(tensor) for tensor, sizes in pairs):
        return [{} for _ in tensors]
    ranges: list[dict[int, Dynamic]] = []
    for tensor, sizes in pairs:
        held = {i: [size for size in options if size.holds(tensor.shape[i])] for i, options in sizes.items()}  # type: ignore[union-attr]
        ranges.append({i: options[0] for i, options in held.items() if options})
    return ranges


def static_shape(tensor: Tensor | None, sizes: dict[int, Dynamic]) -> tuple[Any, ...] | None:
    """Return the properties that a form depends on: dtype, sizes or ranges, and strides of tensors not in order."""
    if tensor is None:
        return None
    shape = tuple(sizes.get(i, n) for i, n in enumerate(tensor.shape))
    return (tensor.dtype, shape, None if is_in_order(tensor) else tensor.stride())


def is_in_order(tensor: Tensor) -> bool:
    """Return whether strides are equal to a new tensor's: `torch.compile` checks also strides of size-1 dimensions."""
    stride = 1
    for size, actual in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if actual != stride:
            return False
        stride *= max(size, 1)
    return True
