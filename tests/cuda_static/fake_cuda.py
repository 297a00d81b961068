"""Tensors that say they are on a CUDA device, without memory: a step runs on them as on a GPU, in shapes alone.

PyTorch's FakeTensorMode refuses what a GPU would: tensors of two devices in one operation, numbers and shapes that
depend on data. A PyTorch without CUDA refuses one thing more, indexing with brackets, `contiguous()` and `copy_()`
(their C++ parts ask for the CUDA runtime), so these are written out here in operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from qwen3fast.model import Qwen3, build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.quantization.convert import quantize_model
from qwen3fast.quantization.formats import Format

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
            return (aten.copy_ if isinstance(args[2], Tensor) else aten.fill_)(view, args[2])
        if function is Tensor.contiguous and args[0].device.type == "cuda":
            return aten.clone(args[0], memory_format=torch.contiguous_format)
        if function is Tensor.copy_ and args[0].device.type == "cuda":
            return aten.copy_(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _sliced(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that numbers, slices and None of an index give, and the index tensors for its dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    rest = tensor.dim() - sum(part is not None and part is not ... for part in parts)  # what `...` stands for
    parts = [p for part in parts for p in ([slice(None)] * rest if part is ... else [part])]
    dimension, indices = 0, []
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(dimension)
        elif isinstance(part, slice):
            if part != slice(None):  # PyTorch makes no view of it, and compilers write into the tensor itself
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
def fake_cuda(capability: tuple[int, int] = (9, 0), index: int = 0) -> Iterator[torch.device]:
    """Make tensors inside the block fake, and yield their CUDA device. capability, index: of the GPU to imitate."""
    free_and_total = (80 << 30, 80 << 30)
    with (
        FakeTensorMode(),
        _Indexing(),
        torch.no_grad(),
        patch.object(torch.cuda, "is_available", lambda: False),  # on a machine with a GPU as on others
        patch.object(torch.cuda, "mem_get_info", lambda device: free_and_total),
        patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
        patch.object(torch.backends.cuda, "is_flash_attention_available", lambda: True),
    ):
        yield torch.device("cuda", index)


def fake_model(config: ModelConfig, device: torch.device, quantization: str | Format | None = None) -> Qwen3:
    """A model without memory, in the config's dtype or a quantized format; to be called inside `fake_cuda`."""
    with unset_fake_temporarily():
        model = build_on_meta(config)
        if quantization is not None:
            quantize_model(model, quantization, config.dtype)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module._parameters[name] = made.setdefault(parameter, nn.Parameter(empty, requires_grad=False))
    return model
