"""A model of how long a decode step takes on a GPU: bytes that must be read, and kernels that must be started.

    python benchmarks/gpu_model.py > benchmarks/gpu_model.md

Nothing here was measured on a GPU by this project. A step's time is modelled as

    bytes / memory speed  +  kernels x (gap between two kernels of a graph)

Bytes are those of a step's weights and used keys and values (attention reads on to the end of its bucket). Kernels are
those that tools/compile_for_gpu.py found. The other two numbers are assumptions, to be replaced by what
tools/gpu_check.py measures.
"""

from __future__ import annotations

from pathlib import Path

from qwen3fast.bench.record import load_record
from qwen3fast.model.config import ModelConfig

SIZES = ("0.6b", "1.7b", "4b", "8b", "14b", "32b")
CONTEXTS = (128, 1024, 8192)
BANDWIDTH = 3.0e12  # bytes/s; assumed for an H100, whose data sheet says 3.35e12
COMPILED = Path(__file__).parent / "results" / "gpu-compile.json"
GAP_S = 1.0e-6  # between the end of a kernel and the start of the next one in a graph
TARGETS = {"0.6b": "1,200 tokens/s", "8b": "80% of the memory's speed"}

PUBLISHED = """\
| what | tokens/s | source |
| --- | ---: | --- |
| 0.6B, eager PyTorch, no cache / with a cache, H100 | 51 / 48 | Raschka, reasoning-from-scratch, chapter 2 |
| 0.6B, compiled, no cache / with a cache, H100 | 164 / 141 | the same |
| 0.6B, compiled, static cache, H100 | 177 | the same |
| 0.6B, transformers / SGLang, H20 (4.0 TB/s), prompt of 1 token | 58.6 / 414 | Qwen3 documentation, speed benchmark |
| 8B, transformers / SGLang, H20, prompt of 1 token | 45.3 / 81.7 | the same |"""


def step_bytes(config: ModelConfig, context: int) -> int:
    """What one step of one request must read, in bytes."""
    return config.decode_parameters * config.dtype.itemsize + config.kv_bytes_per_token(config.dtype) * context


def compiled_kernels() -> tuple[int, int]:
    """Kernels of one layer, and those beside the layers: one request, bfloat16, H100. A library call counts as one."""
    record = load_record(COMPILED)
    shape = {"gpu": "sm_90", "model": "0.6b", "weights": "bf16", "attention": "sdpa", "batch_size": 1}
    [case] = [case for case in record.cases if case.labels == shape]
    step = record.notes["steps"][case.name]
    parts = {name: part["launches"] + sum(part["calls"].values()) for name, part in step["parts"].items()}
    layer = parts.pop("run_block")
    return layer, sum(parts.values()) + sum(step["eager_calls"].values())


def rows() -> list[str]:
    """A line of the table for each size and context."""
    lines = []
    layer, beside = compiled_kernels()
    for size in SIZES:
        config = ModelConfig.named(size)
        for context in CONTEXTS:
            size_bytes, count = step_bytes(config, context), layer * config.num_hidden_layers + beside
            read_s, gaps_s = size_bytes / BANDWIDTH, count * GAP_S
            share = read_s / (read_s + gaps_s)
            cells = [size, f"{context:,}", f"{size_bytes / 1e9:.2f}", f"{1 / read_s:,.0f}", str(count)]
            cells += [f"{1 / (read_s + gaps_s):,.0f}", f"{share:.0%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Print the page."""
    print("# What a decode step should take on a GPU\n")
    print("Made by `python benchmarks/gpu_model.py`. A model, not a measurement: no GPU has run this code yet.\n")
    layer, beside = compiled_kernels()
    print(f"One request, bfloat16, memory read at {BANDWIDTH / 1e12:.1f} TB/s (H100), one CUDA graph a step,")
    print(
        f"{layer} kernels a layer and {beside} beside them (found by tools/compile_for_gpu.py in the compiled step; a"
    )
    print(f"product or an attention counts as one), {GAP_S * 1e6:.1f} us between kernels.\n")
    print("| size | context | GB a step | limit, tokens/s | kernels | model, tokens/s | of the memory's speed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    print("\n".join(rows()))
    print(
        "\nLimit: reading alone. The smaller the model, the more of a step is the gaps between its kernels: 0.6B needs"
    )
    print("fewer and larger kernels, 8B and up are bound by memory. Targets: ", end="")
    print("; ".join(f"{size}: {target}" for size, target in TARGETS.items()) + ".\n")
    print("## Published figures for comparison\n")
    print(PUBLISHED)


if __name__ == "__main__":
    main()
