"""A model of how long a decode step takes on a GPU: bytes that must be read, and kernels that must be started.

    python benchmarks/gpu_model.py > benchmarks/gpu_model.md

A step's time is modeled as

    bytes / bandwidth  +  kernels x (cost of a dependent kernel in a CUDA graph)

Bytes are the weights, keys and values that a step reads. Kernels are counted by tools/compile_for_gpu.py. Bandwidth
and the cost of a kernel come from the first run on a GPU, of a prototype: see FIRST_RUN. They are to be replaced by
what tools/gpu_check.py records.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qwen3fast.bench.record import load_record
from qwen3fast.bench.session import forward_flop
from qwen3fast.engine.prefill import split_into_chunks
from qwen3fast.model import build_on_meta
from qwen3fast.model.config import ModelConfig
from qwen3fast.quantization.convert import quantize_model

SIZES = ("0.6b", "1.7b", "4b", "8b", "14b", "32b")
CONTEXTS = (32, 1000, 4096)
COMPILED = Path(__file__).parent / "results" / "gpu-compile.json"
SHAPE: dict[str, Any] = {"gpu": "sm_90", "step": "decode", "model": "0.6b", "weights": "bf16", "batch_size": 1}
OF_LAYERS = ("step_norm_linear", "step_attend", "step_linear_add", "step_norm_gated_linear")
FIRST_RUN = (
    "NVIDIA H200, torch 2.11.0+cu130, triton 3.6, 2026-11-28: a prototype of this engine at commit 755fa47, one row, "
    "bfloat16, random weights, greedy, each step one CUDA graph"
)
COPY_BANDWIDTH = 4.24e12  # bytes/s of a copy in the H200's memory, read and written, in the same hour
WEIGHT_BYTES = 1.19e9  # that a step of 0.6B reads


@dataclass(frozen=True)
class Replay:
    """A graph of the prototype: kernels of a step, the device's seconds for it."""

    settings: str
    kernels: int
    seconds: float

    @property
    def kernel_s(self) -> float:
        """Seconds that a kernel costs beside reading the weights at the copy's speed."""
        return (self.seconds - WEIGHT_BYTES / COPY_BANDWIDTH) / self.kernels


REPLAYS = (
    Replay("Inductor's defaults", 506, 2.01e-3),
    Replay("coordinate_descent_tuning", 336, 1.29e-3),
    Replay("coordinate_descent_tuning, triton.enable_pdl", 336, 1.04e-3),
)
KERNEL_S = REPLAYS[-1].kernel_s
# Measured with the last of these settings: size, context, tokens/s.
MEASURED = (("0.6b", 32, 1017), ("0.6b", 1000, 987), ("8b", 32, 219), ("8b", 4000, 209))
OTHERS = (
    ("0.6B, eager, the tree before the prototype", "31"),
    ("0.6B, without graphs, same settings", "61"),
    ("0.6B, PyTorch's SDPA instead of split attention, context 32 / 1,000", "897 / 598"),
    ("0.6B, transformers 5.17, eager / static cache, compiled", "23 / 265 to 317"),
    ("0.6B, no cache, eager / compiled", "9 / 45"),
    ("0.6B, 16 rows, split attention, context 128 / 1,000", "8,740 / 7,100"),
    ("0.6B, 64 rows, SDPA, context 128 / 1,000", "23,200 / 13,100"),
    ("0.6B, int8 weights", "425"),
    ("8B, SDPA, context 32 / 4,000", "209 / 131"),
)
# The targets on the H200, tokens/s, and the bound of kernels a step; GOAL_KERNEL_S is what others measured of kernels
# with programmatic dependent launch. For 8B, 85% of the bandwidth.
GOAL_KERNEL_S, GOAL_SHARE = 1.65e-6, 0.85
GOALS: tuple[tuple[str, int, int, float | None], ...] = (
    ("0.6b", 32, 175, 1700), ("0.6b", 4096, 175, 1500), ("8b", 32, 220, None)
)  # fmt: skip
CHUNK_TOKENS = 1000  # of a prompt
# Of the H200's 989 TFLOP/s in bfloat16 (its data sheet), for products of a chunk: an assumption.
GEMM_FLOP_S = 0.5 * 989e12
FUSED_ROWS = 8  # at most; steps of more run compiled blocks

PUBLISHED = """\
| what | tokens/s | source |
| --- | ---: | --- |
| 0.6B, eager PyTorch, no cache / with a cache, H100 | 51 / 48 | Raschka, reasoning-from-scratch, chapter 2 |
| 0.6B, compiled, no cache / with a cache, H100 | 164 / 141 | the same |
| 0.6B, compiled, static cache, H100 | 177 | the same |
| 0.6B, transformers / SGLang, H20 (4.0 TB/s), prompt of 1 token | 58.6 / 414 | Qwen3 documentation, speed benchmark |
| 8B, transformers / SGLang, H20, prompt of 1 token | 45.3 / 81.7 | the same |"""


