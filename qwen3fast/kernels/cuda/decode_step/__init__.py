"""The kernels of a fused decode step for 1 to 8 rows of a dense model: six launches per layer, and three more per step.

Read launch, weights, linear, attention, tail. Each kernel stands beside its plain form; engine/fused_step.py runs them.
"""
