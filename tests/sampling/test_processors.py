"""Processors and log-probabilities against transformers and plain loops, and in neutral rows bit for bit."""

import math

import pytest
import torch
from conftest import assert_near, assert_same, random_ids, random_tensor
from cuda_static.capture_rules import capture_faults
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import RepetitionPenaltyLogitsProcessor

from qwen3fast.engine.compile import StepCompiler
from qwen3fast.sampling.processors import (
    ProcessorRows,
    count_token,
    log_probabilities,
    num_words,
    process_logits,
)
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, sample

CPU = torch.device("cpu")


def mask_of(ids, size):
    """The bitmask that allows these tokens alone, (W,) int32."""
    words = [sum(1 << v % 32 for v in set(ids) if v // 32 == w) for w in range(num_words(size))]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)  # keeps the lower 32 bits


def random_rows(count, size, seed=0):
    """Rows with every parameter at work; a quarter of the tokens biased, a few of them forbidden."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=rng)

    bias_BV = uniform(-5, 5, count, size) * (uniform(0, 1, count, size) < 0.25)
    return ProcessorRows(
        uniform(0.5, 2, count),
        uniform(-2, 2, count),
        uniform(-2, 2, count),
        uniform(0, 1, count, size) < 0.3,
        (uniform(-3, 4, count, size)).clamp(min=0).to(torch.int32),
        torch.where(uniform(0, 1, count, size) < 0.1, -math.inf, bias_BV),
        torch.stack([mask_of((uniform(0, 1, size) < 0.8).nonzero()[:, 0].tolist(), size) for _ in range(count)]),
    )


def in_float64(logits_BV, rows):
    """`process_logits` as a plain loop over rows and tokens."""
    result_BV = logits_BV.double()
    for b in range(result_BV.shape[0]):
        penalty = rows.repetition_penalty_B[b].item()
        for v in range(result_BV.shape[1]):
            x, times = result_BV[b, v].item(), rows.count_BV[b, v].item()
            if times or rows.in_prompt_BV[b, v]:
                x = x * penalty if x < 0 else x / penalty
            if times:
                x -= rows.presence_penalty_B[b].item() + rows.frequency_penalty_B[b].item() * times
            x += rows.bias_BV[b, v].item()
            if not rows.allowed_BW[b, v // 32].item() >> v % 32 & 1:
                x = -math.inf
            result_BV[b, v] = x
    return result_BV


def assert_processed(actual_BV, logits_BV, rows):
    """As the plain loop, up to rounding in float32."""
    torch.testing.assert_close(actual_BV.double(), in_float64(logits_BV, rows), rtol=1e-6, atol=1e-5)


def bits(x):
    """Return the bits of float32: -0 differs from 0, and NaN equals itself."""
    return x.view(torch.int32)


def odd_logits(count, size):
    """Random logits with everything in them that arithmetic could change."""
    logits_BV = random_tensor(count, size) * 10
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-38, 3e38, -3e38, 1e-45])
    logits_BV[:, :: size // len(odd)][:, : len(odd)] = odd
    return logits_BV


def seen_but_neutral(count, size):
    """Rows with a history and neutral parameters."""
    rows = ProcessorRows.neutral(count, size, CPU)
    rows.in_prompt_BV[:, ::2] = True
    rows.count_BV[:, ::3] = 7
    return rows


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.05, 1.3, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits_BV = random_tensor(3, 101) * 5
    prompt_BT, reply_BT = random_ids(3, 20, vocab_size=101), random_ids(3, 15, vocab_size=101, seed=1)
    rows = ProcessorRows.neutral(3, 101, CPU)
    rows.repetition_penalty_B.fill_(penalty)
    rows.in_prompt_BV.scatter_(1, prompt_BT, True)
    for t in range(reply_BT.shape[1]):
        count_token(rows.count_BV, reply_BT[:, t], torch.ones(3, dtype=torch.int64))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.cat([prompt_BT, reply_BT], dim=1), logits_BV)
    assert_same(process_logits(logits_BV, rows), expected)


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.3), (1.5, -0.7), (-2.0, 2.0)])
def test_presence_and_frequency_penalties_count_the_reply_alone(presence, frequency):
    logits_BV = random_tensor(2, 50)
    reply_BT = random_ids(2, 60, vocab_size=50)
    rows = ProcessorRows.neutral(2, 50, CPU)
    rows.in_prompt_BV.fill_(True)
    rows.presence_penalty_B.fill_(presence)
    rows.frequency_penalty_B.fill_(frequency)
    for t in range(reply_BT.shape[1]):
        count_token(rows.count_BV, reply_BT[:, t], torch.ones(2, dtype=torch.int64))
    expected_BV = logits_BV.double()
    for b, reply in enumerate(reply_BT.tolist()):
        for token in set(reply):
            expected_BV[b, token] -= presence + frequency * reply.count(token)
    assert_near(process_logits(logits_BV, rows), expected_BV)


def test_bias_is_added_and_forbids():
    rows = ProcessorRows.neutral(2, 40, CPU)
    rows.bias_BV[0, 3], rows.bias_BV[1, 5] = 2.5, -math.inf
    logits_BV = random_tensor(2, 40)
    expected_BV = logits_BV.clone()
    expected_BV[0, 3] += 2.5
    expected_BV[1, 5] = -math.inf
    assert_same(process_logits(logits_BV, rows), expected_BV)


@given(size=st.integers(1, 200), seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_mask_keeps_the_allowed_tokens_alone(size, seed, share):
    is_allowed_V = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share
    ids = is_allowed_V.nonzero()[:, 0].tolist()
    rows = ProcessorRows.neutral(1, size, CPU)._replace(allowed_BW=mask_of(ids, size)[None])
    logits_1V = random_tensor(1, size, seed=seed)
    assert_same(process_logits(logits_1V, rows), logits_1V.masked_fill(~is_allowed_V, -math.inf))


@given(count=st.integers(1, 4), size=st.integers(1, 130), seed=st.integers(0, 2**31), scale=st.floats(0.1, 30))
def test_all_processors_together_follow_the_plain_loop(count, size, seed, scale):
    logits_BV = random_tensor(count, size, seed=seed) * scale
    rows = random_rows(count, size, seed)
    assert_processed(process_logits(logits_BV, rows), logits_BV, rows)


@pytest.mark.parametrize("size", [64, 97, 1000])
def test_neutral_rows_keep_every_bit_beside_any_other_row(size):
    logits_BV = odd_logits(4, size)
    neutral, other = seen_but_neutral(4, size), random_rows(4, size)
    is_neutral_B = torch.tensor([True, False, True, False])
    rows = ProcessorRows(
        *(torch.where(is_neutral_B.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(neutral, other, strict=True))
    )
    assert_same(bits(process_logits(logits_BV, neutral)), bits(logits_BV))
    assert_same(bits(process_logits(logits_BV, rows))[is_neutral_B], bits(logits_BV)[is_neutral_B])


def test_bfloat16_logits_are_processed_in_float32():
    logits_BV = (random_tensor(3, 70) * 5).bfloat16()
    rows = random_rows(3, 70)
    assert process_logits(logits_BV, rows).dtype is torch.float32
    assert_same(process_logits(logits_BV, rows), process_logits(logits_BV.float(), rows))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_invalid_logits_are_noticed_by_the_sampler_even_at_forbidden_tokens(bad):
    logits_BV = random_tensor(3, 70)
    logits_BV[1, 40] = bad
    rows = random_rows(3, 70)
    rows.bias_BV[:, 40] = -math.inf
    rows.allowed_BW[:] = mask_of([1, 2, 41], 70)
    processed_BV = process_logits(logits_BV, rows._replace(bias_BV=torch.zeros(3, 70)))
    for x_BV in (processed_BV, process_logits(logits_BV, rows)):
        token_B = sample(x_BV, SamplerRows(*[torch.zeros(3)] * 6), SamplerKind.GREEDY)
        assert token_B[1] == -1 and {*token_B[[0, 2]].tolist()} <= {1, 2, 41}


def test_compiled_processors_keep_neutral_bits_and_follow_the_plain_loop():
    part = StepCompiler(True, CPU).part(lambda _, x_BV, *rows: process_logits(x_BV, ProcessorRows(*rows)))
    logits_BV = odd_logits(3, 171)
    assert_same(bits(part(None, logits_BV, *seen_but_neutral(3, 171))), bits(logits_BV))
    logits_BV, rows = random_tensor(3, 171) * 5, random_rows(3, 171)
    assert_processed(part(None, logits_BV, *rows), logits_BV, rows)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_processors_can_be_recorded_without_values(mode):
    logits_BV, rows = random_tensor(2, 70), random_rows(2, 70)
    graph = make_fx(lambda x_BV, *rows: process_logits(x_BV, ProcessorRows(*rows)), tracing_mode=mode)(logits_BV, *rows)
    other_BV, other_rows = random_tensor(2, 70, seed=1), random_rows(2, 70, seed=1)
    assert_same(graph(other_BV, *other_rows), process_logits(other_BV, other_rows))


def test_processors_can_be_captured_in_a_cuda_graph():
    rows = random_rows(4, 70)
    buffers = {
        **rows._asdict(),
        "logits": random_tensor(4, 70),
        "processed": torch.zeros(4, 70),
        "token": torch.tensor([3, -1, 69, 0]),
        "advance": torch.tensor([1, 1, 1, 0]),
        "chosen": torch.zeros(4),
        "ids": torch.zeros(4, 5, dtype=torch.int64),
        "values": torch.zeros(4, 5),
    }

    def step():
        buffers["processed"].copy_(process_logits(buffers["logits"], rows))
        reported = log_probabilities(buffers["logits"], buffers["token"], 5)
        for name, tensor in zip(("chosen", "ids", "values"), reported, strict=True):
            buffers[name].copy_(tensor)
        count_token(rows.count_BV, buffers["token"], buffers["advance"])

    results = {"processed", "count_BV", "chosen", "ids", "values"}
    assert capture_faults(step, lambda: buffers, results) == []


def test_count_token_counts_rows_that_advance_and_real_tokens():
    count_RV = torch.zeros(5, 9, dtype=torch.int32)
    for _ in range(3):
        count_token(count_RV[:4], torch.tensor([8, 0, -1, 4]), torch.tensor([1, 1, 1, 0]))
    expected_RV = torch.zeros(5, 9, dtype=torch.int32)
    expected_RV[0, 8] = expected_RV[1, 0] = 3
    assert_same(count_RV, expected_RV)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 5, 20])
@pytest.mark.parametrize("vocab_size", [3001, 3008])  # the latter in whole blocks
def test_log_probabilities_are_those_of_log_softmax(dtype, n, vocab_size):
    logits_BV = (random_tensor(4, vocab_size) * 8).to(dtype)
    logits_BV[3, 1::2] = -math.inf
    token_B = torch.tensor([0, 3000, 17, 5])
    chosen_B, ids_BN, values_BN = log_probabilities(logits_BV, token_B, n)
    exact_BV = logits_BV.double().log_softmax(dim=-1)
    assert (chosen_B.dtype, ids_BN.dtype, values_BN.dtype) == (torch.float32, torch.int64, torch.float32)
    assert ids_BN.shape == values_BN.shape == (4, n)
    torch.testing.assert_close(chosen_B.double(), exact_BV.gather(1, token_B[:, None])[:, 0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(values_BN.double(), exact_BV.topk(n).values, rtol=1e-6, atol=1e-5)
    assert_same(ids_BN, logits_BV.sort(descending=True, stable=True).indices[:, :n])  # of equal ones, the first


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_log_probabilities_do_not_overflow(scale):
    logits_BV = random_tensor(2, 100) * scale
    _, ids_B1, values_B1 = log_probabilities(logits_BV, torch.tensor([0, 1]), 1)
    assert_same(ids_B1[:, 0], logits_BV.argmax(-1))
    assert_near(values_B1, logits_BV.double().log_softmax(-1).amax(-1, keepdim=True))


def test_log_probabilities_take_nan_for_the_largest_as_topk_does():
    logits_BV = random_tensor(2, 640)
    logits_BV[0, 100], logits_BV[1] = math.nan, -math.inf
    _, ids_BN, values_BN = log_probabilities(logits_BV, torch.tensor([3, 4]), 3)
    assert ids_BN[0, 0] == 100 and values_BN.isnan().all() and len(set(ids_BN[1].tolist())) == 3


def test_log_probabilities_of_invalid_tokens_are_finite():
    logits_BV = torch.full((2, 40), math.nan)
    logits_BV[1] = -math.inf
    chosen_B, *_ = log_probabilities(logits_BV, torch.tensor([-1, -1]), 3)
    assert chosen_B.isfinite().all()


def test_log_probabilities_of_forbidden_tokens_are_those_of_the_model():
    logits_BV = random_tensor(1, 40)
    rows = ProcessorRows.neutral(1, 40, CPU)._replace(allowed_BW=mask_of([7], 40)[None])
    token_B = sample(process_logits(logits_BV, rows), SamplerRows(*[torch.zeros(1)] * 6), SamplerKind.GREEDY)
    chosen_B, *_ = log_probabilities(logits_BV, token_B, 0)
    assert token_B.item() == 7
    assert_near(chosen_B, logits_BV.double().log_softmax(-1)[:, 7])


@pytest.mark.parametrize(("size", "words"), [(1, 1), (32, 1), (33, 2), (151_936, 4_748)])
def test_num_words_covers_the_vocabulary(size, words):
    assert num_words(size) == words