def step_bytes(config: ModelConfig, context: int) -> int:
    """Return what one step of one request must read, in bytes."""
    return config.decode_parameters * config.dtype.itemsize + config.kv_bytes_per_token(config.dtype) * context


@cache
def model_bytes(size: str, weights: str) -> int:
    """Return the weights that a step reads, in bytes."""
    model = build_on_meta(ModelConfig.named(size))
    if weights != SHAPE["weights"]:
        quantize_model(model, weights, model.config.dtype)
    return model.num_bytes(per_token=True)


@cache
def compiled_kernels(**changes: Any) -> tuple[int, int]:
    """Return the kernels of one layer, and those beside the layers: one request, bfloat16, H100.

    A library call counts as one. changes: other labels of the record's case.
    """
    record, shape = load_record(COMPILED), SHAPE | changes
    [case] = [case for case in record.cases if case.labels == shape]
    step = record.notes["steps"][case.name]
    launches = Counter({name: part["launches"] + sum(part["calls"].values()) for name, part in step["parts"].items()})
    launches.update(step["own_launches"])
    layers = ModelConfig.named(SHAPE["model"]).num_hidden_layers
    of_layers = sum(launches.pop(f"qwen3fast::{name}", 0) for name in OF_LAYERS)
    of_blocks = launches.pop("run_prefill_block", 0) + launches.pop("run_block", 0)
    return of_layers // layers + of_blocks, sum(launches.values()) + sum(step["eager_calls"].values())


def kernels_of(size: str) -> int:
    """Return the kernels of a step of a size, as the code is now."""
    layer, beside = compiled_kernels()
    return layer * ModelConfig.named(size).num_hidden_layers + beside


def seconds(size: str, context: int, kernels: int, kernel_s: float = KERNEL_S) -> float:
    """Return how long a step should take on the H200."""
    return step_bytes(ModelConfig.named(size), context) / COPY_BANDWIDTH + kernels * kernel_s


def rows() -> list[str]:
    """Return a line of the table for each size and context."""
    lines = []
    for size in SIZES:
        for context in CONTEXTS:
            size_bytes, kernels = step_bytes(ModelConfig.named(size), context), kernels_of(size)
            read_s, step_s = size_bytes / COPY_BANDWIDTH, seconds(size, context, kernels)
            cells = [size, f"{context:,}", f"{size_bytes / 1e9:.2f}", f"{1 / read_s:,.0f}", f"{kernels:,}"]
            lines.append("| " + " | ".join([*cells, f"{1 / step_s:,.0f}", f"{read_s / step_s:.0%}"]) + " |")
    return lines


def other_rows() -> list[str]:
    """Return lines for quantized weights, more rows, and chunks of a prompt."""
    lines = []
    for size, weights, batch in itertools.product(("0.6b", "8b"), ("bf16", "int8", "int4", "fp8"), (1, 8, 64)):
        if weights != "bf16" and batch > 1:
            continue
        config = ModelConfig.named(size)
        size_bytes = model_bytes(size, weights) + batch * CONTEXTS[0] * config.kv_bytes_per_token(config.dtype)
        layer, beside = compiled_kernels(**({} if batch <= FUSED_ROWS else {"batch_size": batch}))
        kernels = layer * config.num_hidden_layers + beside
        step_s = [size_bytes / COPY_BANDWIDTH + kernels * kernel_s for kernel_s in (KERNEL_S, GOAL_KERNEL_S)]
        cells = [size, weights, f"{batch}", f"{size_bytes / 1e9:.2f}", f"{kernels:,}"]
        lines.append("| " + " | ".join([*cells, *(f"{batch / s:,.0f}" for s in step_s)]) + " |")
    return lines


def prompt_row(size: str) -> str:
    """Return the line of a prompt's chunks: the larger of arithmetic and reading, and the kernels."""
    config = ModelConfig.named(size)
    sizes = split_into_chunks(CHUNK_TOKENS, 2 * CHUNK_TOKENS)
    layer, beside = compiled_kernels(step="prefill")
    kernels = len(sizes) * (layer * config.num_hidden_layers + beside)
    gemm_s = sum(forward_flop(config, tokens) for tokens in sizes) / GEMM_FLOP_S
    read_s = len(sizes) * model_bytes(size, "bf16") / COPY_BANDWIDTH
    seconds = max(gemm_s, read_s) + kernels * KERNEL_S
    cells = (" + ".join(map(str, sizes)), f"{gemm_s * 1e3:.1f}", f"{read_s * 1e3:.1f}", f"{kernels:,}")
    return f"| {size} | {' | '.join(cells)} | {seconds * 1e3:.1f} |"


