"""Samplers, logits processors and log-probabilities in C++ against their plain forms."""

import math
from itertools import product

import pytest
import torch
from conftest import assert_same, random_tensor

from qwen3fast.engine.parts import in_cpp
from qwen3fast.kernels import cpu
from qwen3fast.kernels.cpu import sampler
from qwen3fast.sampling.processors import ProcessorRows, process_logits
from qwen3fast.sampling.samplers import SamplerKind, SamplerRows, sample

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no compiler for the C++ operations on this machine")

TOP_K, TOP_P, MIN_P, TEMPERATURE = (0, 1, 20, 64, 700), (1.0, 0.95, 0.3, 0.0), (0.0, 0.02, 1.0), (1.0, 0.3, 0.0)


@pytest.fixture(params=[1, 2, 3], ids=lambda threads: f"{threads} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rows_of(*columns, seed=0):
    """Sampling parameters of all combinations of temperature, top_k, top_p and min_p."""
    temperature, top_k, top_p, min_p = zip(*product(*columns), strict=True)
    rng = torch.Generator().manual_seed(seed)
    return SamplerRows(
        torch.tensor(temperature),
        torch.tensor(top_k),
        torch.tensor(top_p),
        torch.tensor(min_p),
        torch.randint(-(2**63), 2**63 - 1, (len(top_k),), generator=rng),
        torch.randint(0, 2**40, (len(top_k),), generator=rng),
    )


def run(logits_BV, rows):
    return sampler.sample(logits_BV, rows)


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("vocab_size", [1, 5, 16, 63, 64, 65, 97, 1000, 1024, 4099])
def test_tokens_are_the_sampler_s_for_all_parameters(vocab_size, restored_threads):
    rows = rows_of(TEMPERATURE, TOP_K, TOP_P, MIN_P, seed=vocab_size)
    scale_B = torch.tensor([0.01, 1.0, 8.0])[rows.seed_B % 3]
    logits_BV = scale_B[:, None] * random_tensor(len(rows.top_k_B), vocab_size)
    logits_BV[::2] = logits_BV[::2].bfloat16().float()  # numbers that tie
    logits_BV[::5, 1 : vocab_size // 2] = -math.inf
    expected_B, greedy_B = (sample(logits_BV, rows, kind) for kind in (SamplerKind.FULL, SamplerKind.GREEDY))
    assert vocab_size < 1000 or len(set(expected_B.tolist())) > 20
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert_same(run(logits_BV, rows), expected_B)
        assert_same(run(logits_BV, None), greedy_B)


def test_tokens_of_a_real_vocabulary_are_the_sampler_s(restored_threads):
    rows = rows_of((1.0, 0.6), (0, 20), (1.0, 0.95), (0.0, 0.05))
    logits_BV = 2.5 * random_tensor(len(rows.top_k_B), 151936)
    few = rows._replace(top_k_B=torch.full_like(rows.top_k_B, 20))
    expected_B, of_few_B = sample(logits_BV, rows, SamplerKind.FULL), sample(logits_BV, few, SamplerKind.WINDOW)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert_same(run(logits_BV, rows), expected_B)
        assert_same(run(logits_BV, few), of_few_B)


@pytest.mark.parametrize(
    "logits_V",
    [
        torch.zeros(500),  # all tie, for every threshold
        torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 1.0]),
        torch.tensor([0.0, -0.0, 0.0, -0.0]),
        torch.tensor([-math.inf] * 70 + [1.0]),
        torch.tensor([-1e30, 2.0, -math.inf, 2.0]),
        torch.full((80,), -math.inf),
        torch.tensor([1.0] * 66 + [math.nan]),
        torch.tensor([math.nan] + [math.inf] * 66),
        torch.tensor([1.0, math.inf]),
        torch.linspace(0, -40, 3000),  # weights down to none
    ],
)
def test_ties_and_extremes_are_treated_as_by_the_sampler(logits_V, threads):
    rows = rows_of((1.0, 1e-3, 1e-38, 50.0, 0.0), (0, 1, 3, 80), (1.0, 0.999999, 0.5, 0.2), (0.0, 0.5))
    logits_BV = logits_V.expand(len(rows.top_k_B), -1)
    assert_same(run(logits_BV, rows), sample(logits_BV, rows, SamplerKind.FULL))


def test_a_row_s_token_does_not_depend_on_other_rows_and_threads():
    rows = rows_of(TEMPERATURE, TOP_K, TOP_P, MIN_P)
    logits_BV = 3 * random_tensor(len(rows.top_k_B), 3000)
    together = run(logits_BV, rows)
    for row in range(0, len(together), 7):
        own = SamplerRows(*(tensor[row : row + 1] for tensor in rows))
        assert_same(run(logits_BV[row : row + 1], own), together[row : row + 1])


