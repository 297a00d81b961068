"""qwen3fast itself as a worker, in the environment of the benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peers.protocol import GGUF, Variant, run_adapter
from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.quantization.lossless import LOSSLESS

_QUANTIZED = {"activations": "bf16; int8 in groups of 32 for products, sums in fp32"}
_INT8 = {"weights": "int8, a scale per row (8.03 bits per weight), all matrices", **_QUANTIZED}
_INT4 = {"weights": "int4, a scale per 32 weights (4.26 bits per weight), all matrices", **_QUANTIZED}
_PLAIN, _INT8_CACHE = {"kv_cache": "bf16"}, {"kv_cache": "int8, a scale per key and value vector"}
INT8_CACHE = "-kv8"  # ends the name of a variant with such a cache
LABELS = {LOSSLESS: " lossless", "int8-kv8": " int8 cache", "int4-kv8": " int8 cache"}  # beside our name
# Weights are quantized when they are loaded, by this version.
VARIANTS = (
    Variant("bf16", "bf16", {"weights": "bf16", "activations": "bf16, sums in fp32", **_PLAIN}),
    Variant(
        "bf16",
        LOSSLESS,
        {"weights": "bf16, packed exactly in 12 bits", "activations": "bf16, sums in fp32", **_PLAIN},
        weights="bf16",
    ),
    Variant("int8", "int8", {**_INT8, **_PLAIN}, weights="bf16"),
    Variant("int8", "int8" + INT8_CACHE, {**_INT8, **_INT8_CACHE}, weights="bf16"),
    Variant("int4", "int4", {**_INT4, **_PLAIN}, weights="bf16"),
    Variant("int4", "int4" + INT8_CACHE, {**_INT4, **_INT8_CACHE}, weights="bf16"),
    Variant(GGUF, GGUF, {"weights": "the file's", **_QUANTIZED, **_PLAIN}),
)


def model_path(variant: Variant, weights: Path) -> Path:
    """Return the checkpoint of a variant. weights: the folder of a model's weights, or a GGUF file."""
    return weights if variant.format == GGUF else weights / variant.folder


class OurEngine:
    """A Generator with compiled steps."""

    def __init__(self, variant: str, model: Path, threads: int, max_seq_len: int, device: str) -> None:
        format = variant.removesuffix(INT8_CACHE)
        self.generator = Generator(
            load_model(model, device, quantization=None if format in ("bf16", GGUF) else format, calibrate=False),
            max_seq_len=max_seq_len,
            kv_cache_dtype="int8" if variant.endswith(INT8_CACHE) else "auto",
            compile=True,
            threads=threads,
        )
        self.generator.warmup()
        self.facts: dict[str, Any] = {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "weight_bytes": self.generator.stats.weight_bytes,
        }

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return one reply, see `protocol.Engine`."""
        result = self.generator.generate(prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=steps + 1))
        return result.metrics.prefill_s, result.metrics.decode_s, result.token_ids


if __name__ == "__main__":
    run_adapter(("torch",), OurEngine)
