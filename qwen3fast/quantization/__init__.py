"""Weights in 8 and 4 bits. Read formats, linear, convert; the fast product is in kernels/cpu/quantized.cpp."""

from qwen3fast.quantization.convert import DEQUANTIZE, prepare_quantization, quantize_model, refuse_experts

__all__ = ["DEQUANTIZE", "prepare_quantization", "quantize_model", "refuse_experts"]
