"""Weights in 8 and 4 bits. Read formats, layers, experts, convert; the fast product is in kernels/cpu/quantized.cpp."""
