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
        block_CN = weight[:, begin:end].T.contiguous()
        level_NK[:, begin:end], scale_NG[:, begin // GROUP : end // GROUP], error_CN = _quantize_columns(
            block_CN, factor[begin:end, begin:end]
        )
        weight[:, end:] -= error_CN.T @ factor[begin:end, end:]
    scale_NG[~is_finite_NG] = torch.nan
    return pack_int4(level_NK, scale_NG)


def inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U.T @ U the inverse of the damped Hessian, (K, K) float32.

    damping: a share of the diagonal's mean, added to the diagonal: the error of the weights counts that much.
    """
    added = (damping * hessian_KK.diagonal().double().mean()).clamp(min=1e-12)
    damped = hessian_KK.double() + added * torch.eye(len(hessian_KK), dtype=torch.float64, device=hessian_KK.device)
    lower = torch.linalg.cholesky(damped.flip(0, 1))  # of the channels in reverse: its inverse, reversed, is U
    identity = torch.eye(len(damped), dtype=torch.float64, device=damped.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
    return factor


def _quantize_columns(weight_CN: Tensor, factor_CC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize columns of a weight, each a row of weight_CN; the columns after each make up for its error, in place.

    Returns: levels (N, C), scales (N, C / 32), and the errors (C, N) that later columns need.
    """
    level_CN, error_CN, scales = torch.empty_like(weight_CN, dtype=torch.uint8), torch.empty_like(weight_CN), []
    for begin in range(0, len(weight_CN), GROUP):
        end = begin + GROUP
        scale_N = int4_scales(weight_CN[begin:end].T.contiguous())
        divisor_N = torch.where(scale_N == 0, 1.0, scale_N)
        for k in range(begin, end):
            level_N = torch.round(weight_CN[k] / divisor_N).clamp_(-8, 7)
            level_CN[k] = level_N + 8
            error_CN[k] = (weight_CN[k] - level_N * scale_N) / factor_CC[k, k]
            weight_CN[k + 1 : end].addr_(factor_CC[k, k + 1 : end], error_CN[k], alpha=-1)
        weight_CN[end:] -= factor_CC[begin:end, end:].T @ error_CN[begin:end]
        scales.append(scale_N)
    return level_CN.T, torch.stack(scales, dim=1), error_CN
