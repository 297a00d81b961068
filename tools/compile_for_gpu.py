"""Compile the decode step for NVIDIA GPUs on a machine that has none, and report what a token will launch.

    python -m venv ~/gpu-env
    ~/gpu-env/bin/pip install torch==2.14.1 numpy safetensors tokenizers huggingface_hub matplotlib jinja2
    PYTHONPATH=. ~/gpu-env/bin/python tools/compile_for_gpu.py --output benchmarks/results/gpu-compile.json

It needs a PyTorch that was built for CUDA (and the Triton that comes with it), therefore an environment of its own,
several GB large; it needs no GPU and no driver. The parts of a step are recorded on tensors without memory, lowered by
Inductor, and every Triton kernel, Inductor's and ours, is compiled to machine code by the assembler in Triton's
package. What the kernels compute, and how fast, is not checked here. Sizes are fixed; in the engine, the number of
positions is a symbol. A case of the record is a step: how many Triton kernels, products and attentions of libraries,
and eager operations it launches, and the most shared memory that a kernel takes; its notes have the shared memory of
each part's kernels, and of our own. Exit status 1 if one needs more shared memory than the GPU has, or a part does not
compile.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":  # read when Inductor is imported
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # other processes would look for a GPU
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import torch
import torch._inductor.config
import torch.nn.functional as F
import triton
from torch._dynamo import device_interface
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints, triton_helpers, triton_heuristics
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import as_text, table_rows
from qwen3fast.bench.view import view_of
from qwen3fast.engine.compile import StepCompiler
from qwen3fast.engine.decode import DecodeState, decode_step
from qwen3fast.engine.parts import Parts
from qwen3fast.kernels import cuda
from qwen3fast.kernels.cuda import packed_experts, packed_matvec, split_attention
from qwen3fast.model import rope_tables
from qwen3fast.model.config import ModelConfig
from qwen3fast.model.kv_cache import StaticKVCache
from qwen3fast.sampling.samplers import SamplerKind

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cuda_static.fake_cuda import fake_cuda, fake_model


@dataclass(frozen=True)
class Gpu:
    """What compilers ask of a device. Source: CUDA C++ Programming Guide, table of compute capabilities."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int  # a block can have at most

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)


GPUS = {
    "sm_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * 1024),
    "sm_90": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 * 1024),
}


# Kernels that our operations launch; Inductor's source shows each as one call.
OWN_LAUNCHES = {
    "torch.ops.qwen3fast.packed_matvec.default": 1,
    "torch.ops.qwen3fast.packed_experts.default": 1,
    "torch.ops.qwen3fast.split_attention.default": 2,
}


@dataclass
class Compiled:
    """What one part became. launches: kernels of Triton; calls: of libraries and eager operations, by name."""

    launches: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    buffers: int = 0
    kernels: list[dict[str, Any]] = field(default_factory=list)


