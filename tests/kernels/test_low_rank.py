"""The products of adapters: each row with its own matrices, in both forms."""

import pytest
import torch
from conftest import assert_near, assert_same, random_tensor

from qwen3fast.kernels.low_rank import _sums, low_rank


def written_out(x_BTK, a_SRK, b_SRN, slot_B):
    """Each row for itself, in float64."""
    rows = zip(x_BTK.double(), slot_B.tolist(), strict=True)
    return torch.stack([x_TK @ a_SRK[slot].double().T @ b_SRN[slot].double() for x_TK, slot in rows])


def matrices(slots=4, rank=3, n=24, k=16):
    a_SRK, b_SRN = random_tensor(slots, rank, k, seed=1), random_tensor(slots, rank, n, seed=2)
    a_SRK[0], b_SRN[0] = 0, 0
    return a_SRK, b_SRN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_each_row_has_the_product_of_its_slot(tokens, dtype):
    a_SRK, b_SRN = (t.to(dtype) for t in matrices())
    slot_B, x_BTK = torch.tensor([2, 0, 3, 2, 1]), random_tensor(5, tokens, 16).to(dtype)
    expected = written_out(x_BTK, a_SRK, b_SRN, slot_B)
    forms = [low_rank] if tokens > 1 else [low_rank, _sums]
    for form in forms:
        y_BTN = form(x_BTK, a_SRK, b_SRN, slot_B)
        assert y_BTN.dtype == dtype and y_BTN.shape == (5, tokens, 24)
        assert_near(y_BTN, expected, dtype)
        assert_same(y_BTN[1], torch.zeros_like(y_BTN[1]))
    assert not torch.equal(low_rank(x_BTK, a_SRK, b_SRN, slot_B.flip(0)), low_rank(x_BTK, a_SRK, b_SRN, slot_B))
