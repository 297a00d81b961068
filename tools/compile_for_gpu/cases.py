"""Our own Triton kernels, in the shapes of the published models, as cases to compile without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from qwen3fast.kernels.cuda import chunk_attention, packed_experts, packed_matvec, split_attention
from qwen3fast.kernels.cuda.decode_step import attention, linear, sample, tail
from qwen3fast.kernels.cuda.decode_step.launch import MIN_CAPABILITY
from qwen3fast.kernels.cuda.decode_step.weights import (
    FP8,
    FP8_BLOCK,
    INT4,
    INT8,
    PLAIN,
    channels_of,
    columns_of,
    tile_shape,
    uint4_kind,
)

FORMATS = {
    "bf16": PLAIN, "int8": INT8, "fp8": FP8, "fp8-block": FP8_BLOCK, "int4": INT4,
    "uint4": uint4_kind(256, 320), "uint4 with zero points": uint4_kind(128, 48), "uint4 of Q4_K": uint4_kind(256, 256),
}  # fmt: skip
# (hidden_size, intermediate_size, query heads, key/value heads); heads are of 128, the vocabulary of 151,936.
SIZES = {"0.6b": (1024, 3072, 16, 8), "8b": (4096, 12288, 32, 8)}
VOCABULARY, HEAD_DIM = 151_936, 128
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8"}
TYPES = {int: "i32", float: "fp32"}
POINTERS |= {torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64"}


class KernelCase(NamedTuple):
    """A kernel with its arguments: Triton's type names by argument ("*bf16"), constants and options."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012  never changed

    @classmethod
    def in_order(cls, name: str, kernel: Any, kinds: list[str], constants: list[Any]) -> KernelCase:
        """Return the case of a kernel whose first arguments have these types, and its last ones these values."""
        names = kernel.arg_names
        signature = dict(zip(names[: len(kinds)], kinds, strict=True))
        return cls(name, kernel, signature, dict(zip(names[len(kinds) :], constants, strict=True)))

    @classmethod
    def of_launch(cls, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> KernelCase:
        """Return the case of a call of `launch`."""
        types = [POINTERS[a.dtype] if isinstance(a, torch.Tensor) else TYPES[type(a)] for a in arguments]
        signature = dict(zip(kernel.arg_names[: len(types)], types, strict=True))
        options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
        return cls(
            kernel.__name__, kernel, signature, {n: c for n, c in constants.items() if n not in options}, options
        )

    def compile(self, target: Any) -> Any:
        """Return the compiled kernel; pointers are aligned to 16 bytes, as in PyTorch."""
        names = self.kernel.arg_names
        signature = {name: self.signature.get(name, "constexpr") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
        source = triton.compiler.ASTSource(self.kernel, signature, self.constants, aligned)
        return triton.compile(source, target=target, options=dict(self.options) or None)


@contextmanager
def replaced_launch(function: Callable[..., None]) -> Iterator[None]:
    """Call this function where the kernels of the fused step are launched."""
    with ExitStack() as patches:
        for module in (attention, linear, sample, tail):
            patches.enter_context(patch.object(module, "launch", function))
        yield


def own_cases() -> list[KernelCase]:
    """Return the kernels of steps that are not fused, for bfloat16 in the shapes of the 0.6B and 8B models."""
    bf16, fp32, index = "*bf16", "*fp32", "i32"
    split_types = [bf16, bf16, bf16, fp32, fp32, "*i64", fp32, fp32, fp32, bf16, index, "fp32"]
    int8_types = [bf16, "*i8", "*i8", fp32, fp32, "*i64", fp32, fp32, fp32, bf16, index, "fp32"]
    cases = []
    for group in (2, 4):
        numbers = [8, group, 128, 16, split_attention.BLOCK]
        for name, kinds in (("bf16", split_types), ("int8", int8_types)):
            for is_whole in (False, True):
                title = f"attend_split, {name}, {group} heads a group" + ", one split" * is_whole
                own = [*numbers, is_whole, name == "int8"]
                cases.append(KernelCase.in_order(title, split_attention._attend_split, kinds, own))
    for width in (32, 64):
        merge = [fp32, fp32, fp32, bf16, index]
        cases.append(KernelCase.in_order(f"merge_splits, {width}", split_attention._merge_splits, merge, [width, 128]))
    for name, kind in FORMATS.items():
        if kind == PLAIN:
            continue
        channels, scale = channels_of(kind), _scale_type(kind)
        for rows in (16, 64):
            kinds = [bf16, "*i32", scale, fp32, index, index, index]
            numbers = [channels, kind, rows, packed_matvec.block_words(torch.bfloat16, rows, kind)]
            title = f"packed_matvec, {name}, {rows} rows"
            cases.append(KernelCase.in_order(title, packed_matvec._multiply, kinds, numbers))
        kinds = [bf16, "*i32", scale, "*i64", fp32, index, index]
        numbers = [channels, kind, packed_matvec.block_words(torch.bfloat16, 1, kind)]
        cases.append(KernelCase.in_order(f"packed_experts, {name}", packed_experts._multiply_chosen, kinds, numbers))
    return cases


def _scale_type(kind: int) -> str:
    return "*u8" if kind > INT4 else "*bf16" if kind == INT4 else "*fp32"


def compile_cases(
    capability: tuple[int, int], sizes: tuple[str, ...] = ("0.6b", "8b"), rows: tuple[int, ...] = (1, 8)
) -> list[KernelCase]:
    """Return all kernels of steps with these sizes and numbers of rows, compiled for a GPU of this capability."""
    dependent = capability >= MIN_CAPABILITY
    cases = [case for size in sizes for R in rows for case in _cases(size, R)]
    unique = {case.name: case for case in cases}.values()
    return [overlapping(case, dependent) if "DEPENDENT" in case.kernel.arg_names else case for case in unique]


def overlapping(case: KernelCase, dependent: bool) -> KernelCase:
    """Return the case of a kernel that overlaps the one before it, or does not."""
    options = case.options | ({"launch_pdl": True} if dependent else {})
    return case._replace(constants=case.constants | {"DEPENDENT": dependent}, options=options)


def _cases(size: str, R: int) -> Iterator[KernelCase]:
    _, _, H, K = SIZES[size]
    yield from _product_cases(size, R)
    yield from _attention_cases(size, R, H, K)
    C = VOCABULARY // tail.ROWS_OF_PROGRAM
    signature = {"best_logit": "*fp32", "best_token": "*i32"}
    signature |= dict.fromkeys(("advance", "input", "output", "position", "step"), "*i64")
    yield KernelCase("choose", tail.choose_kernel, signature, {"C": C, "BLOCK": 4096}, {"num_warps": 8})
    yield from _sampler_cases()
    yield from _chunk_cases(size, H, K)


def _product_cases(size: str, R: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[KernelCase]:
    E, F, H, K = SIZES[size]
    own_type, stages = POINTERS[dtype], _stages(dtype)
    for name, kind in FORMATS.items():
        label = f"{size}, {name}, {R} rows"
        weights = {"w": "*i32" if kind else own_type, "scale": _scale_type(kind) if kind else own_type}
        for part, N, width, has_norm, use in (
            ("qkv", (H + 2 * K) * HEAD_DIM, E, True, linear.STORE),
            ("output", E, H * HEAD_DIM, False, linear.ADD),
            ("gate_up", F, E, True, linear.GATE),
            ("down", E, F, False, linear.ADD),
        ):
            tile = tile_shape(N, width, kind, dtype, 2 if use == linear.GATE else 1)
            constants = _constants(R, N, width, kind, tile)
            constants |= {"HAS_NORM": has_norm, "USE": use}
            signature = {"x": own_type, "norm": own_type, **weights, "y": own_type, "eps": "fp32"}
            yield KernelCase(f"{part}, {label}", linear.linear_kernel, signature, constants, stages)
        signature = {"x": own_type, "norm": own_type, **weights, "eps": "fp32", "logits": "*fp32"}
        signature |= {"best_logit": "*fp32", "best_token": "*i32"}
        tile = tail.tile_shape(E, kind, dtype)
        constants = _constants(R, VOCABULARY, E, kind, tile)
        for has_logits in (False, True):
            part = "vocabulary and logits" if has_logits else "vocabulary"
            own = {"HAS_LOGITS": has_logits}
            yield KernelCase(f"{part}, {label}", tail.vocabulary_kernel, signature, constants | own, stages)
        P = channels_of(kind)
        signature = {"token": "*i64", **weights, "x": own_type}
        constants = {"E": E, "J": E // P, "KIND": kind, "P": P, "BLOCK": tail.EMBEDDING_BLOCK}
        yield KernelCase(f"embed, {size}, {name}", tail.embed_kernel, signature, constants)


def float32_cases(capability: tuple[int, int]) -> list[KernelCase]:
    """Return the kernels of models in float32 that need the most shared memory, and the products of the fused step."""
    _, _, H, K = SIZES["8b"]
    cases = [*_attention_cases("8b", 1, H, K, torch.float32), *_chunk_cases("8b", H, K, torch.float32)]
    cases += [case for R in (1, 8) for case in _product_cases("8b", R, torch.float32)]
    kinds = ["*fp32"] * 5 + ["*i64", "*fp32", "*fp32", "*fp32", "*fp32", "i32", "fp32"]
    numbers, options = [K, H // K, HEAD_DIM, 16, split_attention.BLOCK, False, False], _stages(torch.float32)
    split = KernelCase.in_order("attend_split", split_attention._attend_split, kinds, numbers)
    cases.append(split._replace(options=options))
    for rows in (16, 64):
        kinds = ["*fp32", "*i32", _scale_type(INT4), "*fp32", "i32", "i32", "i32"]
        numbers = [channels_of(INT4), INT4, rows, packed_matvec.block_words(torch.float32, rows, INT4)]
        title = f"packed_matvec, int4, {rows} rows"
        cases.append(KernelCase.in_order(title, packed_matvec._multiply, kinds, numbers))
    every = [case for case in cases if not case.name.startswith("combine")]
    dependent = capability >= MIN_CAPABILITY
    every = [case._replace(name=f"{case.name}, float32") for case in every]
    return [overlapping(case, dependent) if "DEPENDENT" in case.kernel.arg_names else case for case in every]


def _stages(dtype: torch.dtype) -> dict[str, Any]:
    return {"num_stages": split_attention.num_stages(dtype)}


def _attention_cases(size: str, R: int, H: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[KernelCase]:
    splits, own_type = dict.fromkeys(("values", "maximum", "total"), "*fp32"), POINTERS[dtype]
    for positions in (64, 4097):
        N = split_attention.num_splits(R * K, positions)
        constants = {"D": HEAD_DIM, "N": N, "BLOCK": split_attention.BLOCK}
        for cache in (own_type[1:], "int8"):
            kind = "*i8" if cache == "int8" else own_type
            signature = dict.fromkeys(("qkv", "q_norm", "k_norm", "y"), own_type) | splits
            signature |= dict.fromkeys(("cos", "sin", "k_scale", "v_scale"), "*fp32") | {"k": kind, "v": kind}
            signature |= {"eps": "fp32", "scale": "fp32", "num_positions": "i32", "position": "*i64"}
            own = {"K": K, "G": H // K, "ROWS": split_attention.MIN_DOT, "IS_QUANTIZED": cache == "int8"}
            name = f"attention, {size}, {cache} cache, {N} splits"
            yield KernelCase(name, attention.attention_kernel, signature, constants | own, _stages(dtype))
        if N > 1:
            signature = {"position": "*i64", "y": own_type} | splits
            own = {"H": H, "W": triton.next_power_of_2(N)}
            yield KernelCase(f"combine, {size}, {N} splits", attention.combine_kernel, signature, constants | own)


def _sampler_cases() -> Iterator[KernelCase]:
    C = triton.cdiv(VOCABULARY, sample.TOKENS_OF_PROGRAM)
    tokens = {"V": VOCABULARY, "TOKENS": sample.TOKENS_OF_PROGRAM}
    row = tokens | {
        "C": C,
        "WIDTH": triton.next_power_of_2(C),
        "BITS": sample.BITS,
        "PASSES": sample.PASSES,
    }
    best = {"best_logit": "*fp32", "best_token": "*i32"}
    types = dict.fromkeys(("logits", "largest", "temperature", "top_p"), "*fp32")
    types |= dict.fromkeys(("state", "sums", "top_k"), "*i64")
    yield KernelCase("largest", sample.largest_kernel, {"logits": "*fp32", "largest": "*fp32"}, tokens)
    yield KernelCase("best", sample.best_kernel, {"logits": "*fp32"} | best, tokens)
    for index in (0, 1, sample.PASSES, sample.PASSES + 1, 2 * sample.PASSES - 1):
        own = {"INDEX": index, "TILE": sample.TILE}
        yield KernelCase(f"search, pass {index}", sample.search_kernel, types, row | own)
    types |= {"min_p": "*fp32", "seed": "*i64", "step": "*i64"} | best
    yield KernelCase("draw", sample.draw_kernel, types, row)


def _chunk_cases(size: str, H: int, K: int, dtype: torch.dtype = torch.bfloat16) -> Iterator[KernelCase]:
    own_type = POINTERS[dtype]
    for cache, kind in ((own_type[1:], own_type), ("int8", "*i8")):
        signature = {"q": own_type, "y": own_type, "k": kind, "v": kind, "T": "i32", "S": "i32", "scale": "fp32"}
        signature |= dict.fromkeys(("k_scale", "v_scale"), "*fp32" if cache == "int8" else own_type)
        signature |= dict.fromkeys(("position", "row"), "*i64")
        constants = {"H": H, "G": H // K, "D": HEAD_DIM, "IS_QUANTIZED": cache == "int8"}
        constants["QUERIES"], constants["BLOCK"] = chunk_attention.tile_shape(dtype, cache == "int8")
        name = f"chunk attention, {size}, {cache} cache"
        yield KernelCase(name, chunk_attention.chunk_kernel, signature, constants, _stages(dtype))


def _constants(R: int, N: int, K: int, kind: int, tile: tuple[int, int]) -> dict[str, Any]:
    BN, BK = tile
    return {"R": R, "ROWS": columns_of(R), "N": N, "K": K, "BN": BN, "BK": BK, "KIND": kind, "P": channels_of(kind)}
