"""The kernels of the fused decode step, each against its plain form."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import random_tensor
from cuda_static.kernel_checks import (
    EPS,
    TOLERANCES,
    any_order,  # noqa: F401  a fixture
    assert_near,
    attention_case,
    make_weight,
    norm_weight,
)
from cuda_static.program_order import watch_programs
from kernel_device import DEVICE

from qwen3fast.kernels.cuda.decode_step import attention, linear, tail, weights
from qwen3fast.kernels.cuda.decode_step.weights import Weight, tile_shape
from qwen3fast.quantization.formats import FORMATS, quantize

pytestmark = pytest.mark.triton

KINDS = ("plain", *FORMATS, "uint4 with zero points")


def nan(*shape, dtype=torch.float32):
    """Memory in which everything that a kernel leaves out shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


@triton.jit
def planted_kernel(x, y, IS_SHARED: tl.constexpr):
    """Program i: adds up what programs before it wrote, if they did; all write to one place if IS_SHARED."""
    i = tl.program_id(0)
    tl.store(y + (0 if IS_SHARED else i), tl.load(x) + i)
    tl.store(x + i, i)


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_order_and_conflicts_of_programs_are_seen(monkeypatch):
    x, y = torch.zeros(6), torch.zeros(6)
    conflicts = watch_programs(monkeypatch)
    planted_kernel[(6,)](x, y, False)
    assert conflicts == []
    planted_kernel[(6,)](x, y, True)
    assert len(conflicts) == 5
    assert y[0] != 5  # the last program's number, had they run in order


@triton.jit
def outside_kernel(x, y, SIZE: tl.constexpr):
    """Reads beyond x and writes beyond y where SIZE is larger than they are."""
    tl.store(y + tl.arange(0, SIZE), tl.load(x + tl.arange(0, SIZE)))


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_accesses_outside_of_arguments_are_seen(watched_memory):
    x, y = torch.arange(16.0), torch.zeros(16)
    outside_kernel[(1,)](x[:8], y[:8], 8)
    assert watched_memory == []
    outside_kernel[(1,)](x[:4], y, 8)
    outside_kernel[(1,)](x, y[8:12], 8)
    assert watched_memory == [f"outside_kernel {what} outside of its arguments" for what in ("reads", "writes")]
    watched_memory.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "N", "K"), [(1, 16, 32), (3, 48, 96), (8, 32, 64)])
def test_norm_linear_equals_its_plain_form(kind, dtype, rows, N, K):
    x, norm = random_tensor(rows, K).to(dtype), norm_weight(K, dtype)
    weight, plain = make_weight(kind, N, K, dtype)
    y = nan(rows, N, dtype=dtype)
    linear.norm_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, y)
    assert_near(y, linear.plain_norm_linear(x, norm, EPS, plain), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "N", "K"), [(1, 32, 64), (3, 16, 96)])
def test_norm_gated_linear_equals_its_plain_form(kind, rows, N, K):
    x, norm = random_tensor(rows, K), norm_weight(K, torch.float32)
    weight, plain = make_weight(kind, 2 * N, K, torch.float32)
    y = nan(rows, N)
    linear.norm_gated_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, y)
    assert_near(y, linear.plain_norm_gated_linear(x, norm, EPS, plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.usefixtures("any_order")
def test_linear_add_equals_its_plain_form(kind, rows):
    x, residual = random_tensor(rows, 96), random_tensor(rows, 48, seed=3)
    weight, plain = make_weight(kind, 48, 96, torch.float32)
    y = residual.to(DEVICE, copy=True)
    linear.linear_add(x.to(DEVICE), weight, y)
    assert_near(y, linear.plain_linear_add(x, plain, residual))


@pytest.mark.parametrize("rows", [1, 5])
def test_scales_of_6_bits_are_read(rows):
    weight, plain = make_weight("uint4 of Q4_K", 64, 512, torch.float32)
    x, y, norm = random_tensor(rows, 512), nan(rows, 32), norm_weight(512, torch.float32)
    linear.norm_gated_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, y)
    assert_near(y, linear.plain_norm_gated_linear(x, norm, EPS, plain))
    token, row = torch.tensor([47, 0, 17]), nan(3, 512)
    tail.embed(token.to(DEVICE), weight, row)
    assert_near(row, tail.plain_embed(token, plain, torch.float32))


@pytest.mark.parametrize("rows", [1, 3])
def test_whole_numbers_in_bfloat16_are_multiplied_exactly(rows):
    """The interpreter truncates to bfloat16 where a GPU rounds; numbers that bfloat16 holds show all else."""
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-2, 3, (n, 64), generator=rng).bfloat16().to(DEVICE) for n in (rows, 32))
    y = torch.randint(-9, 9, (rows, 32), generator=rng).bfloat16().to(DEVICE)
    expected = y.float() + x.float() @ weight.float().T
    assert expected.abs().max() <= 256
    linear.linear_add(x, Weight.of(weight, None, False), y)
    assert torch.equal(y.float(), expected)


