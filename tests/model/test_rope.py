"""RoPE: its tables and rotation against the formula, and the two properties that it exists for."""

import cmath
import math

import pytest
import torch
from conftest import assert_near, assert_same, random_tensor
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.model import apply_rope, rope_tables
from qwen3fast.model.yarn import Yarn

CPU = torch.device("cpu")
D = 16
THETA = 10_000.0
positions = st.integers(0, 400)


def rotate(x_D: torch.Tensor, position: int) -> torch.Tensor:
    """One head vector at one position, through the code under test."""
    cos_SD, sin_SD = rope_tables(x_D.shape[-1], THETA, position + 1, CPU)
    return apply_rope(x_D.view(1, 1, 1, -1), cos_SD[None, position:], sin_SD[None, position:]).flatten()


def reference_rotate(x_D: torch.Tensor, position: int) -> torch.Tensor:
    """Channels i and i + D/2 as a complex number, turned by position * theta^(-2i/D), in float64."""
    values, half = x_D.double().tolist(), x_D.shape[-1] // 2
    turned = [
        complex(values[i], values[i + half]) * cmath.exp(1j * position * THETA ** (-i / half)) for i in range(half)
    ]
    return torch.tensor([z.real for z in turned] + [z.imag for z in turned], dtype=torch.float64)


@pytest.mark.parametrize("position", [0, 1, 2, 17, 400])
def test_rope_rotation_equals_complex_multiplication(position):
    x_D = random_tensor(D)
    assert_near(rotate(x_D, position), reference_rotate(x_D, position))


def test_rope_pairs_channel_i_with_channel_i_plus_half():
    first = torch.zeros(D)
    first[0] = 1.0
    rotated = rotate(first, 1)
    assert rotated.nonzero().flatten().tolist() == [0, D // 2]


def test_rope_at_position_zero_changes_nothing():
    x_D = random_tensor(D)
    assert_same(rotate(x_D, 0), x_D)


@given(position=positions, seed=st.integers(0, 1000))
def test_rope_keeps_norms(position, seed):
    x_D = random_tensor(D, seed=seed)
    assert_near(rotate(x_D, position).norm(), x_D.norm())


@given(query=positions, key=positions, shift=positions, seed=st.integers(0, 1000))
def test_rope_scores_depend_on_the_relative_position_only(query, key, shift, seed):
    q_D, k_D = random_tensor(2, D, seed=seed)
    score = rotate(q_D, query) @ rotate(k_D, key)
    shifted = rotate(q_D, query + shift) @ rotate(k_D, key + shift)
    assert abs(score - shifted).item() < 2e-4 * (q_D.norm() * k_D.norm()).item()


def test_rope_scores_do_depend_on_the_relative_position():
    q_D, k_D = random_tensor(2, D)
    scores = [(rotate(q_D, 5) @ rotate(k_D, key)).item() for key in range(5)]
    assert len({round(score, 3) for score in scores}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_keeps_the_dtype(dtype):
    cos_SD, sin_SD = rope_tables(D, THETA, 3, CPU)
    assert apply_rope(random_tensor(2, 3, 4, D).to(dtype), cos_SD[None], sin_SD[None]).dtype == dtype


def test_rope_rotates_bfloat16_in_float32():
    cos_SD, sin_SD = rope_tables(D, THETA, 7, CPU)
    x_BTND = random_tensor(2, 7, 4, D).bfloat16()
    expected = apply_rope(x_BTND.float(), cos_SD[None], sin_SD[None]).bfloat16()
    assert_same(apply_rope(x_BTND, cos_SD[None], sin_SD[None]), expected)


def test_rope_gives_each_row_of_a_batch_its_own_positions():
    cos_SD, sin_SD = rope_tables(D, THETA, 9, CPU)
    x_BTND = random_tensor(2, 1, 1, D)
    position_BT = torch.tensor([[2], [8]])
    rotated = apply_rope(x_BTND, cos_SD[position_BT], sin_SD[position_BT])
    expected = torch.stack([reference_rotate(x_BTND[b].flatten(), p) for b, p in enumerate((2, 8))])
    assert_near(rotated.view(2, D), expected)


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0, 5_000_000.0])
def test_rope_tables_equal_the_formula(theta):
    cos_SD, sin_SD = rope_tables(8, theta, 5, CPU)
    angles = [[p * theta ** (-2 * (c % 4) / 8) for c in range(8)] for p in range(5)]
    expected = torch.tensor([[[f(a) for a in row] for row in angles] for f in (math.cos, math.sin)])
    torch.testing.assert_close(torch.stack([cos_SD, sin_SD]), expected, rtol=0, atol=1e-6)


def test_rope_tables_stay_exact_at_the_end_of_the_context():
    # float32 holds an angle of 40,959 to half of 1/256; a table made in bfloat16 is off by whole turns.
    last = 40_959
    cos_SD, _ = rope_tables(128, 1e6, last + 1, CPU)
    exponents = torch.arange(0, 128, 2, dtype=torch.float64) / 128
    expected = (last * 1e6**-exponents).cos().repeat(2)
    torch.testing.assert_close(cos_SD[last].double(), expected, rtol=0, atol=5e-3)


def test_rope_tables_are_float32():
    assert {table.dtype for table in rope_tables(D, THETA, 2, CPU)} == {torch.float32}


def test_yarn_keeps_fast_channels_and_slows_slow_ones():
    yarn = Yarn(4.0, 32_768)
    plain = rope_tables(128, 1e6, 2, CPU)[1][1, :64].double().asin()
    scaled = (rope_tables(128, 1e6, 2, CPU, yarn)[1][1, :64].double() / yarn.table_factor).asin()
    ratio = scaled / plain
    low, high = yarn.blend_range(128, 1e6)
    assert (low, high) == (23, 40)
    torch.testing.assert_close(ratio[: low + 1], torch.ones(low + 1).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ratio[high:], torch.full((64 - high,), 0.25).double(), rtol=0, atol=1e-6)
    assert (ratio.diff() <= 1e-6).all()


def test_yarn_multiplies_tables_by_the_factor_of_attention():
    cos_SD, sin_SD = rope_tables(D, THETA, 9, CPU, Yarn(4.0, 64))
    expected = torch.full((9, D), 0.1 * math.log(4) + 1)
    torch.testing.assert_close((cos_SD.square() + sin_SD.square()).sqrt(), expected, rtol=0, atol=1e-6)


def test_yarn_of_factor_one_changes_nothing():
    for plain, scaled in zip(rope_tables(D, THETA, 9, CPU), rope_tables(D, THETA, 9, CPU, Yarn(1.0, 64)), strict=True):
        assert_near(scaled, plain)


def test_attn_factor_multiplies_the_computed_factor_as_in_vllm():
    """Source: vLLM's YaRNScalingRotaryEmbedding: mscale = (0.1 ln(factor) + 1) * attn_factor."""
    attn_factor = 0.8782488562869419  # of DeepSeek-R1-0528-Qwen3-8B
    plain, scaled = Yarn(4.0, 32768), Yarn(4.0, 32768, attn_factor=attn_factor)
    assert scaled.table_factor == pytest.approx((0.1 * math.log(4) + 1) * attn_factor) == pytest.approx(1.0, abs=1e-4)
    tables = [rope_tables(128, 1e6, 50, CPU, yarn) for yarn in (plain, scaled)]
    for before, after in zip(*tables, strict=True):
        torch.testing.assert_close(after, before * attn_factor)
