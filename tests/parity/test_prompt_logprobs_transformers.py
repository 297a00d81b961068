"""Log-probabilities of prompts and continuations against transformers, from the same weights."""

from __future__ import annotations

import pytest
import torch
from conftest import random_ids, randomized, small_config
from test_transformers import SHAPES, reference_of

from qwen3fast import Generator, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def reference_logprobs(model, ids):
    """(T - 1, V): the log-probabilities of each token but the first."""
    return reference_of(model)(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [5, 64, 97, 190])  # a padded chunk, a full one, two, and near the end of the cache
def test_prompt_logprobs_equal_transformers(shape, length):
    model = randomized(small_config(**SHAPES[shape], eos_token_ids=()))
    ids = random_ids(1, length)[0].tolist()
    expected = reference_logprobs(model, ids)
    with Generator(model, compile=False, max_seq_len=192) as generator:
        found = generator.generate(ids, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=5)).prompt_logprobs
    assert found[0] is None
    chosen = torch.tensor([at.logprob for at in found[1:]])
    torch.testing.assert_close(chosen, expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], rtol=0, atol=2e-3)
    top = torch.tensor([[value for _, value in at.top] for at in found[1:]])
    torch.testing.assert_close(top, expected.topk(5).values, rtol=0, atol=2e-3)


def test_scores_equal_transformers_with_a_prefix_in_the_cache():
    model = randomized(small_config(eos_token_ids=()), seed=2)
    prompt = random_ids(1, 70, seed=5)[0].tolist()
    continuations = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 2, 31, 33, 64)]
    with Generator(model, compile=False, max_seq_len=192, max_batch_size=2) as generator:
        greedy = generator.generate(prompt, SamplingParams(temperature=0, max_tokens=6)).token_ids
        scores = generator.score(prompt, [*continuations, greedy])
    assert [score.metrics.reused_tokens for score in scores] == [69] * 6
    for score, continuation in zip(scores, [*continuations, greedy], strict=True):
        rows = reference_logprobs(model, prompt + continuation)[len(prompt) - 1 :]
        expected = rows.gather(1, torch.tensor(continuation)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, rtol=0, atol=2e-3)
        assert score.logprob == pytest.approx(float(expected.sum()), abs=5e-3)
        assert score.is_greedy == (rows.argmax(-1).tolist() == continuation)
    assert scores[-1].is_greedy
