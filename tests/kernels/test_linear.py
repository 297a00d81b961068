"""The two forms of a linear layer compute the same product."""

import pytest
import torch
from conftest import assert_near, random_tensor

from qwen3fast.kernels.linear import Linear, linear, matvec_as_reduction


def reference_linear(x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """Each output as one dot product, in float64."""
    rows = [[(w.double() @ v.double()).item() for w in weight_NK] for v in x.reshape(-1, x.shape[-1])]
    y = torch.tensor(rows, dtype=torch.float64).view(*x.shape[:-1], -1)
    return y if bias_N is None else y + bias_N.double()


@pytest.mark.parametrize("form", [linear, matvec_as_reduction])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 1, 7), (2, 3, 7)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_form_equals_dot_products(form, shape, with_bias, dtype):
    x, weight_NK = random_tensor(*shape).to(dtype), random_tensor(5, 7, seed=1).to(dtype)
    bias_N = random_tensor(5, seed=2).to(dtype) if with_bias else None
    y = form(x, weight_NK, bias_N)
    assert y.dtype == dtype
    assert_near(y, reference_linear(x, weight_NK, bias_N), dtype)


def test_linear_module_uses_its_bias():
    module = Linear(7, 5, bias=True).requires_grad_(False)
    x = random_tensor(2, 7)
    assert_near(module(x), reference_linear(x, module.weight, module.bias))
