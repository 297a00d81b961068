"""Tensors that say they are on a CUDA device, without memory: a step runs on them as on a GPU, in shapes alone.

PyTorch's FakeTensorMode refuses what a GPU would: tensors of two devices in one operation, numbers and shapes that
depend on data. A PyTorch without CUDA refuses one thing more, indexing with brackets (its C++ part asks for the CUDA
runtime), so this is written out here in operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class _Indexing(TorchFunctionMode):
    """Brackets on CUDA tensors as the operations that they stand for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type == "cuda":
            view, indices = _sliced(args[0], args[1])
            if function is Tensor.__getitem__:
                return aten.index(view, indices) if indices else view
            if indices:
                return aten.index_put_(view, indices, args[2])
            return view.copy_(args[2]) if isinstance(args[2], Tensor) else view.fill_(args[2])
        return function(*args, **(kwargs or {}))


def _sliced(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that numbers, slices and None of an index give, and the index tensors for its dimensions."""
    dimension, indices = 0, []
    for part in index if isinstance(index, tuple) else (index,):
        if part is None:
            tensor = tensor.unsqueeze(dimension)
        elif isinstance(part, slice):
            tensor = aten.slice(tensor, dimension, part.start, part.stop, part.step or 1)
        elif isinstance(part, int):
            tensor = aten.select(tensor, dimension, part)
            continue
        elif isinstance(part, Tensor):
            indices += [None] * (dimension - len(indices)) + [part]
        else:
            raise NotImplementedError(f"indexing with {part!r}")
        dimension += 1
    return tensor, indices


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """What is made inside is fake; gives the CUDA device to make it on."""
    with FakeTensorMode(), _Indexing(), torch.no_grad():
        yield torch.device("cuda", 0)
