"""Our own Triton kernels as machine code, in the shapes of the published models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from triton.compiler import ASTSource

from compile_for_gpu.binaries import describe_kernel
from compile_for_gpu.devices import Gpu
from qwen3fast.kernels.cuda import packed_experts, packed_matvec, split_attention
from qwen3fast.kernels.cuda.decode_step.cases import FORMATS, SIZES, FusedCase, compile_cases


class KernelCase(NamedTuple):
    """A kernel to compile. kinds: types of its first arguments, as Triton writes them; constants: its last ones.

    options: of Triton's compiler, such as num_warps and launch_pdl.
    """

    name: str
    kernel: Any
    kinds: list[str]
    constants: list[Any]
    options: dict[str, Any] = {}  # noqa: RUF012  never changed


def own_cases() -> list[KernelCase]:
    """Return our kernels for bfloat16 in the shapes of the 0.6B and 8B models, and what the package names itself."""
    bf16, fp32, index = "*bf16", "*fp32", "i32"
    split_types = [bf16, bf16, bf16, fp32, fp32, "*i64", fp32, fp32, fp32, index, "fp32"]
    int8_types = [bf16, "*i8", "*i8", fp32, fp32, "*i64", fp32, fp32, fp32, index, "fp32"]
    cases = []
    for group in (2, 4):
        numbers = [8, group, 128, 16, split_attention.BLOCK]
        for name, kinds in (("bf16", split_types), ("int8", int8_types)):
            title = f"attend_split, {name}, {group} heads a group"
            cases.append(KernelCase(title, split_attention._attend_split, kinds, [*numbers, name == "int8"]))
    for width in (32, 64):
        merge = [fp32, fp32, fp32, bf16, index]
        cases.append(KernelCase(f"merge_splits, {width}", split_attention._merge_splits, merge, [width, 128]))
    for name, channels, scale, *records in (
        ("int8", 4, fp32, 32, 0), ("fp8", 4, fp32, 32, 0), ("int4", 8, bf16, 32, 0),
        ("uint4", 8, "*u8", 256, 320), ("uint4 with zero points", 8, "*u8", 128, 48),
    ):  # fmt: skip
        format = [channels, name == "fp8", *records]
        for rows in (16, 64):
            kinds = [bf16, "*i32", scale, fp32, index, index, index]
            numbers = [*format, rows, packed_matvec.LANES, packed_matvec.BLOCK_J, packed_matvec.GROUP]
            cases.append(KernelCase(f"packed_matvec, {name}, {rows} rows", packed_matvec._multiply, kinds, numbers))
        kinds = [bf16, "*i32", scale, "*i64", fp32, index, index]
        numbers = [*format, packed_experts.LANES, packed_experts.BLOCK_J, packed_experts.GROUP]
        cases.append(KernelCase(f"packed_experts, {name}", packed_experts._multiply_chosen, kinds, numbers))
    return cases


def fused_cases(gpu: Gpu, sizes: Sequence[str], weights: Sequence[str]) -> list[FusedCase]:
    """Return the fused step's kernels for one and eight rows of those sizes that it serves, in formats of weights."""
    known = {size.partition("/")[0] for size in sizes} & set(SIZES)
    others = set(FORMATS) - set(weights)
    cases = compile_cases(gpu.capability, tuple(sorted(known)))
    return [case for case in cases if others.isdisjoint(case.name.split(", "))]


def compile_own_kernels(gpu: Gpu, cases: Sequence[KernelCase | FusedCase]) -> list[dict[str, Any]]:
    """Compile kernels for a GPU. Returns what `describe_kernel` says of each."""
    results = []
    for case in cases:
        if isinstance(case, FusedCase):
            compiled = triton.compile(case.source(), target=gpu.target, options=case.options or None)
            results.append(describe_kernel(case.name, compiled))
            continue
        names, kinds = case.kernel.arg_names, case.kinds
        signature = dict(zip(names, [*kinds, *["constexpr"] * len(case.constants)], strict=True))
        constants = dict(zip(names[len(kinds) :], case.constants, strict=True))
        attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.startswith("*")}
        source = ASTSource(case.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=gpu.target, options=dict(case.options) or None)
        results.append(describe_kernel(case.name, compiled))
    return results
