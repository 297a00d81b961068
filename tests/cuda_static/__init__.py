"""Checks of CUDA code on machines without a GPU."""