def test_embeddings_in_bfloat16_are_copied_exactly():
    weight, token = random_tensor(9, 40).bfloat16().to(DEVICE), torch.tensor([8, 0, 3], device=DEVICE)
    x = nan(3, 40, dtype=torch.bfloat16)
    tail.embed(token, Weight.of(weight, None, False), x)
    assert torch.equal(x, weight[token])


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_need_several_tiles_are_all_used(kind, monkeypatch):
    """As in large models; here with small tiles. The last tile is not whole."""
    monkeypatch.setattr(weights, "TILE", 2048)  # in float32 half of it
    K = 160
    assert tile_shape(32, K, 0, torch.float32) == (8, 128)
    x, norm = random_tensor(2, K), norm_weight(K, torch.float32)
    weight, plain = make_weight(kind, 32, K, torch.float32)
    y, gated = nan(2, 32), nan(2, 16)
    linear.norm_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, y)
    linear.norm_gated_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, gated)
    assert_near(y, linear.plain_norm_linear(x, norm, EPS, plain))
    assert_near(gated, linear.plain_norm_gated_linear(x, norm, EPS, plain))


def test_odd_sizes_of_plain_weights_are_served():
    x, norm = random_tensor(2, 37), norm_weight(37, torch.float32)
    weight, plain = make_weight("plain", 13, 37, torch.float32)
    y = nan(2, 13)
    linear.norm_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, y)
    assert_near(y, linear.plain_norm_linear(x, norm, EPS, plain))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind):
    """Bit for bit, whatever their numbers are; without a norm, on a GPU, also however many they are."""
    x, norm = random_tensor(3, 96), norm_weight(96, torch.float32)
    weight, _ = make_weight(kind, 32, 96, torch.float32)
    y, other = nan(3, 32), nan(3, 32)
    linear.norm_linear(x.to(DEVICE), norm.to(DEVICE), EPS, weight, y)
    linear.norm_linear(torch.stack([x[2], 100 * x[0], x[1]]).to(DEVICE), norm.to(DEVICE), EPS, weight, other)
    assert torch.equal(y[1], other[2])
    if DEVICE == "cuda":  # NumPy adds up the products of one row otherwise
        y, alone = y.zero_(), torch.zeros(1, 32, device=DEVICE)
        linear.linear_add(x.to(DEVICE), weight, y)
        linear.linear_add(x[1:2].to(DEVICE), weight, alone)
        assert torch.equal(y[1:2], alone)


def test_every_float8_number_is_read_exactly():
    byte = torch.arange(256, dtype=torch.uint8)
    numbers = byte[(byte & 127) != 127].view(torch.float8_e4m3fn).float()
    weight_NK = torch.zeros(256, 32)
    weight_NK[: len(numbers), 0] = numbers
    weight_NK[:, 1] = 448  # makes each row's scale 1
    packed = quantize(weight_NK, FORMATS["fp8"])
    y = torch.zeros(1, 256, device=DEVICE)
    linear.linear_add(torch.eye(1, 32, device=DEVICE), Weight.of(*(t.to(DEVICE) for t in packed), True), y)
    assert torch.equal(y[0, : len(numbers)].cpu(), numbers)


# ------------------------------------------------------------------------------------------------------- attention


def run_attend(arguments, heads):
    """The output, and the cache with its scales afterwards."""
    given = [t.to(DEVICE, copy=True) if isinstance(t, torch.Tensor) else t for t in arguments]
    B, D, (_, K, S, _) = len(given[0]), len(given[1]), given[7].shape
    splits = attention.Splits.allocate([B], heads, K, S, D, torch.device(DEVICE))[B]
    for t in splits:
        t.fill_(torch.nan)
    y = nan(B, heads * D, dtype=given[0].dtype)
    attention.attend(*given, splits, y)
    return y, given[7:]


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "allocated", "positions"),
    [
        (torch.float32, 4, 2, 64, 60, [5, 59, -1]),
        (torch.float32, 3, 3, 16, 201, [0, 63, -1, 200]),
        (torch.float16, 5, 1, 128, 130, [64, 100]),
        (torch.float16, 2, 1, 16, 60, [0]),
    ],
)
@pytest.mark.usefixtures("any_order")
def test_attend_equals_its_plain_form(dtype, heads, kv_heads, head_dim, allocated, positions, is_quantized):
    arguments = attention_case(dtype, heads, kv_heads, head_dim, positions, allocated, is_quantized)
    y, written = run_attend(arguments, heads)
    before = [t if t is None else t.clone() for t in arguments[7:]]
    expected = attention.plain_attend(*arguments)
    assert_near(y, expected, dtype)
    for new, plain, old in zip(written, arguments[7:], before, strict=True):
        if new is None:
            continue
        near = 1 if new.dtype == torch.int8 else 1e-3  # a half may go either way
        torch.testing.assert_close(new.cpu().float(), plain.float(), rtol=0, atol=near, equal_nan=True)
        for b, place in enumerate(positions):  # nothing but the row's own position has changed
            new_b, old_b = new[b].cpu(), old[b]
            if place >= 0:
                new_b[:, place], old_b[:, place] = 0, 0
            assert torch.equal(new_b.nan_to_num(), old_b.nan_to_num())


