"""The Triton kernel of quantized products against products with the dequantized weight."""

import pytest
import torch
from conftest import random_tensor
from cuda_static.kernel_checks import TOLERANCES, any_order, assert_near, empty_is_nan  # noqa: F401  fixtures
from kernel_device import DEVICE

from qwen3fast.kernels.cuda import packed_matvec as kernel
from qwen3fast.quantization.formats import FORMATS, quantize
from qwen3fast.quantization.uint4 import Layout

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("any_order", "empty_is_nan")]
ZEROS = FORMATS["uint4"].with_layout(lambda _: Layout(32, has_zero=True))  # one of AWQ's layouts
SHORT = FORMATS["uint4"].with_layout(lambda _: Layout(256, is_short=True))  # Q4_K's


def product(x_MK, packed, format):
    arguments = (x.to(DEVICE) for x in (x_MK, packed.weight, packed.scale))
    return kernel.packed_matvec(*arguments, format.name == "fp8")


@pytest.mark.parametrize("format", [*FORMATS.values(), ZEROS], ids=["int8", "int4", "uint4", "fp8", "uint4, zeros"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 16, 32), (2, 48, 96), (17, 32, 544), (5, 16, 2080)])
def test_packed_matvec_equals_the_dequantized_product(format, dtype, shape):
    rows, out_features, in_features = shape
    packed = quantize(random_tensor(out_features, in_features), format)
    x_MK = random_tensor(rows, in_features, seed=1).to(dtype)
    y_CMN = product(x_MK, packed, format)
    assert y_CMN.shape == (kernel.num_parts(*packed.weight.shape[:2]), rows, out_features)
    assert_near(y_CMN.sum(0), x_MK.float() @ format.dequantize(packed).T, dtype)


@pytest.mark.parametrize("in_features", [256, 768])
def test_scales_of_6_bits_are_read(in_features):
    packed, x_MK = quantize(random_tensor(32, in_features), SHORT), random_tensor(2, in_features, seed=1)
    assert packed.scale.shape == (2, in_features // 256, 256)
    assert_near(product(x_MK, packed, SHORT).sum(0), x_MK @ SHORT.dequantize(packed).T)


def test_fp8_numbers_are_read_exactly():
    """Every finite number of the format, subnormal ones too."""
    byte = torch.arange(256, dtype=torch.uint8)
    numbers = byte[(byte & 127) != 127].view(torch.float8_e4m3fn).float()
    weight_NK = torch.zeros(256, 32)
    weight_NK[: len(numbers), 0] = numbers
    weight_NK[:, 1] = 448  # makes each row's scale 1
    y_CMN = product(torch.eye(1, 32), quantize(weight_NK, FORMATS["fp8"]), FORMATS["fp8"])
    assert torch.equal(y_CMN.sum(0)[0, : len(numbers)].cpu(), numbers)


@pytest.mark.parametrize(
    ("blocks", "words", "parts"), [(64, 256, 4), (64, 512, 5), (9496, 256, 1), (1, 8, 1), (1, 4096, 64)]
)
def test_num_parts_keeps_a_gpu_busy_with_whole_blocks_of_words(blocks, words, parts):
    assert kernel.num_parts(blocks, words) == parts
