"""The kernels of the decode step as cases to compile without a GPU (tools/compile_for_gpu.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import triton

from qwen3fast.kernels.cuda import chunk_attention
from qwen3fast.kernels.cuda.decode_step import attention, linear, sample, tail
from qwen3fast.kernels.cuda.decode_step.launch import MIN_CAPABILITY
from qwen3fast.kernels.cuda.decode_step.weights import FP8, INT4, INT8, PLAIN, channels_of, tile_shape, uint4_kind

FORMATS = {
    "bf16": PLAIN, "int8": INT8, "fp8": FP8, "int4": INT4,
    "uint4": uint4_kind(256, 320), "uint4 with zero points": uint4_kind(128, 48), "uint4 of Q4_K": uint4_kind(256, 256),
}  # fmt: skip
# (hidden_size, intermediate_size, query heads, key/value heads); heads are of 128, the vocabulary of 151,936.
SIZES = {"0.6b": (1024, 3072, 16, 8), "8b": (4096, 12288, 32, 8)}
VOCABULARY, HEAD_DIM = 151_936, 128


class FusedCase(NamedTuple):
    """A kernel with its arguments: Triton's type names by argument ("*bf16"), constants and options."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> Any:
        """Return the argument of `triton.compile`; pointers are aligned to 16 bytes, as in PyTorch."""
        names = self.kernel.arg_names
        signature = {name: self.signature.get(name, "constexpr") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
        return triton.compiler.ASTSource(self.kernel, signature, self.constants, aligned)


def compile_cases(
    capability: tuple[int, int], sizes: tuple[str, ...] = ("0.6b", "8b"), rows: tuple[int, ...] = (1, 8)
) -> list[FusedCase]:
    """Return all kernels of steps with these sizes and numbers of rows, compiled for a GPU of this capability."""
    dependent = capability >= MIN_CAPABILITY
    cases = [case for size in sizes for R in rows for case in _cases(size, R)]
    unique = {case.name: case for case in cases}.values()
    return [_dependent(case, dependent) if "DEPENDENT" in case.kernel.arg_names else case for case in unique]


def _dependent(case: FusedCase, dependent: bool) -> FusedCase:
    """Return the case of a kernel that overlaps the one before it, or does not."""
    options = case.options | ({"launch_pdl": True} if dependent else {})
    return case._replace(constants=case.constants | {"DEPENDENT": dependent}, options=options)


def _cases(size: str, R: int) -> Iterator[FusedCase]:
    E, F, H, K = SIZES[size]
    for name, kind in FORMATS.items():
        label = f"{size}, {name}, {R} rows"
        weights = {"w": "*i32" if kind else "*bf16", "scale": "*bf16" if kind in (PLAIN, INT4) else "*fp32"}
        if kind > INT4:
            weights["scale"] = "*u8"
        for part, N, width, has_norm, use in (
            ("qkv", (H + 2 * K) * HEAD_DIM, E, True, linear.STORE),
            ("output", E, H * HEAD_DIM, False, linear.ADD),
            ("gate_up", F, E, True, linear.GATE),
            ("down", E, F, False, linear.ADD),
        ):
            constants = _constants(R, N, width, kind, 2 if use == linear.GATE else 1)
            constants |= {"HAS_NORM": has_norm, "USE": use}
            signature = {"x": "*bf16", "norm": "*bf16", **weights, "y": "*bf16", "eps": "fp32"}
            yield FusedCase(f"{part}, {label}", linear.linear_kernel, signature, constants, {})
        signature = {"x": "*bf16", "norm": "*bf16", **weights, "eps": "fp32", "logits": "*fp32"}
        signature |= {"best_logit": "*fp32", "best_token": "*i32"}
        constants = _constants(R, VOCABULARY, E, kind)
        constants |= {"TILES": tail.ROWS_OF_PROGRAM // constants["BN"]}
        for has_logits in (False, True):
            part = "vocabulary and logits" if has_logits else "vocabulary"
            own = {"HAS_LOGITS": has_logits}
            yield FusedCase(f"{part}, {label}", tail.vocabulary_kernel, signature, constants | own, {})
        P = channels_of(kind)
        signature = {"token": "*i64", **weights, "x": "*bf16"}
        constants = {"E": E, "J": E // P, "KIND": kind, "P": P, "BLOCK": tail.EMBEDDING_BLOCK}
        yield FusedCase(f"embed, {size}, {name}", tail.embed_kernel, signature, constants, {})
    yield from _attention_cases(size, R, H, K)
    C = VOCABULARY // tail.ROWS_OF_PROGRAM
    signature = {"best_logit": "*fp32", "best_token": "*i32"}
    signature |= dict.fromkeys(("advance", "input", "output", "position", "step"), "*i64")
    yield FusedCase("choose", tail.choose_kernel, signature, {"C": C, "BLOCK": 4096}, {"num_warps": 8})
    yield from _sampler_cases()
    yield from _chunk_cases(size, H, K)


def _attention_cases(size: str, R: int, H: int, K: int) -> Iterator[FusedCase]:
    splits = dict.fromkeys(("values", "maximum", "total"), "*fp32")
    for positions in (64, 4097):
        N = attention.num_splits(R * K, positions)
        constants = {"D": HEAD_DIM, "N": N, "BLOCK": attention.BLOCK}
        for cache in ("bf16", "int8"):
            kind = "*bf16" if cache == "bf16" else "*i8"
            signature = dict.fromkeys(("qkv", "q_norm", "k_norm", "y"), "*bf16") | splits
            signature |= dict.fromkeys(("cos", "sin", "k_scale", "v_scale"), "*fp32") | {"k": kind, "v": kind}
            signature |= {"eps": "fp32", "softmax_scale": "fp32", "num_positions": "i32", "position": "*i64"}
            own = {"K": K, "G": H // K, "ROWS": attention.MIN_DOT, "IS_QUANTIZED": cache == "int8"}
            name = f"attention, {size}, {cache} cache, {N} splits"
            yield FusedCase(name, attention.attention_kernel, signature, constants | own, {})
        if N > 1:
            signature = {"position": "*i64", "y": "*bf16"} | splits
            own = {"H": H, "W": triton.next_power_of_2(N)}
            yield FusedCase(f"combine, {size}, {N} splits", attention.combine_kernel, signature, constants | own, {})


def _sampler_cases() -> Iterator[FusedCase]:
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
    yield FusedCase("largest", sample.largest_kernel, {"logits": "*fp32", "largest": "*fp32"}, tokens, {})
    yield FusedCase("best", sample.best_kernel, {"logits": "*fp32"} | best, tokens, {})
    for index in (0, 1, sample.PASSES, sample.PASSES + 1, 2 * sample.PASSES - 1):
        own = {"INDEX": index, "TILE": sample.TILE}
        yield FusedCase(f"search, pass {index}", sample.search_kernel, types, row | own, {})
    types |= {"min_p": "*fp32", "seed": "*i64", "step": "*i64"} | best
    yield FusedCase("draw", sample.draw_kernel, types, row, {})


def _chunk_cases(size: str, H: int, K: int) -> Iterator[FusedCase]:
    for cache, kind in (("bf16", "*bf16"), ("int8", "*i8")):
        signature = {"q": "*bf16", "y": "*bf16", "k": kind, "v": kind, "T": "i32", "S": "i32", "scale": "fp32"}
        signature |= dict.fromkeys(("k_scale", "v_scale"), "*fp32" if cache == "int8" else "*bf16")
        signature |= dict.fromkeys(("position", "row"), "*i64")
        constants = {"H": H, "G": H // K, "D": HEAD_DIM, "IS_QUANTIZED": cache == "int8"}
        constants |= {"QUERIES": chunk_attention.QUERIES, "BLOCK": chunk_attention.BLOCK}
        name = f"chunk attention, {size}, {cache} cache"
        yield FusedCase(name, chunk_attention.chunk_kernel, signature, constants, {})


def _constants(R: int, N: int, K: int, kind: int, num_tiles: int = 1) -> dict[str, Any]:
    BN, BK = tile_shape(R, K, kind, num_tiles)
    return {"R": R, "ROWS": R, "N": N, "K": K, "BN": BN, "BK": BK, "KIND": kind, "P": channels_of(kind)}
