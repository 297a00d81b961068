"""The rules of CUDA-graph capture, checked on the CPU by watching every operation of a step.

A graph replays the recorded kernels on the recorded addresses, without the host. So a step may not ask the host about
data, may not read or write memory that can move, may not have sizes or numbers that change from step to step, and must
leave its results in buffers that stay. Each of these is a fault here, named with the operation.

On a CPU all memory is the host's, so copies between host and device are looked for by name: `.cpu()`, `.tolist()`, and
tensors made without `device=`.
Source of the rules: PyTorch documentation, "CUDA semantics", section on CUDA graphs, constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Operations that wait for a number from the device, or whose result's size is such a number.
HOST_SYNC = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # with a boolean mask: as nonzero
REALLOCATION = {aten.resize_, aten.resize_as_, aten.set_}


def storage_of(tensor: Tensor) -> int:
    """Return a key that is equal for views of the same memory."""
    return tensor.untyped_storage()._cdata


class Watch(TorchDispatchMode):
    """Notes down the operations of one step and the faults among them.

    static: buffers that stay where they are, by name. faults: what would not survive capture. operations: each with
    its sizes and numbers, for comparing two steps. written: names of the buffers that were written to.
    """

    def __init__(self, static: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {storage_of(t): name for name, t in static.items()}
        self.faults: list[str] = []
        self.operations: list[str] = []
        self.written: set[str] = set()
        self._made: dict[int, Tensor] = {}  # kept alive: no address is reused

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet, leaves = operation.overloadpacket, tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # Of indexing, the sizes are known beforehand unless an index is a mask.
        tags = set(operation.tags) - ({torch.Tag.dynamic_output_shape} if packet in INDEXING else set())
        if packet in HOST_SYNC or tags & {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}:
            self.faults.append(f"{operation} makes the host wait for data")
        if packet in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.faults.append(f"{operation} with a boolean mask makes the host wait for the number of elements")
        if packet in REALLOCATION:
            self.faults.append(f"{operation} moves a buffer")
        if packet is aten.lift_fresh:
            self.faults.append(f"{operation}: a tensor made of host data inside the step")
        for tensor in tensors:
            if storage_of(tensor) not in self.names and storage_of(tensor) not in self._made:
                self.faults.append(f"{operation} reads a tensor {tuple(tensor.shape)} that is no static buffer")
        for value, argument in zip(args, operation._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written |= {self.names.get(storage_of(t), "") for t in tree_leaves(value) if isinstance(t, Tensor)}
        described = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.operations.append(f"{operation}{described}")
        result = operation(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and storage_of(made) not in self.names:
                self._made[storage_of(made)] = made
        return result


COPIES_TO_HOST = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__}
FACTORIES = {torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint}
FACTORIES |= {torch.randn, torch.scalar_tensor, torch.tensor, torch.zeros}


class HostWatch(TorchFunctionMode):
    """Notes down calls that on CUDA would copy between host and device, though not on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        to_host = function is Tensor.to and any(str(value) == "cpu" for value in (*args[1:], *kwargs.values()))
        if function in COPIES_TO_HOST or to_host:
            self.faults.append(f"{name} copies to the host")
        if function in FACTORIES and kwargs.get("device") is None:
            self.faults.append(f"{name} without device= makes a tensor on the host")
        return function(*args, **kwargs)


@torch.no_grad()
def capture_faults(
    step: Callable[[], Any], buffers: Callable[[], Mapping[str, Tensor]], results: set[str]
) -> list[str]:
    """Return the reasons why a step cannot be captured in a CUDA graph and replayed; empty if it can.

    step: runs one step; its state advances from step to step. buffers: the static buffers by name, looked up before
    and after. results: names of the buffers that a step must write.
    """
    step()  # what happens once only (caches that fill) is not captured
    before = {name: tensor.data_ptr() for name, tensor in buffers().items()}
    watches, faults = [], []
    for _ in range(2):
        watch, host_watch = Watch(buffers()), HostWatch()
        with host_watch, watch:
            returned = step()
        watches.append(watch)
        faults += watch.faults + host_watch.faults
        faults += [f"{name} is not written" for name in sorted(results - watch.written)]
        faults += [
            f"a returned tensor {tuple(t.shape)} is not in a static buffer"
            for t in tree_leaves(returned)
            if isinstance(t, Tensor) and storage_of(t) not in watch.names
        ]
    after = {name: tensor.data_ptr() for name, tensor in buffers().items()}
    faults += [f"{name} has moved" for name in before if after.get(name) != before[name]]
    first, second = (watch.operations for watch in watches)
    if len(first) != len(second):
        faults.append(f"a step of {len(first)} operations is followed by one of {len(second)}")
    faults += [f"{a} becomes {b} in the next step" for a, b in zip(first, second, strict=False) if a != b]
    return list(dict.fromkeys(faults))