def test_rows_of_all_kinds_take_turns(restored_threads):
    """Rows that end early, and rows that need all barriers, in every order that twelve of them have by chance."""
    rng = torch.Generator().manual_seed(0)
    for seed in range(50):
        rows = rows_of(TEMPERATURE, (0, 20), (1.0, 0.9), (0.0,), seed=seed)
        rows = SamplerRows(*(t[torch.randperm(12, generator=torch.Generator().manual_seed(seed))] for t in rows))
        logits_BV = 3 * torch.randn(12, 300, generator=rng)
        logits_BV[torch.rand(12, generator=rng) < 0.2] = -math.inf
        logits_BV[torch.rand(12, generator=rng) < 0.2, 7] = math.nan
        expected_B = sample(logits_BV, rows, SamplerKind.FULL)
        for count in (1, 2, 3, 14):
            torch.set_num_threads(count)
            assert_same(run(logits_BV, rows), expected_B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pytorch_s_default_dtype_changes_nothing(dtype):
    rows, logits = rows_of((1.0,), (20,), (0.9,), (0.0,)), random_tensor(1, 500)
    processing = processor_rows(1, 500)
    expected = run(logits, rows), process_logits(logits, processing)
    torch.set_default_dtype(dtype)
    try:
        actual = run(logits, rows), sampler.process_logits(logits, processing)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(actual[0], expected[0])
    assert actual[1].dtype == torch.float32 and same_bits(actual[1], expected[1])


def test_frequencies_are_the_probabilities():
    count, logits_V = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    rows = rows_of((1.0,) * count, (0,), (1.0,), (0.0,))
    frequency_V = run(logits_V.expand(count, -1), rows).bincount(minlength=5) / count
    assert (frequency_V - logits_V.softmax(0)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("logits", "spoil"),
    [
        (torch.zeros(1, 5, dtype=torch.bfloat16), {}),
        (torch.zeros(1, 0), {}),
        (torch.zeros(1, 5), {"top_k_B": torch.zeros(1, dtype=torch.int32)}),
        (torch.zeros(1, 5), {"temperature_B": torch.zeros(1, dtype=torch.float64)}),
        (torch.zeros(1, 5), {"seed_B": torch.zeros(2, dtype=torch.int64)}),
    ],
    ids=["bfloat16", "no vocabulary", "int32", "float64", "two seeds"],
)
def test_other_tensors_are_refused(logits, spoil):
    with pytest.raises(ValueError, match="sample: "):
        run(logits, rows_of((1.0,), (0,), (1.0,), (0.0,))._replace(**spoil))


def test_the_plain_sampler_serves_until_the_operations_are_loaded(monkeypatch):
    calls = []
    part = in_cpp(sampler.sample, lambda *arguments: calls.append(arguments) or "plain")
    rows, logits = rows_of((1.0,), (0,), (1.0,), (0.0,)), torch.zeros(1, 5)
    assert_same(part(None, logits, *rows), sample(logits, rows, SamplerKind.FULL))
    assert_same(part(None, logits.double(), *rows), sample(logits, rows, SamplerKind.FULL))
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    assert part(None, logits, *rows) == "plain" and len(calls) == 1


def processor_rows(rows, vocab_size, seed=0):
    """Parameters of all kinds, some of them neutral."""
    rng = torch.Generator().manual_seed(seed)

    def some(*numbers):
        return torch.tensor(numbers)[torch.randint(len(numbers), (rows,), generator=rng)]

    bias_BV = torch.randn(rows, vocab_size, generator=rng)
    bias_BV[torch.rand(rows, vocab_size, generator=rng) < 0.7] = 0.0
    bias_BV[torch.rand(rows, vocab_size, generator=rng) < 0.1] = -math.inf
    allowed_BW = torch.randint(-(2**31), 2**31, (rows, -(-vocab_size // 32)), generator=rng).int()
    allowed_BW[::2] = -1
    return ProcessorRows(
        some(1.0, 1.3, 0.7),
        some(0.0, 0.5, -1.1),
        some(0.0, 0.3, 1.7),
        torch.rand(rows, vocab_size, generator=rng) < 0.3,
        torch.randint(-3, 4, (rows, vocab_size), generator=rng).clamp(min=0).int(),
        bias_BV,
        allowed_BW,
    )


def same_bits(actual, expected):
    """Whether numbers are the same bit for bit, -0 and 0 apart; any NaN counts as the same."""
    both_nan = actual.isnan() & expected.isnan()
    return bool((both_nan | (actual.view(torch.int32) == expected.view(torch.int32))).all())


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 31, 32, 33, 97, 8192, 8200, 20000])
def test_processed_logits_are_the_plain_ones_bit_for_bit(vocab_size, threads):
    rows, logits_BV = processor_rows(9, vocab_size), 5 * random_tensor(9, vocab_size)
    logits_BV[3, ::3], logits_BV[4, ::5], logits_BV[5, ::7] = math.nan, math.inf, -math.inf
    logits_BV[6, ::2] = -0.0
    expected = process_logits(logits_BV, rows)
    actual = sampler.process_logits(logits_BV, rows)
    assert same_bits(actual, expected)
    assert vocab_size < 31 or not same_bits(logits_BV, expected)
    neutral = ProcessorRows.neutral(9, vocab_size, logits_BV.device)
    assert same_bits(sampler.process_logits(logits_BV, neutral), logits_BV)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_prompt_BV": torch.zeros(2, 40, dtype=torch.uint8)},
        {"count_BV": torch.zeros(2, 40, dtype=torch.int64)},
        {"bias_BV": torch.zeros(2, 41)},
        {"bias_BV": torch.zeros(2, 80)[:, ::2]},
        {"allowed_BW": torch.zeros(2, 1, dtype=torch.int32)},
    ],
    ids=["bytes", "int64", "another vocabulary", "with gaps", "a word too few"],
)
def test_processors_refuse_other_tensors(changes):
    with pytest.raises(ValueError, match="process_logits: "):
        sampler.process_logits(torch.zeros(2, 40), processor_rows(2, 40)._replace(**changes))


def test_the_plain_processors_serve_until_the_operations_are_loaded(monkeypatch):
    rows, logits = processor_rows(2, 40), random_tensor(2, 40)
    processors = in_cpp(sampler.process_logits, lambda *arguments: "plain")
    assert same_bits(processors(None, logits, *rows), process_logits(logits, rows))
    monkeypatch.setattr(cpu, "is_loaded", lambda: False)
    assert processors(None, logits, *rows) == "plain"
