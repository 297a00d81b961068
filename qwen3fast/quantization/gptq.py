"""Quantize a weight to 4 bits with error correction: each column makes up for the errors of earlier columns.

The squared error of a layer's outputs on calibration inputs, not of its weights, is made small. The result is an
ordinary weight of its format, with other levels: same scales, same bytes, same kernels.
Source: Frantar et al., GPTQ, arXiv:2210.17323, with scales chosen before any column is quantized; in the equivalent
form of Chee et al., QuIP, arXiv:2307.13304, section 3 (LDLQ), which inverts no matrix.

N out_features   K in_features   G groups of 32 channels   C columns of a group
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3fast.quantization.formats import GROUP, Format, Packed, put_rows, quantize
from qwen3fast.quantization.packed import pack_halves

BLOCK = 128  # columns whose corrections for all earlier columns are computed together; a multiple of GROUP
ROWS = 4096  # quantized together: a block of their columns fits the processor's cache


def quantize_with(
    weight_NK: Tensor, format: Format, feedback_KK: Tensor, product_dtype: torch.dtype = torch.float32
) -> Packed:
    """Quantize a weight to a format of 4 bits, given the `feedback` of its inputs.

    weight_NK: any float dtype; N is a multiple of 16, K of 32. Groups that `quantize` makes NaN are NaN here.
    product_dtype: of the products of errors and feedback, from 128 columns to later ones; they are summed in float32.
    """
    N, K = weight_NK.shape
    packed = format.empty(N, K, weight_NK.device)
    far_KK = feedback_KK.to(product_dtype)
    for begin in range(0, N, ROWS):
        rows = weight_NK[begin : begin + ROWS]
        plain = quantize(rows, format)
        level_KN = _levels(rows, *format.steps(plain), feedback_KK, far_KK)
        put_rows(packed, N, begin, plain._replace(weight=pack_halves(level_KN.T.contiguous())))
    return packed


def feedback(hessian_KK: Tensor, damping: float) -> Tensor:
    """Return the share of each column's error that later columns make up for: U, (K, K) float32, upper triangular.

    U @ D @ U.T is the damped Hessian, with D diagonal and ones on U's diagonal.
    hessian_KK: float32, the mean of the products of each two input channels; read on and above the diagonal only.
    damping: a share of its diagonal's mean, added to the diagonal: the weights' own error counts that much.
    """
    added = (damping * hessian_KK.diagonal().double().mean()).clamp(min=1e-12)
    damped = hessian_KK.flip(0, 1)  # of the channels in reverse, L @ L.T; in their order, its triangle is the upper
    damped.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        lower = torch.linalg.cholesky(damped.double()).float()
    upper = lower.flip(0, 1)
    factor: Tensor = upper.div_(upper.diagonal().clone())
    return factor


def _levels(weight_NK: Tensor, step_NG: Tensor, minimum_NG: Tensor, feedback_KK: Tensor, far_KK: Tensor) -> Tensor:
    """Return the levels, (K, N) uint8 from 0 to 15; a level stands for level * step - minimum.

    far_KK: the feedback in the dtype of products between blocks of columns.
    """
    N, K = weight_NK.shape
    # Columns that are quantized are replaced by their errors.
    column_KN = weight_NK.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    step_GN, minimum_GN = (x.T.contiguous().nan_to_num_(0.0, 0.0, 0.0) for x in (step_NG, minimum_NG))
    column_KN.nan_to_num_(0.0, 0.0, 0.0)
    level_KN = torch.empty(K, N, dtype=torch.uint8, device=weight_NK.device)
    error_KN = column_KN.to(far_KK.dtype)  # the same tensor for float32
    for begin in range(0, K, BLOCK):
        end = min(begin + BLOCK, K)
        wanted_CN = (far_KK[:begin, begin:end].T @ error_KN[:begin]).float().add_(column_KN[begin:end])
        for first in range(begin, end, GROUP):
            group, g = slice(first, first + GROUP), first // GROUP
            wanted = wanted_CN[first - begin : first - begin + GROUP]
            wanted.addmm_(feedback_KK[begin:first, group].T, column_KN[begin:first])
            scales = step_GN[g], minimum_GN[g]
            level_KN[group] = _quantize_group(column_KN[group], wanted, *scales, feedback_KK[group, group])
        error_KN[begin:end] = column_KN[begin:end]
    return level_KN


def _quantize_group(
    column_CN: Tensor, wanted_CN: Tensor, step_N: Tensor, minimum_N: Tensor, feedback_CC: Tensor
) -> Tensor:
    """Return the levels of a group, (C, N) float32, and replace its columns by their errors.

    wanted_CN: the columns, and what they make up for of columns before the group.
    """
    wanted_CN.add_(minimum_N)
    column_CN.add_(minimum_N)
    divisor_N = torch.where(step_N == 0, 1.0, step_N)
    for k in range(len(column_CN)):
        wanted_N = torch.addmv(wanted_CN[k], column_CN[:k].T, feedback_CC[:k, k])
        level_N = torch.div(wanted_N, divisor_N, out=wanted_CN[k]).round_().clamp_(0, 15)
        column_CN[k].addcmul_(level_N, step_N, value=-1)
    return wanted_CN
