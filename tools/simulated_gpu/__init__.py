"""A GPU in software: main.py says what is simulated and what is not.

runtime.cpp has memory, streams, events and graphs; operations.py stands in for PyTorch's kernels; kernels.py runs
Triton's.
"""
