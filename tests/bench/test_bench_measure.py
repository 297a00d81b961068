"""The check of tokens that comes before every timing: what it counts, what it allows."""

import pytest
import torch
from conftest import random_ids, randomized, small_config

from qwen3fast.bench.measure import QUANTIZED_TOLERANCE, TIE_TOLERANCE, check_tokens
from qwen3fast.quantization.convert import quantize_model

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}


def greedy(model, prompt, count):
    """Return the most likely tokens of the plain model."""
    ids = []
    for _ in range(count):
        ids.append(int(model(torch.tensor([prompt + ids]))[0, -1].argmax()))
    return ids


def test_tokens_of_the_plain_model_are_exact_and_others_are_not():
    model = randomized(small_config(), seed=3)
    prompts = [random_ids(1, 9)[0].tolist(), random_ids(1, 5, seed=1)[0].tolist()]
    ids = [greedy(model, prompt, 6) for prompt in prompts]
    check = check_tokens(model, prompts, ids)
    assert (check.tokens, check.exact, check.worst_gap, check.passed) == (12, 12, 0.0, True)
    logits = model(torch.tensor([prompts[1] + ids[1][:-1]]))[0, -1]
    ids[1][-1] = int(logits.argmin())
    check = check_tokens(model, prompts, ids)
    assert (check.exact, check.passed) == (11, False)
    assert check.worst_gap == pytest.approx(float((logits.max() - logits.min()) / logits.abs().max()))


@pytest.mark.parametrize(
    ("dtype", "quantization", "cache_dtype", "tolerance"),
    [
        (torch.float32, None, None, TIE_TOLERANCE[torch.float32]),
        (torch.float32, "int8", torch.int8, TIE_TOLERANCE[torch.float32]),
        (torch.bfloat16, None, torch.bfloat16, TIE_TOLERANCE[torch.bfloat16]),
        (torch.bfloat16, "lossless", None, TIE_TOLERANCE[torch.bfloat16]),
        (torch.bfloat16, None, torch.int8, QUANTIZED_TOLERANCE),
        (torch.bfloat16, "int4", None, QUANTIZED_TOLERANCE),
    ],
    ids=str,
)
def test_quantized_activations_and_caches_allow_more_in_bfloat16_only(dtype, quantization, cache_dtype, tolerance):
    model = randomized(small_config(**SIZES, dtype=dtype)).to(dtype)
    if quantization:
        quantize_model(model, quantization, dtype)
    check = check_tokens(model, [[1, 2, 3]], [greedy(model, [1, 2, 3], 2)], cache_dtype)
    assert check.tolerance == tolerance
