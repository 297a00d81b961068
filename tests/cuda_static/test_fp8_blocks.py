"""Kernels over fp8 weights with one scale per 16 rows and 128 channels, each against the dequantized weight."""

import pytest
import torch
import triton
from conftest import random_tensor
from cuda_static.kernel_checks import TOLERANCES, any_order, assert_near, empty_is_nan  # noqa: F401  fixtures
from kernel_device import DEVICE

from qwen3fast.kernels.cuda.decode_step import linear, tail, weights
from qwen3fast.kernels.cuda.decode_step.weights import FP8_BLOCK, Weight
from qwen3fast.kernels.cuda.packed_experts import packed_experts
from qwen3fast.kernels.cuda.packed_matvec import block_words, packed_matvec, share_of
from qwen3fast.quantization.formats import FORMATS
from qwen3fast.quantization.packed import Packed, pack_bytes

pytestmark = pytest.mark.triton
EPS = 1e-6
SHAPES = [(16, 32), (48, 96), (16, 160), (272, 256)]  # blocks that end within 128 channels, or at them


def fp8_blocks(N, K, seed=0):
    """A weight of all finite numbers of e4m3, subnormal ones too, with scales far apart, and what it stands for."""
    rng = torch.Generator().manual_seed(seed)
    byte_NK = torch.randint(256, (N, K), dtype=torch.uint8, generator=rng)
    byte_NK[byte_NK & 127 == 127] = 1  # the smallest number instead of NaN
    scale = 2.0 ** torch.randint(-12, -5, (N // 16, -(-K // 128)), generator=rng) * 1.37
    scale_NK = scale.repeat_interleave(16, 0).repeat_interleave(128, 1)[:, :K]
    plain_NK = byte_NK.view(torch.float8_e4m3fn).float() * scale_NK
    return Packed(pack_bytes(byte_NK), scale), plain_NK


def on_device(packed):
    return [t.to(DEVICE) for t in packed]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("shape", "rows"),  # each number of rows with channels that end within a block, at its end, and in several parts
    [(SHAPES[0], 1), (SHAPES[1], 17), *(((16, 160), m) for m in (1, 17, 40)), *(((272, 256), m) for m in (1, 17, 40)),
     ((16, 2080), 1), ((16, 2080), 40)],
)  # fmt: skip
@pytest.mark.usefixtures("any_order", "empty_is_nan")
def test_packed_matvec_equals_the_dequantized_product(dtype, shape, rows):
    packed, plain_NK = fp8_blocks(*shape)
    x_MK = random_tensor(rows, shape[1], seed=1).to(dtype)
    y_CMN = packed_matvec(x_MK.to(DEVICE), *on_device(packed), True)
    assert_near(y_CMN.sum(0), x_MK.float() @ plain_NK.T, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [*SHAPES, (16, 2080)])
@pytest.mark.usefixtures("any_order", "empty_is_nan")
def test_packed_experts_equal_dequantized_products(dtype, shape):
    N, K = shape
    packed, plain = fp8_blocks(3 * N, K)
    x_PK, expert_P = random_tensor(4, K, seed=1).to(dtype), torch.tensor([2, 0, 2, 1])
    y_PN = packed_experts(x_PK.to(DEVICE), *on_device(packed), expert_P.to(DEVICE), 3, True)
    assert_near(y_PN, torch.einsum("pk,pnk->pn", x_PK.float(), plain.view(3, N, K)[expert_P]), dtype)


@pytest.mark.parametrize(("words", "parts"), [(8, 1), (40, 1), (256, 4), (520, 8), (512, 5), (4096, 64), (1000, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [16, 64])
def test_parts_of_the_channels_are_cut_between_blocks(words, parts, dtype, rows):
    """A tile has one scale, and the parts together are the whole."""
    block = block_words(dtype, rows, FP8_BLOCK)
    share = share_of(words, parts, block)
    assert 32 % block == 0 and share % block == 0
    assert share * parts >= words
    assert share // block == triton.cdiv(triton.cdiv(words, parts), block)  # as many tiles as in parts of any size


@pytest.mark.parametrize("use", [linear.STORE, linear.GATE, linear.ADD])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("N", "K", "rows"), [(16, 32, 1), (48, 96, 5), (16, 160, 1), (16, 160, 5), (272, 256, 5)])
def test_fused_products_equal_their_plain_forms(use, dtype, N, K, rows):
    packed, plain_NK = fp8_blocks(N * (2 if use == linear.GATE else 1), K)
    x, norm, y = random_tensor(rows, K).to(dtype), random_tensor(K, seed=2).to(dtype), random_tensor(rows, N, seed=3)
    weight, written = Weight.of(*on_device(packed), True), y.to(DEVICE, dtype, copy=True)
    assert weight.kind == FP8_BLOCK
    if use == linear.ADD:
        linear.linear_add(x.to(DEVICE), weight, written)
        expected = linear.plain_linear_add(x, plain_NK, y.to(dtype))
    else:
        gated = use == linear.GATE
        run, plain = (linear.norm_linear, linear.plain_norm_linear)
        if gated:
            run, plain = linear.norm_gated_linear, linear.plain_norm_gated_linear
        run(x.to(DEVICE), norm.to(DEVICE), EPS, weight, written)
        expected = plain(x, norm, EPS, plain_NK)
    assert_near(written, expected, dtype)


def test_channels_that_need_several_tiles_are_all_used(monkeypatch):
    """With a gate, the second tile begins in the middle of a block; the last one is not whole."""
    monkeypatch.setattr(weights, "TILE", 2048)
    packed, plain_NK = fp8_blocks(32, 416)
    x, norm = random_tensor(2, 416), 1 + 0.3 * random_tensor(416, seed=2)
    y, gated = (torch.full((2, n), torch.nan, device=DEVICE) for n in (32, 16))
    weight = Weight.of(*on_device(packed), True)
    linear.norm_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, y)
    linear.norm_gated_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, gated)
    assert_near(y, linear.plain_norm_linear(x, norm, EPS, plain_NK))
    assert_near(gated, linear.plain_norm_gated_linear(x, norm, EPS, plain_NK))


