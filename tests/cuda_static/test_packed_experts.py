"""The Triton kernel of chosen experts against products with the dequantized weights."""

import pytest
import torch
from conftest import random_tensor
from cuda_static.kernel_checks import TOLERANCES, any_order, assert_near, empty_is_nan  # noqa: F401  fixtures
from kernel_device import DEVICE

from qwen3fast.kernels import cuda
from qwen3fast.kernels.cuda import packed_experts as kernel
from qwen3fast.quantization.formats import FORMATS, quantize
from qwen3fast.quantization.uint4 import Layout

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("any_order", "empty_is_nan")]
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
    y_PN = product(x_PK, packed, expert_P, num_experts, format)
    weight_XNK = format.dequantize(packed).view(num_experts, out_features, in_features)
    assert_near(y_PN, torch.einsum("pk,pnk->pn", x_PK.float(), weight_XNK[expert_P]), dtype)


def test_scales_of_6_bits_are_read_for_each_expert():
    packed, expert_P = quantize(random_tensor(3 * 32, 512), SHORT), torch.tensor([2, 0])
    x_PK, weight_XNK = random_tensor(2, 512, seed=1), SHORT.dequantize(packed).view(3, 32, 512)
    y_PN = product(x_PK, packed, expert_P, 3, SHORT)
    assert_near(y_PN, torch.einsum("pk,pnk->pn", x_PK, weight_XNK[expert_P]))


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


@pytest.mark.parametrize("blocks", [16, 96])
def test_one_compiled_form_serves_any_number_of_rows(blocks):
    """However many parts the channels are split into; torch.compile refuses a form that serves some of the rows."""

    def run(x_NK, expert_NC, packed, scale):
        x_PK = x_NK[:, None].expand(-1, expert_NC.shape[1], -1).flatten(0, 1)
        return torch.ops.qwen3fast.packed_experts(x_PK, packed, scale, expert_NC.flatten(), 2, False)

    assert cuda.load()
    x_NK, expert_NC = torch.zeros(3, 1024), torch.zeros(3, 8, dtype=torch.int64)
    for tensor in (x_NK, expert_NC):
        torch._dynamo.mark_dynamic(tensor, 0, min=2, max=64)
    packed = FORMATS["int8"].empty(2 * 16 * blocks, 1024)
    graphs = []
    compiled = torch.compile(run, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or (lambda *_: [x_NK]))
    compiled(x_NK, expert_NC, *packed)
    assert len(graphs) == 1
