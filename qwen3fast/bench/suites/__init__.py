"""The suites of `python -m qwen3fast.bench --suite NAME`, by name."""

from qwen3fast.bench.suites import (
    ablation,
    batch,
    cache,
    context,
    llama_bench,
    quantization,
    roofline,
    serve,
    startup,
)
from qwen3fast.bench.suites.suite import Suite

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE
    for module in (cache, roofline, batch, context, startup, quantization, ablation, llama_bench, serve)
}

__all__ = ["SUITES", "Suite"]
