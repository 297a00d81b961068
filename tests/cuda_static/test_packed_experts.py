"""The Triton kernel of chosen experts against products with the dequantized weights."""

import pytest
import torch
from conftest import random_tensor
from cuda_static.kernel_checks import TOLERANCES, assert_near
from kernel_device import DEVICE

from qwen3fast.kernels.cuda import packed_experts as kernel
from qwen3fast.kernels.cuda.packed_matvec import num_parts
from qwen3fast.quantization.formats import FORMATS, quantize
from qwen3fast.quantization.uint4 import Layout

pytestmark = pytest.mark.triton
ZEROS = FORMATS["uint4"].with_layout(lambda _: Layout(32, has_zero=True))  # one of AWQ's layouts
SHORT = FORMATS["uint4"].with_layout(lambda _: Layout(256, is_short=True))  # Q4_K's


def product(x_PK, packed, expert_P, num_experts, format):
    x_PK, weight, scale, expert_P = (t.to(DEVICE) for t in (x_PK, *packed, expert_P))
    return kernel.packed_experts(x_PK, weight, scale, expert_P, num_experts, format.name == "fp8")


@pytest.mark.parametrize("format", [*FORMATS.values(), ZEROS], ids=["int8", "int4", "uint4", "fp8", "uint4, zeros"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 3, 16, 32), (4, 5, 48, 96), (3, 2, 16, 2080)])
def test_packed_experts_equal_dequantized_products(format, dtype, shape):
    rows, num_experts, out_features, in_features = shape
    packed = quantize(random_tensor(num_experts * out_features, in_features), format)
    x_PK = random_tensor(rows, in_features, seed=1).to(dtype)
    expert_P = torch.arange(rows).mul(2) % num_experts
    y_CPN = product(x_PK, packed, expert_P, num_experts, format)
    blocks = out_features // 16
    assert y_CPN.shape == (num_parts(blocks * rows, packed.weight.shape[1]), rows, out_features)
    weight_XNK = format.dequantize(packed).view(num_experts, out_features, in_features)
    assert_near(y_CPN.sum(0), torch.einsum("pk,pnk->pn", x_PK.float(), weight_XNK[expert_P]), dtype)


def test_scales_of_6_bits_are_read_for_each_expert():
    packed, expert_P = quantize(random_tensor(3 * 32, 512), SHORT), torch.tensor([2, 0])
    x_PK, weight_XNK = random_tensor(2, 512, seed=1), SHORT.dequantize(packed).view(3, 32, 512)
    y_CPN = product(x_PK, packed, expert_P, 3, SHORT)
    assert_near(y_CPN.sum(0), torch.einsum("pk,pnk->pn", x_PK, weight_XNK[expert_P]))


@pytest.mark.parametrize("format", [*FORMATS.values(), ZEROS], ids=["int8", "int4", "uint4", "fp8", "uint4, zeros"])
def test_experts_that_are_not_chosen_are_not_read(format):
    packed = quantize(random_tensor(4 * 32, 64), format)
    x_PK, expert_P = random_tensor(2, 64, seed=1), torch.tensor([2, 2])
    expected = product(x_PK, packed, expert_P, 4, format)
    for expert, scale in enumerate(packed.scale.chunk(4)):
        if expert != 2:
            scale.fill_(255 if scale.dtype == torch.uint8 else torch.nan)  # bytes of 255: NaN in float16
    assert torch.equal(product(x_PK, packed, expert_P, 4, format), expected)
    assert product(x_PK, packed, expert_P + 1, 4, format).isnan().all()  # the test can fail
