"""In the place of the engine's StepCompiler: compiles as it does, keeps what Inductor makes, runs parts uncompiled.

Private parts of PyTorch: where Inductor hands over its source, where its kernels are compiled, and where its code is
called, which needs a device. PyTorch has no public way to list what compiled code launches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.runtime import triton_heuristics
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from compile_for_gpu.binaries import describe_kernel
from compile_for_gpu.cases import KernelCase, overlapping, replaced_launch
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.kernels.cuda.decode_step import ops
from qwen3fast.kernels.cuda.decode_step.launch import MIN_CAPABILITY

# Kernels that our operations launch, at most; Inductor's source shows each as one call.
OWN_LAUNCHES = {
    "torch.ops.qwen3fast.packed_matvec.default": 1,
    "torch.ops.qwen3fast.packed_experts.default": 1,
    "torch.ops.qwen3fast.split_attention.default": 2,
    "torch.ops.aten.view.dtype": 0,  # no kernel: the same memory under another dtype
}


def launched_kernels(name: str, arguments: Any) -> list[KernelCase]:
    """Return the kernels that an operation of kernels/cuda/decode_step launches; none for other operations."""
    found: list[KernelCase] = []
    if not name.startswith("qwen3fast::step_"):
        return found

    def note(kernel: Any, grid: Any, *given: Any, device: torch.device, **constants: Any) -> None:
        case = KernelCase.of_launch(kernel, given, constants)
        found.append(overlapping(case, torch.cuda.get_device_capability(device) >= MIN_CAPABILITY))

    with replaced_launch(note):
        ops.FUNCTIONS[name.removeprefix("qwen3fast::")](*arguments)
    return found


class CompiledError(Exception):
    """The compiled code has been made and is about to run, for which there is no device."""


@dataclass
class Compiled:
    """The compiled form of a part.

    launches: kernels of Triton, Inductor's and our operations'; calls: of libraries and of operations that run
    eagerly, by name. kernels: of Inductor, as `describe_kernel` describes them.
    """

    launches: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    buffers: int = 0
    kernels: list[dict[str, Any]] = field(default_factory=list)


class EagerCalls(TorchDispatchMode):
    """Counts operations that launch something and run eagerly, outside of compiled parts.

    own: kernels of the fused step, by operation; kernels: these, each once; calls: other operations.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.own: Counter[str] = Counter()
        self.kernels: list[KernelCase] = []
        self.is_inside_part = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, HigherOrderOperator):
            return function(*args, **(kwargs or {}))
        name = function.name()
        kernels = launched_kernels(name, args)
        self.kernels += [kernel for kernel in kernels if kernel not in self.kernels]
        if kernels:
            self.own[name] += len(kernels)
        elif (
            not self.is_inside_part
            and not function.is_view
            and not name.startswith(("prim::", "aten::empty", "aten::new_empty"))
        ):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


class Inspector(StepCompiler):
    """Compiles parts to machine code without loading it, and runs them uncompiled, on tensors without memory.

    Attributes:
        parts: what each part became, by its function's name, one entry for each form.
        calls: how often each part ran since the last `clear`.
        eager: counts what runs outside of parts, while it is entered.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(True, device)
        self.eager = EagerCalls()
        self.parts: dict[str, Compiled] = {}
        self.calls: Counter[str] = Counter()

    def clear(self) -> None:
        """Forget what ran, not what was compiled."""
        self.calls.clear()
        self.eager.calls.clear()
        self.eager.own.clear()
        self.eager.kernels.clear()

    def compile(self, function: Any, *arguments: Any, **keywords: Any) -> Any:
        """Compile as the engine does, sizes that vary included; return what runs the function uncompiled."""
        with captured() as (sources, tuners):
            try:
                super().compile(function, *arguments, **keywords)
                raise AssertionError(f"{function} was not compiled: torch.compile ran it eagerly")
            except CompiledError:
                pass
        name = self._new_name(getattr(function, "__name__", None) or function.func.__name__)
        self.parts[name] = describe("\n".join(sources), tuners)

        def run(module: Any, *given: Any) -> Any:
            self.calls[name] += 1
            self.eager.is_inside_part = True
            try:
                return function(module, *given)
            finally:
                self.eager.is_inside_part = False

        return run

    def _new_name(self, name: str) -> str:
        forms = sum(known.partition(", form ")[0] == name for known in self.parts)
        return name if forms == 0 else f"{name}, form {forms + 1}"


@contextmanager
def captured() -> Iterator[tuple[list[str], list[Any]]]:
    """Give the sources that Inductor makes and its kernels, compiled; calling compiled code raises CompiledError."""
    sources: list[str] = []
    tuners: list[Any] = []

    def precompile(tuner: Any, *_: Any, **__: Any) -> None:
        tuners.append(tuner)
        tuner._precompile_worker()

    def stop(*_: Any, **__: Any) -> None:
        raise CompiledError

    launchers = ("use_static_triton_launcher", "use_static_cuda_launcher")  # by version of PyTorch
    options = {name: False for name in launchers if hasattr(torch._inductor.config, name)}
    options["shape_padding"] = False  # whether it pays is measured on the device
    with (
        patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)),
        patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block", lambda self: None),
        patch.object(triton_heuristics.CachingAutotuner, "precompile", precompile),
        patch.object(CompiledFxGraph, "__call__", stop),
        torch._inductor.config.patch(options),
    ):
        yield sources, tuners


def describe(source: str, tuners: list[Any]) -> Compiled:
    """Return what Inductor's source launches and the kernels that it had compiled.

    Of a kernel's forms, between which a device would choose, the one with most shared memory is described.
    """
    call = source[source.find("def call") :]
    launched = re.findall(r"^\s+(\w+)\.run\(", call, re.M)
    result = Compiled(len(launched))
    calls = Counter(re.findall(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\(", call))
    result.launches += sum(OWN_LAUNCHES[name] * count for name, count in calls.items() if name in OWN_LAUNCHES)
    result.calls = {name: count for name, count in calls.items() if name not in OWN_LAUNCHES}
    result.buffers = len(re.findall(r"empty_strided_cuda\(", call))
    for tuner in tuners:
        form = max(tuner.compile_results, key=lambda form: form.kernel.metadata.shared)
        name = tuner.inductor_meta.get("kernel_name")
        result.kernels.append(describe_kernel(name, form.kernel) | {"is_first": name in launched[:1]})
    return result
