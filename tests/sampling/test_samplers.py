"""The samplers against exact probabilities, against transformers' processors, and at their extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qwen3fast.sampling.samplers import WINDOW, SamplerKind, SamplerRows, gumbel_noise, kind_for, sample

SAMPLED = [SamplerKind.WINDOW, SamplerKind.FULL]


def rows(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, first_step=0):
    """`count` rows with equal parameters at consecutive steps."""

    def full(value, dtype):
        return torch.full((count,), value, dtype=dtype)

    return SamplerRows(
        full(temperature, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        full(seed, torch.int64),
        torch.arange(first_step, first_step + count),
    )


def draw(logits_V, kind, draws, **parameters):
    """Tokens of `draws` rows of equal logits, some rows at a time: their histograms fit into a CPU's cache."""
    parts = zip(*(column.split(200) for column in rows(draws, **parameters)), strict=True)
    return torch.cat([sample(logits_V.expand(len(part[0]), -1), SamplerRows(*part), kind) for part in parts])


def exact_probabilities(logits_V, temperature, top_k, top_p, min_p):
    """Apply transformers' processors, in its order."""
    score_1V = (logits_V / temperature)[None]
    if top_k:
        score_1V = TopKLogitsWarper(top_k)(None, score_1V)
    if top_p < 1:
        score_1V = TopPLogitsWarper(top_p)(None, score_1V)
    if min_p > 0:
        score_1V = MinPLogitsWarper(min_p)(None, score_1V)
    return score_1V.softmax(dim=-1)[0]


def chi_square_limit(degrees):
    """A bound that a right sampler passes with probability 1 - 1e-6 (Wilson and Hilferty's approximation)."""
    z = 4.75
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3 if degrees else 1e-9


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 20, 1.0, 0.0),
        (0.6, 20, 0.95, 0.0),
        (1.5, 64, 0.7, 0.0),
        (2.0, 40, 0.9, 0.05),
        (3.0, 5, 0.99, 0.0),
    ],
)
def test_sample_follows_the_exact_distribution(temperature, top_k, top_p, min_p):
    draws = 4_000
    logits_V = torch.randn(100, generator=torch.Generator().manual_seed(1)) * 2
    expected_V = exact_probabilities(logits_V, temperature, top_k, top_p, min_p)
    tokens = draw(logits_V, SamplerKind.WINDOW, draws, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    observed_V = torch.bincount(tokens, minlength=100)
    kept = expected_V > 0
    assert observed_V[~kept].sum() == 0
    chi_square = ((observed_V - draws * expected_V) ** 2 / (draws * expected_V))[kept].sum()
    assert chi_square <= chi_square_limit(int(kept.sum()) - 1)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.5, 0.1), (80, 0.95, 0.02)])
def test_sample_without_small_top_k_follows_the_exact_distribution(top_k, top_p, min_p):
    draws = 4_000
    logits_V = torch.randn(150, generator=torch.Generator().manual_seed(2)) * 2
    expected_V = exact_probabilities(logits_V, 1.3, top_k, top_p, min_p)
    tokens = draw(logits_V, SamplerKind.FULL, draws, temperature=1.3, top_k=top_k, top_p=top_p, min_p=min_p)
    observed_V = torch.bincount(tokens, minlength=150)
    kept = expected_V > 0
    assert observed_V[~kept].sum() == 0
    chi_square = ((observed_V - draws * expected_V) ** 2 / (draws * expected_V))[kept].sum()
    assert chi_square <= chi_square_limit(int(kept.sum()) - 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 400),
    scale=st.floats(0.01, 30),
    top_k=st.integers(1, WINDOW),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_window_and_full_samplers_agree(seed, size, scale, top_k, top_p, min_p):
    logits_BV = torch.randn(8, size, generator=torch.Generator().manual_seed(seed)) * scale
    parameters = rows(8, 0.8, top_k, top_p, min_p, seed=seed)
    window, full = (sample(logits_BV, parameters, kind) for kind in SAMPLED)
    assert torch.equal(window, full)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(1e-30, 1e30), top_p=st.floats(0.01, 1))
def test_top_k_of_one_is_greedy(seed, temperature, top_p):
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    for kind in SAMPLED:
        tokens = sample(logits_BV, rows(4, temperature, 1, top_p, seed=seed), kind)
        assert torch.equal(tokens, logits_BV.argmax(-1))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_tiny_top_p_is_greedy(seed):
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    for kind in SAMPLED:
        assert torch.equal(sample(logits_BV, rows(4, 1.0, 50, 1e-6, seed=seed), kind), logits_BV.argmax(-1))


