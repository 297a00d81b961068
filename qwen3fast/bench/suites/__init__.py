"""The suites of `python -m qwen3fast.bench --suite NAME`, by name."""

from qwen3fast.bench.suites import ablation, batch, cache, context, quantization, roofline, serve, startup
from qwen3fast.bench.suites.suite import Suite

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE
    for module in (cache, roofline, batch, context, startup, quantization, ablation, serve)
}

__all__ = ["SUITES", "Suite"]