class Driver:
    """Stands in for Triton's CUDA driver."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        limits = {"max_shared_mem": gpu.shared_bytes, "multiprocessor_count": gpu.multiprocessors}
        limits |= {"warpSize": 32, "max_num_regs": 65536}
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: limits)

    def get_current_target(self) -> GPUTarget:
        return self._gpu.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return self._gpu.capability

    def get_active_torch_device(self) -> torch.device:
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
    """PyTorch and Triton believe that this GPU is there."""
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
            (cuda, "device_count", lambda: 1),
            (cuda, "current_device", lambda: 0),
            (cuda, "is_bf16_supported", lambda *_, **__: True),
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


class GpuAttention(TorchFunctionMode):
    """Masked attention as PyTorch runs it on GPUs that FlashAttention does not serve: by its memory-efficient kernel.

    Without a GPU it would choose products with the scores kept in memory.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        mask = kwargs.get("attn_mask")
        if function is not F.scaled_dot_product_attention or mask is None:
            return function(*args, **kwargs)
        bias = torch.zeros_like(mask, dtype=args[0].dtype).masked_fill_(~mask, -torch.inf)
        shape = (*args[0].shape[:3], args[1].shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(*args, bias.expand(shape), False)[0]


class EagerCalls(TorchDispatchMode):
    """Counts operations that launch something when they run as they are, outside of compiled parts."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.is_inside_part = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, HigherOrderOperator):
            return function(*args, **(kwargs or {}))
        name = function.name()
        if (
            not self.is_inside_part
            and not function.is_view
            and not name.startswith(("prim::", "aten::empty", "aten::new_empty"))
        ):
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


class Inspector(StepCompiler):
    """Compiles parts to machine code without loading it, and runs them as they are, on tensors without memory.

    parts: what each compiled part became; calls: how often each ran.
    """

    def __init__(self, device: torch.device, eager: EagerCalls) -> None:
        super().__init__(True, device)
        self.eager = eager
        self.parts: dict[str, Compiled] = {}
        self.calls: Counter[str] = Counter()

    def compile(self, function: Any, module: Any, tensors: Any, dynamic: Any) -> Any:
        """As in the engine, but for symbols: every size is the given one."""
        sources: list[str] = []
        tuners: list[Any] = []

        def precompile(tuner: Any, *_: Any, **__: Any) -> None:
            tuners.append(tuner)
            tuner._precompile_worker()

        launchers = ("use_static_triton_launcher", "use_static_cuda_launcher")  # by version of PyTorch
        options = {name: False for name in launchers if hasattr(torch._inductor.config, name)}
        options["shape_padding"] = False  # whether it pays is measured on the device
        self.eager.is_inside_part = True
        try:
            with (
                patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)),
                patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block", lambda self: None),
                patch.object(triton_heuristics.CachingAutotuner, "precompile", precompile),
                torch._inductor.config.patch(options),
            ):
                super().compile(function, module, tensors, [{} for _ in tensors])
        finally:
            self.eager.is_inside_part = False
        name = getattr(function, "__name__", None) or function.func.__name__
        self.parts[name] = describe("\n".join(sources), tuners)

        def run(module: Any, *given: Any) -> Any:
            self.calls[name] += 1
            self.eager.is_inside_part = True
            try:
                return function(module, *given)
            finally:
                self.eager.is_inside_part = False

        return run


def describe(source: str, tuners: list[Any]) -> Compiled:
    """From Inductor's source and the kernels that it had compiled."""
    call = source[source.find("def call") :]
    result = Compiled(len(re.findall(r"^\s+\w+\.run\(", call, re.M)))
    result.calls = dict(Counter(re.findall(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\(", call)))
    result.buffers = len(re.findall(r"empty_strided_cuda\(", call))
    for tuner in tuners:
        for form in tuner.compile_results:
            kernel, name = form.kernel, tuner.inductor_meta.get("kernel_name")
            sizes = {"shared_bytes": kernel.metadata.shared, "cubin_bytes": len(kernel.asm["cubin"])}
            result.kernels.append({"name": name, **sizes})
    return result


@torch.no_grad()
def inspect_step(
    gpu: Gpu, size: str, batch_size: int, context: int, quantization: str | None, attention: str
) -> dict[str, Any]:
    """One greedy decode step of a published size, or ("30b-a3b/2") of two of its layers, with nothing for weights."""
    cuda.decode_attention = attention
    name, _, layers = size.partition("/")
    config = ModelConfig.named(name)
    if layers:
        config = replace(config, num_hidden_layers=int(layers))
    with fake_cuda(gpu.capability) as device, GpuAttention(), EagerCalls() as eager:
        model = fake_model(config, device, quantization)
        cache = StaticKVCache(config, batch_size, context, config.dtype, device)
        inspector = Inspector(device, eager)
        parts, state = Parts.build(inspector, model, cache), DecodeState.allocate(batch_size, device)
        cos_SD, sin_SD = rope_tables(config.head_dim, config.rope_theta, cache.allocated_len, device, config.yarn)
        eager.calls.clear()
        length = cache.bucket(context)
        decode_step(model, parts, cache, cos_SD, sin_SD, state, batch_size, length, SamplerKind.GREEDY)
    launches = sum(inspector.parts[name].launches * times for name, times in inspector.calls.items())
    library: Counter[str] = Counter()
    for name, times in inspector.calls.items():
        for call, count in inspector.parts[name].calls.items():
            if call in OWN_LAUNCHES:
                launches += OWN_LAUNCHES[call] * count * times
            else:
                library[call] += count * times
    return {
        "model": size,
        "batch_size": batch_size,
        "context": context,
        "weights": quantization or "bf16",
        "attention": attention,
        "triton_launches": launches,
        "library_calls": dict(library),
        "eager_calls": dict(eager.calls),
        "parts": {name: asdict(part) | {"runs": inspector.calls[name]} for name, part in inspector.parts.items()},
    }


def compile_own_kernels(gpu: Gpu) -> list[dict[str, Any]]:
    """Our Triton kernels for bfloat16 in the shapes of the 0.6B and 8B models."""
    bf16, fp32, index = "*bf16", "*fp32", "i32"
    split_types = [bf16, bf16, bf16, fp32, fp32, "*i64", fp32, fp32, fp32, index, "fp32"]
    int8_types = [bf16, "*i8", "*i8", fp32, fp32, "*i64", fp32, fp32, fp32, index, "fp32"]
    block = split_attention.BLOCK
    kernels = []
    for group in (2, 4):
        numbers = [8, group, 128, 16, block]
        for name, kinds in (("bf16", split_types), ("int8", int8_types)):
            kernel = split_attention._attend_split
            kernels.append((f"attend_split, {name}, {group} heads a group", kernel, kinds, [*numbers, name == "int8"]))
    for width in (32, 64):
        merge = [fp32, fp32, fp32, bf16, index]
        kernels.append((f"merge_splits, {width}", split_attention._merge_splits, merge, [width, 128]))
    for name, channels, scale in (("int8", 4, fp32), ("fp8", 4, fp32), ("int4", 8, bf16)):
        for rows in (16, 64):
            kinds = [bf16, "*i32", scale, fp32, index, index, index]
            numbers = [channels, name == "fp8", rows, packed_matvec.LANES, packed_matvec.BLOCK_J, packed_matvec.GROUP]
            kernels.append((f"packed_matvec, {name}, {rows} rows", packed_matvec._multiply, kinds, numbers))
        kinds = [bf16, "*i32", scale, "*i64", fp32, index, index]
        numbers = [channels, name == "fp8", packed_experts.LANES, packed_experts.BLOCK_J, packed_experts.GROUP]
        kernels.append((f"packed_experts, {name}", packed_experts._multiply_chosen, kinds, numbers))
    results = []
    for name, kernel, kinds, numbers in kernels:
        names = kernel.arg_names
        signature = dict(zip(names, [*kinds, *["constexpr"] * len(numbers)], strict=True))
        constants = dict(zip(names[len(kinds) :], numbers, strict=True))
        attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.startswith("*")}
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu.target)
        shared = compiled.metadata.shared
        results.append({"name": name, "shared_bytes": shared, "cubin_bytes": len(compiled.asm["cubin"])})
    return results


def add_step(record: Record, gpu_name: str, step: dict[str, Any]) -> None:
    """Make a case of what `inspect_step` found, and note its parts under the case's name."""
    labels = {"gpu": gpu_name, **{name: step[name] for name in ("model", "weights", "attention", "batch_size")}}
    case = Case(labels, {"context": float(step["context"])})
    kernels = [kernel for part in step["parts"].values() for kernel in part["kernels"]]
    case.add(
        {
            "triton_kernels": step["triton_launches"],
            "library_calls": sum(step["library_calls"].values()),
            "eager_calls": sum(step["eager_calls"].values()),
            "shared_bytes": max(kernel["shared_bytes"] for kernel in kernels),
        }
    )
    record.cases.append(case)
    for part in step["parts"].values():  # of a kernel's forms, between which a device would choose, the largest
        ordered = sorted(part["kernels"], key=lambda kernel: kernel["shared_bytes"])
        part["kernels"] = {kernel["name"]: kernel["shared_bytes"] for kernel in ordered}
    record.notes["steps"][case.name] = {name: step[name] for name in ("library_calls", "eager_calls", "parts")}


def too_large(record: Record) -> set[str]:
    """The names of kernels that need more shared memory than their GPU has."""
    compiled = [(kernel["gpu"], kernel["name"], kernel["shared_bytes"]) for kernel in record.notes["own_kernels"]]
    for case in record.cases:
        for part in record.notes["steps"][case.name]["parts"].values():
            compiled += [(str(case.labels["gpu"]), *kernel) for kernel in part["kernels"].items()]
    return {name for gpu, name, num_bytes in compiled if num_bytes > GPUS[gpu].shared_bytes}


def main() -> None:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default="0.6b,8b,30b-a3b/4", help="sizes; after a slash, how many layers [%(default)s]"
    )
    parser.add_argument("--weights", default="bf16,int8,int4,fp8", help="bf16 or a quantisation [%(default)s]")
    parser.add_argument("--batch-sizes", default="1,16", help="[%(default)s]")
    parser.add_argument("--context", type=int, default=1024, help="positions of the KV cache [%(default)s]")
    parser.add_argument("--gpus", default=",".join(GPUS), help="[%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/gpu-compile.json"), help="[%(default)s]")
    args = parser.parse_args()
    if not torch.backends.cuda.is_built():
        sys.exit(f"this PyTorch, {torch.__version__}, was built without CUDA; see --help for an environment with one")
    # It warns of each part that it cannot be saved for later.
    logging.getLogger("torch._inductor.standalone_compile").setLevel(logging.ERROR)
    environment = describe_environment(torch.device("cpu"))
    environment |= {"cuda": torch.version.cuda, "triton": triton.__version__}
    notes: dict[str, Any] = {"gpus": {name: asdict(gpu) for name, gpu in GPUS.items()}, "steps": {}, "own_kernels": []}
    model = {"name": f"a greedy decode step over {args.context:,} positions"}
    record = Record("compiled", describe_run("python tools/compile_for_gpu.py"), environment, model, notes=notes)
    for gpu_name in args.gpus.split(","):
        with pretended(GPUS[gpu_name]):
            notes["own_kernels"] += [{"gpu": gpu_name, **kernel} for kernel in compile_own_kernels(GPUS[gpu_name])]
            for size in args.models.split(","):
                for weights in args.weights.split(","):
                    for batch_size in map(int, args.batch_sizes.split(",")):
                        print(f"{gpu_name}: {size}, {weights}, batch {batch_size}", file=sys.stderr, flush=True)
                        quantization = None if weights == "bf16" else weights
                        for attention in ("sdpa", "flex", "split") if quantization is None else ("sdpa",):
                            shape = (size, batch_size, args.context)
                            add_step(record, gpu_name, inspect_step(GPUS[gpu_name], *shape, quantization, attention))
    write_json(record.to_dict(), args.output)
    print(as_text(table_rows(record, view_of(record).columns), left=4))
    for kernel in notes["own_kernels"]:
        print(f"{kernel['gpu']:7}{kernel['name']:38}{kernel['shared_bytes']:9,} bytes shared")
    print(f"wrote {args.output}")
    if too_big := too_large(record):
        sys.exit(f"more shared memory than there is: {', '.join(sorted(too_big))}")


if __name__ == "__main__":
    main()