@pytest.mark.parametrize(("V", "E"), SHAPES)
def test_embeddings_are_exact(V, E):
    packed, plain_VE = fp8_blocks(V, E)
    token, x = torch.tensor([V - 1, 0, 7]), torch.full((3, E), torch.nan, device=DEVICE)
    tail.embed(token.to(DEVICE), Weight.of(*on_device(packed), True), x)
    assert torch.equal(x.cpu(), plain_VE[token])


@pytest.mark.parametrize(("V", "E"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("any_order")
def test_vocabulary_equals_its_plain_form(V, E, rows):
    packed, plain_VE = fp8_blocks(V, E)
    x, norm = random_tensor(rows, E), random_tensor(E, seed=2)
    best = tail.Best.allocate(rows, V, torch.device(DEVICE))
    logits = torch.full((rows, V), torch.nan, device=DEVICE)
    tail.vocabulary(x.to(DEVICE), norm.to(DEVICE), EPS, Weight.of(*on_device(packed), True), best, logits)
    assert_near(logits, tail.plain_vocabulary(x, norm, EPS, plain_VE))
    chosen = best.token.gather(1, best.logit.argmax(1, keepdim=True)).squeeze(1).long()
    assert torch.equal(chosen.cpu(), tail.plain_choose(logits.cpu()))


def every_product(packed, K):
    """The products of ones with a weight of 32 rows, (32,) each, by every kernel."""
    weight, scale = on_device(packed)
    x, y = torch.ones(1, K, device=DEVICE), torch.zeros(1, 32, device=DEVICE)
    linear.linear_add(x, Weight.of(weight, scale, True), y)
    best, logits = tail.Best.allocate(1, 32, torch.device(DEVICE)), torch.zeros(1, 32, device=DEVICE)
    tail.vocabulary(x, x[0], 0.0, Weight.of(weight, scale, True), best, logits)
    expert = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    chosen = packed_experts(x, weight, scale, expert, 1, True)
    return [y[0], logits[0], packed_matvec(x, weight, scale, True).sum(0)[0], chosen[0]]


def test_every_number_is_read_exactly_subnormal_ones_too():
    byte = torch.arange(256, dtype=torch.uint8)
    byte_NK = torch.zeros(256, 160, dtype=torch.uint8)
    byte_NK[:, 130] = torch.where(byte & 127 == 127, 0, byte)  # in a block that is not whole
    expected = byte_NK.view(torch.float8_e4m3fn).float()[:, 130]
    scale = torch.tensor([[torch.inf, 0.25]]).repeat(16, 1)
    scale[:, 0] = 3.0
    for first in range(0, 256, 32):
        rows = slice(first // 16, first // 16 + 2)
        for y in every_product(Packed(pack_bytes(byte_NK[first : first + 32]), scale[rows]), 160):
            assert torch.equal(y.cpu(), expected[first : first + 32] * 0.25)


@pytest.mark.parametrize("bad", [127, 255])
@pytest.mark.parametrize("scale", [torch.ones(2, 2), torch.ones(32)], ids=["blocks", "rows"])
def test_nan_stays_in_its_row(bad, scale):
    byte_NK = torch.full((32, 160), 0x38, dtype=torch.uint8)  # 1.0
    byte_NK[19, 155] = bad
    byte_NK[20, 33], byte_NK[20, 34] = 126, 254  # the largest numbers
    packed = Packed(pack_bytes(byte_NK), scale)
    expected = torch.full((32,), 160.0)
    expected[19], expected[20] = torch.nan, 158.0
    for y in every_product(packed, 160):
        torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    x = torch.zeros(2, 160, device=DEVICE)
    tail.embed(torch.tensor([19, 20], device=DEVICE), Weight.of(*on_device(packed), True), x)
    plain_NK = byte_NK.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(x.cpu(), plain_NK[19:21], rtol=0, atol=0, equal_nan=True)


def test_a_scale_that_is_nan_stays_in_its_block():
    packed = Packed(pack_bytes(torch.full((32, 160), 0x38, dtype=torch.uint8)), torch.ones(2, 2))
    packed.scale[1, 1] = torch.nan
    for y in every_product(packed, 160):
        assert (y[:16] == 160).all() and y[16:].isnan().all()


def test_dequantizing_is_traced_for_any_number_of_rows():
    """As compiled prefill reads these weights: no graph break, no form per number of tokens."""
    format = FORMATS["fp8"].with_blocks()
    packed, plain_NK = fp8_blocks(48, 160)
    assert torch.equal(format.dequantize(packed), plain_NK)

    def product(x_MK, weight, scale):
        return x_MK @ format.dequantize(Packed(weight, scale)).T

    compiled, x_MK = torch.compile(product, fullgraph=True), random_tensor(9, 160)
    torch._dynamo.mark_dynamic(x_MK, 0)
    assert_near(compiled(x_MK, *packed), x_MK @ plain_NK.T)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_near(compiled(x_MK[:5], *packed), x_MK[:5] @ plain_NK.T)
