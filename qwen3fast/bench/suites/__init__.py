"""The suites of `python -m qwen3fast.bench --suite NAME`, by name."""

from qwen3fast.bench.suites import (
    ablation,
    batch,
    cache,
    context,
    forms,
    llama_bench,
    quality,
    quantization,
    roofline,
    serve,
    startup,
)
from qwen3fast.bench.suites.suite import Suite

MODULES = (cache, roofline, batch, context, startup, quantization, quality, ablation, forms, llama_bench, serve)
SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in MODULES}

__all__ = ["SUITES", "Suite"]