def goal_rows() -> list[str]:
    """Return a line for each target: the model's speed, and what a kernel may cost."""
    lines = []
    for size, context, kernels, goal in GOALS:
        read_s = step_bytes(ModelConfig.named(size), context) / COPY_BANDWIDTH
        wanted = goal or GOAL_SHARE / read_s
        speed = 1 / seconds(size, context, kernels, GOAL_KERNEL_S)
        most = [f"{(1 / wanted - read_s) / n * 1e6:.2f}" for n in (kernels, kernels_of(size))]
        cells = [size, f"{context:,}", f"{kernels}", f"{speed:,.0f}", f"{wanted:,.0f}", *most]
        lines.append(f"| {' | '.join(cells)} | {'yes' if speed >= wanted else '**no**'} |")
    return lines


def print_targets() -> None:
    """Print each target beside the model, and what a kernel may cost."""
    print(f"""
## The targets

With the bound of kernels, at {GOAL_KERNEL_S * 1e6:.2f} us each; and what a kernel may cost at most to reach the target,
with that bound and with as many kernels as there are now. What they do cost is not measured yet. A target that is
not reached needs cheaper kernels, or fewer.

| size | context | kernels | model, tokens/s | target | us at most | with today's kernels | reached |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | :---: |""")
    print("\n".join(goal_rows()))


def print_others() -> None:
    """Print steps of other weights and rows, and prompts."""
    low, high = (f"{kernel_s * 1e6:.{digits}f}" for kernel_s, digits in ((KERNEL_S, 1), (GOAL_KERNEL_S, 2)))
    print(f"""
## Other weights, rows and prompts

A step at a context of {CONTEXTS[0]}, with kernels at {low} and at {high} us. More than {FUSED_ROWS} rows run compiled
blocks, whose kernels were counted for 0.6B. The model knows nothing of arithmetic: unpacking weights, or the products
of 64 rows, may take longer.

| size | weights | rows | GB a step | kernels | tokens/s | at {high} us |
| --- | --- | ---: | ---: | ---: | ---: | ---: |""")
    print("\n".join(other_rows()))
    print(f"""
A prompt of {CHUNK_TOKENS:,} tokens in bfloat16, until its first token: products at half of the H200's stated rate (an
assumption) or reading the weights once per chunk, whichever takes longer, and kernels at {low} us.

| size | chunks | ms of products | ms of reading | kernels | ms |
| --- | --- | ---: | ---: | ---: | ---: |""")
    print("\n".join(map(prompt_row, ("0.6b", "8b"))))


def print_first_run() -> None:
    """Print what the prototype measured, and what the model says of the same steps."""
    print(f"## First run on a GPU\n\n{FIRST_RUN}. A prototype's figures, noted by hand: no record of this program.\n")
    print("| settings of Inductor | kernels a step | ms a replay | us a kernel, beside reading |")
    print("| --- | ---: | ---: | ---: |")
    for replay in REPLAYS:
        cells = (f"{replay.kernels}", f"{replay.seconds * 1e3:.2f}", f"{replay.kernel_s * 1e6:.1f}")
        print(f"| {replay.settings} | {' | '.join(cells)} |")
    print("\nWith the last settings and split attention; the model with that run's kernels a layer:\n")
    print("| size | context | measured, tokens/s | model, tokens/s |\n| --- | ---: | ---: | ---: |")
    per_layer = REPLAYS[-1].kernels / ModelConfig.named("0.6b").num_hidden_layers
    for size, context, measured in MEASURED:
        kernels = round(per_layer * ModelConfig.named(size).num_hidden_layers)
        print(f"| {size} | {context:,} | {measured:,} | {1 / seconds(size, context, kernels):,.0f} |")
    print("\nOthers in the same hour:\n\n| what | tokens/s |\n| --- | ---: |")
    print("\n".join(f"| {what} | {value} |" for what, value in OTHERS))


def main() -> None:
    """Print the page."""
    layer, beside = compiled_kernels()
    print("# What a decode step should take on a GPU\n")
    print(
        "Made by `python benchmarks/gpu_model.py`. A model, not a measurement; its two constants were measured in the"
    )
    print("first run below.\n")
    print(f"One request, bfloat16, on an H200: memory at {COPY_BANDWIDTH / 1e12:.2f} TB/s (a copy, read and written),")
    print(
        f"one CUDA graph a step, {layer} kernels a layer and {beside} beside them (tools/compile_for_gpu.py; a product"
    )
    print(f"of a library counts as one), {KERNEL_S * 1e6:.1f} us a kernel beside reading.\n")
    print("| size | context | GB a step | limit, tokens/s | kernels | model, tokens/s | of the bandwidth |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(rows()))
    print("\nLimit: reading alone. The smaller the model, the more of a step is its kernels; 8B and up are bound by")
    print("memory. All are estimates.")
    print_targets()
    print_others()
    print()
    print_first_run()
    print("\n## Published figures for comparison\n")
    print(PUBLISHED)


if __name__ == "__main__":
    main()
