"""GPUs as compilers see them, and a context in which PyTorch and Triton believe that one is there."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._dynamo import device_interface
from torch._inductor.fx_passes import joint_graph
from torch._inductor.runtime import hints, triton_helpers
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Gpu:
    """The properties of a device that compilers read. Source: CUDA C++ Programming Guide."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # that a block can have at most

    @property
    def target(self) -> GPUTarget:
        """The target of Triton's compiler."""
        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)


GPUS = {
    "sm_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * 1024),
    "sm_90": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 * 1024),
    "sm_100": Gpu("NVIDIA B200", (10, 0), 148, 227 * 1024),
}


class Driver:
    """A stand-in for Triton's CUDA driver."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        limits = {"max_shared_mem": gpu.shared_bytes, "multiprocessor_count": gpu.multiprocessors}
        limits |= {"warpSize": 32, "max_num_regs": 65536}
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: limits)

    def get_current_target(self) -> GPUTarget:
        """Return the GPU's target."""
        return self._gpu.target

    def get_current_device(self) -> int:
        """Return the only device's number."""
        return 0

    def get_current_stream(self, *_: Any) -> int:
        """Return the default stream."""
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        """Return the GPU's compute capability."""
        return self._gpu.capability

    def get_active_torch_device(self) -> torch.device:
        """Return PyTorch's name of the device."""
        return torch.device("cuda", 0)


class _OnHost(TorchDispatchMode):
    """Inductor folds constants by computing them on the device; here on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


@contextmanager
def pretended(gpu: Gpu) -> Iterator[None]:
    """Let PyTorch and Triton believe that this GPU is there."""
    properties = types.SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors,
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=gpu.shared_bytes,
        shared_memory_per_multiprocessor=gpu.shared_bytes + 1024,
        L2_cache_size=50 << 20,
        gcnArchName="",
        is_integrated=0,
    )
    interface, cuda = device_interface.CudaInterface, torch.cuda
    fold = joint_graph.UniformValueConstantFolder._deduce_value

    def fold_on_host(self: Any, node: Any) -> Any:
        with _OnHost():
            return fold(self, node)

    active = triton.runtime.driver
    before = active._active
    hints.DeviceProperties.create.cache_clear()
    device_interface.caching_worker_device_properties.pop("cuda", None)
    device_interface.caching_worker_current_devices["cuda"] = 0
    with ExitStack() as patches:
        for owner, name, value in (
            (cuda, "get_device_properties", lambda *_, **__: properties),
            (cuda, "get_device_capability", lambda *_, **__: gpu.capability),
            (cuda, "get_device_name", lambda *_: gpu.name),
            (cuda, "mem_get_info", lambda *_: (80 << 30, 80 << 30)),
            (cuda, "device_count", lambda: 1),
            (cuda, "current_device", lambda: 0),
            (cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.backends.cuda, "is_flash_attention_available", lambda: True),
            (interface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
            (interface, "get_device_properties", staticmethod(lambda *_: properties)),
            (interface, "device_count", staticmethod(lambda: 1)),
            (interface, "current_device", staticmethod(lambda: 0)),
            (interface, "is_available", staticmethod(lambda: True)),
            (interface, "get_raw_stream", staticmethod(lambda *_: 0)),
            (triton_helpers, "set_driver_to_gpu", lambda *_: active.set_active(Driver(gpu))),
            (joint_graph.UniformValueConstantFolder, "_deduce_value", fold_on_host),
        ):
            patches.enter_context(patch.object(owner, name, value))
        active.set_active(Driver(gpu))
        try:
            yield
        finally:
            active._active = before
            device_interface.caching_worker_device_properties.pop("cuda", None)
            hints.DeviceProperties.create.cache_clear()
