"""Products with weights in fp8 on CPUs: every number, both layouts of scales, and what is no number."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_near, assert_same, random_tensor

from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import tiles
from qwen3fast.kernels.cpu.ops import dequantized_linear, pack_scales, quantize_weight
from qwen3fast.kernels.cpu.structures import packed_linear
from qwen3fast.quantization.formats import ALL_FORMATS, FORMATS, quantize
from qwen3fast.quantization.fp8 import pack_fp8

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")

FP8 = FORMATS["fp8"]
LAYOUTS = pytest.mark.parametrize("format", [FP8, FP8.with_blocks()], ids=["rows", "blocks"])
PRODUCTS = {
    "C++": lambda x, weight: torch.ops.qwen3fast.quantized_linear(x, [weight.weight], [weight.scale]),
    "tiles": lambda x, weight: tiles.tile_linear(x, [packed_linear(*weight)]),
    "dequantized": lambda x, weight: dequantized_linear(x, *weight),
}
products = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


@LAYOUTS
@products
def test_every_number_is_exact(format, product):
    """The product with the identity is the weight; scales are powers of two."""
    numbers = [byte for byte in range(256) if byte & 0x7F != 0x7F] + [0, 0]
    byte_NK = torch.stack([torch.tensor(numbers, dtype=torch.uint8).roll(n) for n in range(32)])
    scale = 2.0 ** (torch.arange(format.empty(32, 256).scale.numel()) - 2)
    packed = pack_fp8(byte_NK.view(torch.float8_e4m3fn), scale.view_as(format.empty(32, 256).scale))
    expected = format.dequantize(packed).bfloat16()
    operands = format.operands(packed)
    assert_same(product(torch.eye(256).bfloat16(), operands).T.contiguous(), expected)
    assert_same(torch.ops.qwen3fast.quantized_rows(*operands, torch.arange(32)), expected)


@LAYOUTS
@products
@pytest.mark.parametrize("rows", [*range(1, 10), 16, 17, 40])
@pytest.mark.parametrize(("out_features", "in_features"), [(16, 32), (48, 160), (304, 1024)])
def test_products_equal_those_of_the_dequantized_weight(format, product, rows, out_features, in_features):
    packed = quantize(random_tensor(out_features, in_features), format)
    x = random_tensor(rows, in_features, seed=1).bfloat16()
    expected = F.linear(x.float(), format.dequantize(packed))
    assert_near(product(x, format.operands(packed)), expected, torch.bfloat16)


@LAYOUTS
@products
@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_not_a_number_stays_in_its_row(format, product, byte):
    packed = quantize(random_tensor(32, 160), format)
    packed.weight[1, 3, 4, 2] = byte  # row 20, channel 14
    is_nan_N = product(random_tensor(9, 160).bfloat16(), format.operands(packed)).isnan()
    assert is_nan_N[:, 20].all() and is_nan_N.sum() == 9
    rows = torch.ops.qwen3fast.quantized_rows(*format.operands(packed), torch.arange(32))
    assert rows.isnan().nonzero().tolist() == [[20, 14]]


def test_weights_of_other_formats_may_stand_beside():
    """In one product: int8 and uint4 read x in 8 bits, fp8 as it is."""
    formats = [FORMATS["int8"], FP8, FORMATS["uint4"], FP8.with_blocks()]
    weights = [format.operands(quantize(random_tensor(32, 160, seed=i), format)) for i, format in enumerate(formats)]
    x = random_tensor(5, 160).bfloat16()
    together = torch.ops.qwen3fast.quantized_linear(x, *map(list, zip(*weights, strict=True)))
    assert_same(together, torch.cat([PRODUCTS["C++"](x, weight) for weight in weights], dim=-1))


@pytest.mark.parametrize("scale", [torch.ones(3, 2), torch.ones(32, 2), torch.ones(2, 1), torch.ones(1, 32)], ids=str)
def test_scales_that_do_not_fit_are_refused(scale):
    packed = quantize(random_tensor(32, 160), FP8)
    with pytest.raises(ValueError, match=r"\(N, 1\) or \(N/16, K/128\) for fp8"):
        packed_linear(packed.weight, scale)


@pytest.mark.parametrize("name", ["fp8", "int4", "lossless", "uint4"])
def test_weights_are_not_quantized_to_other_formats_in_cpp(name):
    weight, format = random_tensor(32, 64).bfloat16(), ALL_FORMATS[name]
    packed = format.operands(quantize(weight, format))
    if name == "int4":
        packed = packed._replace(scale=pack_scales(packed.scale))  # in bytes
    with pytest.raises(ValueError, match="int8 and int4 only"):
        quantize_weight(weight, *packed)