@pytest.mark.parametrize("kind", SAMPLED)
def test_tiny_temperature_is_greedy(kind):
    logits_BV = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits_BV, rows(64, 1e-30, 20), kind), logits_BV.argmax(-1))


def test_huge_temperature_is_uniform():
    draws = 2_000
    logits_V = torch.linspace(-5, 5, 20)
    observed_V = torch.bincount(draw(logits_V, SamplerKind.FULL, draws, temperature=1e30), minlength=20)
    assert ((observed_V - draws / 20) ** 2 / (draws / 20)).sum() <= chi_square_limit(19)


def test_top_k_beyond_the_vocabulary_keeps_everything():
    for kind in SAMPLED:
        assert len(set(draw(torch.zeros(30), kind, 1000, top_k=WINDOW).tolist())) == 30


@pytest.mark.parametrize("kind", SAMPLED)
def test_top_k_keeps_tokens_that_tie_with_the_last(kind):
    logits_V = torch.tensor([2.0] + [1.0] * 99)  # top_k=3 ends within 99 equal tokens
    tokens = draw(logits_V, kind, 3000, top_k=3)
    assert len(set(tokens.tolist())) == 100


@pytest.mark.parametrize("kind", SAMPLED)
def test_top_p_keeps_the_token_that_crosses_p(kind):
    logits_V = torch.tensor([0.5, 0.3, 0.2]).log()
    tokens = draw(logits_V, kind, 1000, top_k=3, top_p=0.6)
    assert set(tokens.tolist()) == {0, 1}


def test_greedy_takes_the_first_of_equal_tokens():
    assert sample(torch.tensor([[0.0, 3.0, 3.0]]), rows(1, 0.0), SamplerKind.GREEDY).item() == 1


@pytest.mark.parametrize("kind", list(SamplerKind))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_invalid_logits_give_minus_one_in_their_row_only(kind, bad):
    logits_BV = torch.randn(3, 40)
    logits_BV[1, 7] = bad
    tokens = sample(logits_BV, rows(3, 1.0, 5), kind)
    assert tokens[1] == -1
    assert tokens[0] >= 0 and tokens[2] >= 0


@pytest.mark.parametrize("kind", SAMPLED)
def test_forbidden_tokens_are_never_drawn(kind):
    logits_BV = torch.full((500, 40), -math.inf)
    logits_BV[:, 3] = logits_BV[:, 9] = 0.0
    assert set(sample(logits_BV, rows(500, 1.0, 20), kind).tolist()) == {3, 9}


@pytest.mark.parametrize("kind", SAMPLED)
def test_rows_are_independent(kind):
    logits_BV = torch.randn(6, 500, generator=torch.Generator().manual_seed(3))
    together = rows(6, 1.0, 30, 0.9, seed=11)
    alone = [sample(logits_BV[i : i + 1], SamplerRows(*(t[i : i + 1] for t in together)), kind) for i in range(6)]
    assert torch.equal(sample(logits_BV, together, kind), torch.cat(alone))


def test_mixed_batch_keeps_greedy_rows_greedy():
    logits_BV = torch.randn(2, 50, generator=torch.Generator().manual_seed(4))
    parameters = rows(2, 5.0, 50)._replace(temperature_B=torch.tensor([0.0, 5.0]))
    for step in range(20):
        token_B = sample(logits_BV, parameters._replace(step_B=torch.tensor([step, step])), SamplerKind.WINDOW)
        assert token_B[0] == logits_BV[0].argmax()


def test_noise_differs_between_seeds_steps_and_tokens():
    noise_BV = gumbel_noise(torch.tensor([0, 1, 0, 2**32]), torch.tensor([0, 0, 1, 0]), 1000)
    assert len({tuple(row) for row in noise_BV.tolist()}) == 4
    assert len(set(noise_BV[0].tolist())) > 990


def test_noise_has_the_moments_of_a_gumbel_variable():
    noise = gumbel_noise(torch.arange(20), torch.arange(20), 50_000).double()
    assert abs(noise.mean() - 0.5772157) < 0.005
    assert abs(noise.var() - math.pi**2 / 6) < 0.01


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ([(0.0, 0), (0.0, 20)], SamplerKind.GREEDY),
        ([(0.0, 0), (0.7, 20)], SamplerKind.WINDOW),
        ([(0.7, 0)], SamplerKind.FULL),
        ([(0.7, 20), (0.7, WINDOW + 1)], SamplerKind.FULL),
    ],
)
def test_kind_for_is_the_cheapest_exact_one(params, kind):
    assert kind_for(params) is kind
