"""Weights in 8 and 4 bits. Read formats, linear, convert; the fast product is in kernels/cpu/quantized.cpp."""

from qwen3fast.quantization.convert import get_format, quantize_model

__all__ = ["get_format", "quantize_model"]
