"""Quantize a weight to int4 with error correction: each column's rounding error is made up for by the columns after it.

The squared error of a layer's outputs on calibration inputs, not of its weights, is made small. The result is an
ordinary int4 weight: same bytes, same kernels.
Source: Frantar et al., GPTQ, arXiv:2210.17323, with each group's scale chosen before its first column is quantized.

N out_features   K in_features   G groups of 32 channels
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.quantization.formats import GROUP, Packed, int4_scales, pack_int4

BLOCK = 128  # columns between two updates of all later columns; a multiple of GROUP


def quantize_int4_with(weight_NK: Tensor, hessian_KK: Tensor, damping: float) -> Packed:
    """Quantize a weight to int4, given the second moment of its inputs.

    weight_NK: any float dtype; N is a multiple of 16, K of 32. hessian_KK: float32, the mean of the products of each
    two input channels. damping: as in `inverse_factor`. Groups with NaN or infinity become NaN.
    """
    weight = weight_NK.float().clone()
    N, K = weight.shape
    is_finite_NG = weight.view(N, K // GROUP, GROUP).isfinite().all(dim=2)
    weight.nan_to_num_(0.0, 0.0, 0.0)
    factor = inverse_factor(hessian_KK, damping)
    level_NK = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    scale_NG = torch.empty(N, K // GROUP, device=weight.device)
    for begin in range(0, K, BLOCK):
        end = min(begin + BLOCK, K)
        error = _quantize_columns(weight, factor, begin, end, level_NK, scale_NG)
        weight[:, end:] -= error @ factor[begin:end, end:]
    scale_NG[~is_finite_NG] = torch.nan
    return pack_int4(level_NK, scale_NG)


def inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U.T @ U the inverse of the damped Hessian, (K, K) float32.

    damping: a share of the diagonal's mean, added to the diagonal: the error of the weights counts that much.
    """
    added = (damping * hessian_KK.diagonal().double().mean()).clamp(min=1e-12)
    damped = hessian_KK.double() + added * torch.eye(len(hessian_KK), dtype=torch.float64, device=hessian_KK.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def _quantize_columns(
    weight: Tensor, factor: Tensor, begin: int, end: int, level_NK: Tensor, scale_NG: Tensor
) -> Tensor:
    """Quantize some columns, correcting those after each up to `end`. Returns: the errors that later columns need."""
    error = torch.empty(len(weight), end - begin, device=weight.device)
    for k in range(begin, end):
        if k % GROUP == 0:
            scale_NG[:, k // GROUP] = int4_scales(weight[:, k : k + GROUP])
        scale_N = scale_NG[:, k // GROUP]
        level_N = torch.round(weight[:, k] / torch.where(scale_N == 0, 1.0, scale_N)).clamp_(-8, 7)
        level_NK[:, k] = (level_N + 8).to(torch.uint8)
        error_N = (weight[:, k] - level_N * scale_N) / factor[k, k]
        weight[:, k:end] -= error_N[:, None] * factor[k, k:end]
        error[:, k - begin] = error_N
    return error
