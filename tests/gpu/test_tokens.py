"""On a GPU: the tokens of the CPU reference in every mode, greedy, sampled, with and without the cache."""

import copy

import pytest
import torch
from conftest import random_ids, randomized, small_config

from gpu.conftest import DEVICE, MAX_SEQ_LEN, MODES, SLOTS, assert_captured, assert_greedy, nothing_compiles, prompts
from qwen3fast import Generator, SamplingParams
from qwen3fast.bench.measure import check_tokens
from qwen3fast.kernels import cuda

GREEDY = SamplingParams(temperature=0, max_tokens=40)
SAMPLED = [SamplingParams(30.0, top_k, 0.9, seed=i, max_tokens=40) for i, top_k in enumerate((0, 20, 64, 65) * 2)]


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def test_greedy_tokens_are_the_references_in_a_batch_and_alone(model, generators, mode):
    generator = generators[mode]
    assert_greedy(model, prompts(), [r.token_ids for r in generator.generate(prompts(), GREEDY)])
    alone = prompts()[3]
    assert_greedy(model, [alone], [generator.generate(alone, GREEDY).token_ids])
    assert_greedy(model, [alone], [generator.generate(alone, GREEDY, use_cache=False).token_ids])
    if mode == "graphs":
        assert_captured(generator)


def test_sampled_tokens_are_the_references(cpu_generator, generators, mode):
    expected = [r.token_ids for r in cpu_generator.generate(prompts(), SAMPLED)]
    actual = [r.token_ids for r in generators[mode].generate(prompts(), SAMPLED)]
    # A token at the border of its nucleus may fall on either side: of two replies with the same top_k, one may differ.
    for top_k in (0, 20, 64, 65):
        same = [a == e for a, e, params in zip(actual, expected, SAMPLED, strict=True) if params.top_k == top_k]
        assert any(same), (top_k, actual, expected)
    assert sum(a == e for a, e in zip(actual, expected, strict=True)) >= 6


def test_every_batch_size_and_length_is_right_and_compiles_nothing_after_warmup(model, generators):
    generator = generators["graphs"]
    generator.warmup()
    assert_captured(generator)
    before = generator.stats
    params = SamplingParams(temperature=0, max_tokens=3)
    with nothing_compiles():
        for length in (1, 60, 127, 300, MAX_SEQ_LEN - 8):
            for rows in range(1, SLOTS + 1):
                texts = [[(7 * i + row) % 97 for i in range(length)] for row in range(rows)]
                assert_greedy(model, texts, [r.token_ids for r in generator.generate(texts, params)])
    after = generator.stats
    assert (after.compilations, after.cuda_graphs) == (before.compilations, before.cuda_graphs)


def test_bfloat16_tokens_are_the_argmax_up_to_rounding():
    config = small_config(head_dim=64, hidden_size=128, dtype=torch.bfloat16, eos_token_ids=())
    model = randomized(config).bfloat16()
    prompt = random_ids(1, 90)[0].tolist()
    with Generator(copy.deepcopy(model).to(DEVICE), max_seq_len=256) as generator:
        reply = generator.generate(prompt, GREEDY).token_ids
        assert_captured(generator)
    assert check_tokens(model.float(), [prompt], [reply]).worst_gap < 0.03


@pytest.mark.parametrize(("attention", "cache_dtype"), [("sdpa", "auto"), ("split", "int8")])
def test_other_attention_gives_right_tokens(model, twin, attention, cache_dtype, monkeypatch):
    assert DEVICE.type == "cpu" or attention != "split" or cuda.load(DEVICE), "without Triton there is no such kernel"
    monkeypatch.setattr(cuda, "decode_attention", attention)
    monkeypatch.setenv("QWEN3FAST_FUSED_STEP", "0")  # the fused step has an attention of its own
    sizes = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": SLOTS, "kv_cache_dtype": cache_dtype}
    with Generator(twin, **sizes) as generator:
        replies = [r.token_ids for r in generator.generate(prompts(), GREEDY)]
        assert_captured(generator)
    if cache_dtype == "auto":
        assert_greedy(model, prompts(), replies)
        return
    monkeypatch.setattr(cuda, "decode_attention", "sdpa")  # the plain form over the same quantized cache
    with Generator(twin, compile=False, **sizes) as generator:
        expected = [r.token_ids for r in generator.generate(prompts(), GREEDY)]
    assert sum(a == e for a, e in zip(replies, expected, strict=True)) >= 7