def test_large_scores_do_not_overflow():
    arguments = attention_case(torch.float32, 1, 1, 16, [199], 200, False)
    arguments[7].zero_()
    arguments[8].zero_()
    arguments[7][0, 0, 150], arguments[8][0, 0, 150] = 1e4 * torch.sign(arguments[7].new_ones(16)), 7.0
    arguments[1].fill_(1e3)
    arguments[0][0, :16] = 1.0
    arguments[4].fill_(1.0)
    arguments[5].zero_()
    arguments[0][0, 16:32] = -1.0  # the row's own key points away
    y, _ = run_attend(arguments, 1)
    assert torch.equal(y.cpu(), torch.full((1, 16), 7.0))


def test_nan_in_a_new_key_is_not_lost():
    for is_quantized in (False, True):
        arguments = attention_case(torch.float32, 1, 1, 16, [3], 60, is_quantized)
        arguments[0][0, 20] = torch.nan
        assert run_attend(arguments, 1)[0].isnan().all()


# ------------------------------------------------------------------------------------------------------------ tail


@pytest.mark.parametrize("kind", KINDS)
def test_embed_equals_its_plain_form(kind):
    weight, plain = make_weight(kind, 48, 64, torch.float32)
    token, x = torch.tensor([47, 0, 17]), nan(3, 64)
    tail.embed(token.to(DEVICE), weight, x)
    assert_near(x, tail.plain_embed(token, plain, torch.float32))


def choose(best, vocab_rows, advance=None):
    """`tail.choose` on a fresh state: input, output, position, step."""
    state = [torch.full((vocab_rows,), number, device=DEVICE) for number in (50, 60, 70, 80)]
    advance = torch.ones(vocab_rows, dtype=torch.int64) if advance is None else advance
    tail.choose(best, advance.to(DEVICE), *state)
    return [t.tolist() for t in state]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.usefixtures("any_order")
def test_vocabulary_and_choice_equal_their_plain_forms(kind, rows):
    x, norm = random_tensor(rows, 32), norm_weight(32, torch.float32)
    weight, plain = make_weight(kind, 176, 32, torch.float32)  # the last program's part is not whole
    best, logits = tail.Best.allocate(rows, 176, torch.device(DEVICE)), nan(rows, 176)
    tail.vocabulary(x.to(DEVICE), norm.to(DEVICE), EPS, weight, best, logits)
    expected = tail.plain_vocabulary(x, norm, EPS, plain)
    assert_near(logits, expected)
    advance = torch.arange(rows)
    tokens = tail.plain_choose(logits).tolist()
    moved = [[n + a for a in range(rows)] for n in (70, 80)]
    assert choose(best, rows, advance) == [tokens, tokens, *moved]


def test_choice_takes_the_first_of_equal_logits_and_refuses_invalid_ones():
    logits_RC = torch.tensor(
        [[1.0, 5.0, 5.0], [-torch.inf] * 3, [2.0, torch.inf, 1.0], [-1.0, -torch.inf, -2.0], [0.0, 0.0, 0.0]]
    )
    best = tail.Best(logits_RC.to(DEVICE), torch.tensor([[7, 80, 130]] * 5, dtype=torch.int32, device=DEVICE))
    fed, chosen, _, _ = choose(best, 5)
    assert chosen == [80, -1, -1, 7, 7] and fed == [80, 0, 0, 7, 7]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_invalid_logit_anywhere_is_noticed(bad):
    x, norm = torch.ones(1, 32), torch.ones(32)
    weight = random_tensor(100, 32)
    weight[70] = bad
    best = tail.Best.allocate(1, 100, torch.device(DEVICE))
    tail.vocabulary(x.to(DEVICE), norm.to(DEVICE), EPS, Weight.of(weight.to(DEVICE), None, False), best)
    assert choose(best, 1)[1] == [-1]
