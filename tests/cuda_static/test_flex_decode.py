"""Decode attention by FlexAttention, in the plain form that it has without Inductor, against PyTorch's attention."""

import importlib

import pytest
import torch
from conftest import assert_near, random_tensor

from qwen3fast.kernels.cuda.flex_decode import BLOCK, flex_decode
from qwen3fast.model.attention import attend


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("lengths", [[1], [2, BLOCK - 1], [BLOCK, BLOCK + 1, 300]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_decode_equals_sdpa(heads, kv_heads, lengths, dtype):
    rows = len(lengths)
    q_BTHD = random_tensor(rows, 1, heads, 32).to(dtype)
    k_BKLD, v_BKLD = (random_tensor(rows, kv_heads, 301, 32, seed=s).to(dtype) for s in (1, 2))
    position_B1 = torch.tensor(lengths)[:, None] - 1
    mask_BTL = torch.arange(301) <= position_B1[..., None]
    expected = attend(q_BTHD.float(), k_BKLD.float(), v_BKLD.float(), mask_BTL)
    actual = flex_decode(q_BTHD, k_BKLD, v_BKLD, position_B1)
    assert actual.dtype == dtype
    assert_near(actual, expected, dtype)


def test_only_blocks_in_use_are_given_to_the_kernel(monkeypatch):
    seen = {}

    def keep(q, k, v, score, mask, *others):
        seen.update(length=mask[:2], blocks=mask[2], indices=mask[3])
        return (q,)

    module = importlib.import_module("torch._higher_order_ops.flex_attention")
    monkeypatch.setattr(module, "flex_attention", keep)
    position_B1 = torch.tensor([[0], [BLOCK - 1], [BLOCK], [3 * BLOCK]])
    flex_decode(torch.zeros(4, 1, 2, 16), *(torch.zeros(4, 1, 400, 16) for _ in "kv"), position_B1)
    assert seen["length"] == (1, 400) and seen["blocks"].flatten().tolist() == [1, 1, 2, 4]
    assert seen["indices"].tolist() == [[[[0, 1, 2, 3]]]] * 4
