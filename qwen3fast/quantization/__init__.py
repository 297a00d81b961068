"""Weights in 8 and 4 bits. Read formats, layers, experts, convert; the fast product is in kernels/cpu/quantized.cpp."""

from qwen3fast.quantization.convert import (
    DEQUANTIZE,
    formats_of,
    get_format,
    plain_experts,
    plain_modules,
    prepare_quantization,
    quantize_experts,
    quantize_model,
)

__all__ = [
    "DEQUANTIZE",
    "formats_of",
    "get_format",
    "plain_experts",
    "plain_modules",
    "prepare_quantization",
    "quantize_experts",
    "quantize_model",
]
