"""Packed weights. Read formats, layers, experts, convert; the fast product is in kernels/cpu/quantized.cpp."""
