"""The Triton attention kernel against PyTorch's attention."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_tensor
from cuda_static.kernel_checks import TOLERANCES, any_order, assert_near, empty_is_nan  # noqa: F401  fixtures
from kernel_device import DEVICE

from qwen3fast.kernels.cuda import split_attention as kernel
from qwen3fast.model.kv_cache import quantize_vectors

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("any_order", "empty_is_nan")]


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


def expected_attention(q_BTHD, k_RKSD, v_RKSD, position_B1):
    """In float32, over the used positions only."""
    B = len(q_BTHD)
    mask_BTL = torch.arange(k_RKSD.shape[2]) <= position_B1[..., None]
    k, v = (torch.where(mask_BTL.view(B, 1, -1, 1), x[:B].float(), 0.0) for x in (k_RKSD, v_RKSD))
    return F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2).float(), k, v, attn_mask=mask_BTL[:, None], enable_gqa=True
    )


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "lengths"),
    [
        *((*sizes, [64, 65, 300]) for sizes in [(4, 4, 16), (4, 2, 64), (6, 2, 32), (20, 1, 16), (16, 8, 128)]),
        *((6, 2, 32, lengths) for lengths in ([1], [2, 63])),
    ],
)
def test_split_attention_equals_sdpa(dtype, heads, kv_heads, head_dim, lengths):
    rows = len(lengths)
    q_BTHD = random_tensor(rows, 1, heads, head_dim).to(dtype)
    k_RKSD, v_RKSD = (random_tensor(rows + 1, kv_heads, 301, head_dim, seed=s).to(dtype) for s in (1, 2))
    position_B1 = torch.tensor(lengths)[:, None] - 1
    for row, length in enumerate(lengths):  # what lies beyond the used length must not be read
        k_RKSD[row, :, length:] = v_RKSD[row, :, length:] = float("nan")
    expected = expected_attention(q_BTHD, k_RKSD, v_RKSD, position_B1)
    actual = kernel.split_attention(*on_device(q_BTHD, k_RKSD, v_RKSD, position_B1))
    assert actual.dtype == dtype
    assert_near(actual, expected, dtype)


@pytest.mark.parametrize("lengths", [[1, 200], [129, 64]])
def test_split_attention_reads_an_int8_cache(lengths):
    q_BTHD = random_tensor(2, 1, 4, 32)
    (k, k_scale), (v, v_scale) = (quantize_vectors(random_tensor(2, 2, 257, 32, seed=s)) for s in (1, 2))
    position_B1 = torch.tensor(lengths)[:, None] - 1
    expected = expected_attention(q_BTHD, k * k_scale[..., None], v * v_scale[..., None], position_B1)
    assert_near(kernel.split_attention(*on_device(q_BTHD, k, v, position_B1, k_scale, v_scale)), expected)


def test_one_split_needs_no_second_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "_merge_splits", None)
    q_BTHD, position_B1 = random_tensor(2, 1, 6, 32), torch.tensor([[59], [-1]])
    k_RKSD, v_RKSD = (random_tensor(2, 2, 60, 32, seed=s) for s in (1, 2))
    k_RKSD[1, :, 1:] = v_RKSD[1, :, 1:] = torch.nan
    assert_near(
        kernel.split_attention(*on_device(q_BTHD, k_RKSD, v_RKSD, position_B1)),
        expected_attention(q_BTHD, k_RKSD, v_RKSD, position_B1.clamp(min=0)),
    )


def test_splits_that_get_no_position_do_not_count(monkeypatch):
    monkeypatch.setattr(kernel, "num_splits", lambda heads, positions: 7)
    q_BTHD, position_B1 = random_tensor(1, 1, 2, 16), torch.tensor([[2]])
    k_RKSD, v_RKSD = (random_tensor(1, 1, 64, 16, seed=s) for s in (1, 2))
    assert_near(
        kernel.split_attention(*on_device(q_BTHD, k_RKSD, v_RKSD, position_B1)),
        expected_attention(q_BTHD, k_RKSD, v_RKSD, position_B1),
    )


def test_large_scores_do_not_overflow():
    q_BTHD = torch.full((1, 1, 1, 16), 1e3)
    k_RKSD = torch.zeros(1, 1, 200, 16)
    k_RKSD[0, 0, 150] = 1e3
    v_RKSD = torch.arange(200.0).view(1, 1, 200, 1).expand(1, 1, 200, 16).contiguous()
    y = kernel.split_attention(*on_device(q_BTHD, k_RKSD, v_RKSD, torch.tensor([[199]])))
    assert torch.equal(y.cpu(), torch.full((1, 1, 1, 16), 150.0))


@pytest.mark.parametrize(
    ("heads", "positions", "splits"), [(8, 4097, 33), (1, 4097, 64), (8, 100, 2), (8, 64, 1), (1024, 4097, 1)]
)
def test_num_splits_keeps_a_gpu_busy_without_empty_parts(heads, positions, splits):
    assert kernel.num_splits(heads, positions) == splits
