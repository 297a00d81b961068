"""Our own Triton kernels as machine code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compile_for_gpu.binaries import describe_kernel
from compile_for_gpu.cases import FORMATS, SIZES, KernelCase, compile_cases
from compile_for_gpu.devices import Gpu
from compile_for_gpu.slots import slots_per_weight


def fused_cases(gpu: Gpu, sizes: Sequence[str], weights: Sequence[str]) -> list[KernelCase]:
    """Return the fused step's kernels for one and eight rows of those sizes that it serves, in formats of weights."""
    known = {size.partition("/")[0] for size in sizes} & set(SIZES)
    others = set(FORMATS) - set(weights)
    cases = compile_cases(gpu.capability, tuple(sorted(known)))
    return [case for case in cases if others.isdisjoint(case.name.split(", "))]


def compile_own_kernels(gpu: Gpu, cases: Sequence[KernelCase]) -> list[dict[str, Any]]:
    """Compile kernels for a GPU. Returns what `describe_kernel` says of each, and the slots per weight of products."""
    return [described(case, gpu.target) for case in cases]


def described(case: KernelCase, target: Any) -> dict[str, Any]:
    """Return the facts of one kernel."""
    compiled = case.compile(target)
    facts, slots = describe_kernel(case.name, compiled), slots_per_weight(case, compiled.asm["cubin"])
    return facts if slots is None else facts | {"slots_per_weight": round(slots, 2)}
