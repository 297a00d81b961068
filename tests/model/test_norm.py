"""RMSNorm against its formula, written as a loop."""

import pytest
import torch
from conftest import assert_near, assert_same, fill_randomly, random_tensor
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.model import RMSNorm


def random_norm(size: int, eps: float = 1e-6) -> RMSNorm:
    """An RMSNorm whose weight is not all ones."""
    norm = RMSNorm(size, eps)
    fill_randomly(norm)
    return norm


def reference_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps), one vector at a time, in float64."""
    x, weight = x.double(), weight.double()
    rows = [row * weight / (sum(v * v for v in row.tolist()) / len(row) + eps) ** 0.5 for row in x.flatten(0, -2)]
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 16), (2, 3, 4, 16)])
def test_norm_equals_the_formula(shape):
    norm, x = random_norm(shape[-1]), random_tensor(*shape)
    assert_near(norm(x), reference_norm(x, norm.weight, norm.eps))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
def test_norm_adds_eps_inside_the_root(eps):
    norm, x = random_norm(16, eps), 1e-3 * random_tensor(4, 16)
    assert_near(norm(x), reference_norm(x, norm.weight, eps))


def test_norm_of_zero_is_zero():
    assert_same(random_norm(8)(torch.zeros(2, 8)), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_keeps_the_dtype(dtype):
    assert random_norm(8).to(dtype)(random_tensor(2, 8).to(dtype)).dtype == dtype


def test_norm_rounds_before_the_weight_is_applied():
    norm, x = random_norm(64).bfloat16(), random_tensor(8, 64).bfloat16()
    unit = reference_norm(x, torch.ones(64), norm.eps).bfloat16()
    assert_same(norm(x), unit * norm.weight)


def test_norm_statistics_do_not_overflow_in_float16():
    norm = random_norm(8).half()
    assert_near(norm(torch.full((1, 8), 3e4).half()), norm.weight[None], torch.bfloat16)


@given(scale=st.floats(0.1, 1e4), seed=st.integers(0, 1000))
def test_norm_does_not_depend_on_the_length_of_its_input(scale, seed):
    norm, x = random_norm(16, eps=1e-12), random_tensor(3, 16, seed=seed)
    assert_near(norm(x * scale), norm(x))
