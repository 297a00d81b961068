"""Log-probabilities of prompts: those of the plain model, whatever the chunks, the cache and the neighbors are."""

import math
from statistics import median

import pytest
import torch
from conftest import random_ids, randomized, small_config
from test_scheduler import finish, make_request, make_scheduler, random_prompt

from qwen3fast import Generator, SamplingParams, StreamChunk
from qwen3fast.engine import prompt_logprobs
from qwen3fast.engine.parts import CHUNK_SIZES
from qwen3fast.engine.prompt_logprobs import WantedLogprobs
from qwen3fast.quantization.convert import quantize_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = randomized(small_config(max_position_embeddings=2048, eos_token_ids=()), seed=3)
GREEDY = SamplingParams(temperature=0, max_tokens=2)
ALL = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
# One token less and more than each chunk, prompts of several chunks, and the longest ones that fit.
LENGTHS = [1, 2, *(size + d for size in CHUNK_SIZES for d in (-1, 0, 1)), 600, 1021, 1022]


@pytest.fixture(scope="module")
def generator():
    with Generator(MODEL, max_seq_len=1024, max_batch_size=3, compile=False) as generator:
        yield generator


@torch.no_grad()
def expected_logprobs(ids, model=MODEL):
    """(T - 1, V): the log-probabilities of each token but the first."""
    return model(torch.tensor([ids]))[0, :-1].float().log_softmax(-1)


def assert_are(found, ids, model=MODEL, tolerance=2e-4):
    """found: `prompt_logprobs` of these ids."""
    expected = expected_logprobs(ids, model)
    assert len(found) == len(ids) and found[0] is None
    assert [at.token_id for at in found[1:]] == ids[1:]
    for at, row in zip(found[1:], expected, strict=True):
        assert at.logprob == pytest.approx(float(row[at.token_id]), abs=tolerance)
        values, _ = row.topk(len(at.top))
        assert [value for _, value in at.top] == pytest.approx(values.tolist(), abs=tolerance)
        assert [float(row[i]) for i, _ in at.top] == pytest.approx(values.tolist(), abs=tolerance)


@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_of_any_length_have_the_plain_models_logprobs(generator, length):
    ids = random_prompt(length)
    result = generator.generate(ids, ALL)
    assert_are(result.prompt_logprobs, ids)
    assert all(len(at.top) == 3 for at in result.prompt_logprobs[1:])
    assert result.token_ids == generator.generate(ids, GREEDY).token_ids


@pytest.mark.parametrize("length", [1, 2, 40, 300])
def test_logprobs_without_a_cache_are_the_same(generator, length):
    ids = random_prompt(length)
    assert_are(generator.generate(ids, ALL, use_cache=False).prompt_logprobs, ids)


def test_a_prompt_in_the_cache_is_computed_again(generator):
    ids = random_prompt(100, seed=1)
    generator.generate(ids, GREEDY)
    assert generator.generate(ids, GREEDY).metrics.reused_tokens == 100
    result = generator.generate(ids, ALL)
    assert result.metrics.reused_tokens == 0
    assert_are(result.prompt_logprobs, ids)
    assert generator.generate([*ids, 5], GREEDY).metrics.reused_tokens >= 100  # and later prompts reuse it


def test_a_result_has_none_unless_asked(generator):
    assert generator.generate([1, 2, 3], GREEDY).prompt_logprobs is None
    found = generator.generate([1, 2, 3], SamplingParams(max_tokens=1, prompt_logprobs=0)).prompt_logprobs
    assert [at and at.top for at in found] == [None, [], []]


def test_a_small_vocabulary_has_no_more_than_its_tokens():
    model = randomized(small_config(vocab_size=7, eos_token_ids=()))
    with Generator(model, compile=False, max_seq_len=64) as generator:
        found = generator.generate([1, 2], SamplingParams(max_tokens=1, prompt_logprobs=20)).prompt_logprobs
    assert sorted(i for i, _ in found[1].top) == list(range(7))


def test_each_of_several_replies_has_the_prompts_logprobs(generator):
    result = generator.generate([1, 2, 3], SamplingParams(max_tokens=2, temperature=1.0, n=3, prompt_logprobs=1))
    assert len(result.samples) == 3
    assert result.prompt_logprobs is not None
    assert [sample.prompt_logprobs for sample in result.samples] == [result.prompt_logprobs] * 3


def test_the_first_chunk_of_a_stream_has_them(generator):
    first, *others = generator.stream([4, 5, 6], ALL)
    assert isinstance(first, StreamChunk)
    assert_are(first.prompt_logprobs, [4, 5, 6])
    assert all(chunk.prompt_logprobs is None for chunk in others)
    assert (others or [first])[-1].result.prompt_logprobs == first.prompt_logprobs


def test_prompts_with_and_without_run_together(generator):
    prompts = [random_prompt(length, seed=2) for length in (70, 5, 200, 33, 64)]
    results = generator.generate(prompts, [ALL, GREEDY, ALL, GREEDY, ALL])
    for ids, result, wanted in zip(prompts, results, [True, False, True, False, True], strict=True):
        assert (result.prompt_logprobs is not None) == wanted
        if wanted:
            assert_are(result.prompt_logprobs, ids)
        assert result.token_ids == generator.generate(ids, GREEDY).token_ids


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_weights(name):
    config = small_config(vocab_size=96, hidden_size=64, intermediate_size=96, eos_token_ids=(), dtype=torch.bfloat16)
    model = randomized(config).bfloat16()
    quantize_model(model, name, torch.bfloat16)
    ids = random_ids(1, 90, vocab_size=96)[0].tolist()
    with Generator(model, compile=False, max_seq_len=128) as generator:
        found = generator.generate(ids, ALL).prompt_logprobs
        uncached = generator.generate(ids, ALL, use_cache=False).prompt_logprobs
    assert_are(uncached, ids, model)
    # Chunks sum in another order, and now and then an activation is quantized to the next level: these weights are sure
    # of themselves, and one such step moves a log-probability by up to 0.3 (five seeds).
    errors = [abs(at.logprob - other.logprob) for at, other in zip(found[1:], uncached[1:], strict=True)]
    assert median(errors) < 1e-3 and max(errors) < 0.5


def test_logits_of_few_positions_exist_at_a_time(generator, monkeypatch):
    ids, seen = random_prompt(150, seed=4), []
    run_logits = prompt_logprobs.run_logits

    def watched(head, x_1TE):
        seen.append(x_1TE.shape[1])
        return run_logits(head, x_1TE)

    monkeypatch.setattr(prompt_logprobs, "run_logits", watched)
    monkeypatch.setattr(prompt_logprobs, "MAX_LOGITS", 10 * 97 + 5)
    assert_are(generator.generate(ids, ALL).prompt_logprobs, ids)
    assert max(seen) == 10 and sum(seen) == 149


def test_a_cancelled_prompt_gives_what_was_computed():
    scheduler = make_scheduler(1, 1300)
    request = make_request(1100, 3, wanted_logprobs=WantedLogprobs(1, 0))
    scheduler.add(request)
    scheduler.step()
    assert len(request.prompt_logprobs) == CHUNK_SIZES[-1] and request.finish_reason is None
    scheduler.cancel(request)
    assert scheduler.is_idle
    following = make_request(1100, 3, temperature=0.0)
    scheduler.add(following)
    finish(scheduler, [following])
    assert following.reused_tokens == CHUNK_SIZES[-1]
    alone = make_request(1100, 3, temperature=0.0)
    other = make_scheduler(1, 1300)
    other.add(alone)
    finish(other, [alone])
    assert following.output_ids == alone.output_ids


def test_a_handle_of_a_cancelled_prompt_has_an_entry_per_token(generator):
    handle = generator.submit(random_prompt(1000, seed=5), ALL)
    handle.cancel()
    result = handle.result(timeout=60)
    if result.finish_reason == "cancelled":
        assert len(result.prompt_logprobs) == 1000 and result.prompt_logprobs[0] is None


@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_that_are_not_finite_are_an_error(use_cache):
    model = randomized(small_config(tie_word_embeddings=False, eos_token_ids=()))
    model.lm_head.weight[7, 0] = math.nan
    with Generator(model, compile=False, max_seq_len=64) as generator:
        with pytest.raises(FloatingPointError, match="NaN or infinite within the prompt"):
            generator.generate([1, 2, 3], ALL, use_cache=use_cache)
        model.lm_head.weight[7, 0] = 0.0
        assert_are(generator.generate([1, 2, 3], ALL).prompt_logprobs, [1, 2, 3], model)


# ---------------------------------------------------------------------------------------------------------- score


def expected_score(prompt, continuation):
    rows = expected_logprobs([*prompt, *continuation])[len(prompt) - 1 :]
    logprobs = [float(row[i]) for row, i in zip(rows, continuation, strict=True)]
    return logprobs, all(int(row.argmax()) == i for row, i in zip(rows, continuation, strict=True))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 700), (32, 32), (63, 2), (500, 30), (512, 511), (31, 33)])
def test_score_is_the_plain_models(generator, before, after):
    prompt, continuation = random_prompt(before, seed=6), random_prompt(after, seed=7)
    score = generator.score(prompt, continuation)
    logprobs, is_greedy = expected_score(prompt, continuation)
    assert score.logprobs == pytest.approx(logprobs, abs=2e-4)
    assert score.logprob == pytest.approx(sum(logprobs), abs=1e-2)
    assert (score.token_ids, score.is_greedy) == (continuation, is_greedy)


def test_continuations_of_a_prompt_compute_it_once(generator):
    prompt = random_prompt(200, seed=8)
    continuations = [random_prompt(n, seed=9) for n in (1, 3, 40, 3)]
    before = generator.stats.prefilled_tokens
    scores = generator.score(prompt, continuations)
    assert [score.metrics.reused_tokens for score in scores[1:]] == [199] * 3
    assert generator.stats.prefilled_tokens - before == 200 + 1 + (1 + 3) + (1 + 40) + (1 + 3)
    for score, continuation in zip(scores, continuations, strict=True):
        assert score.logprobs == pytest.approx(expected_score(prompt, continuation)[0], abs=2e-4)
    assert scores[1].logprobs == pytest.approx(scores[3].logprobs, abs=1e-5)


def test_a_greedy_reply_is_greedy_and_any_other_token_is_not(generator):
    prompt = random_prompt(50, seed=10)
    reply = generator.generate(prompt, SamplingParams(temperature=0, max_tokens=8, logprobs=0))
    score = generator.score(prompt, reply.token_ids)
    assert score.is_greedy
    assert score.logprobs == pytest.approx([at.logprob for at in reply.logprobs], abs=2e-4)
    for place in range(8):
        changed = list(reply.token_ids)
        changed[place] = (changed[place] + 1) % 97
        assert not generator.score(prompt, changed).is_greedy


def test_each_prompt_has_its_continuation(generator):
    prompts, continuations = [[1, 2], [3]], [[4], [5, 6]]
    scores = generator.score(prompts, continuations)
    assert [score.token_ids for score in scores] == continuations
    for score, prompt, continuation in zip(scores, prompts, continuations, strict=True):
        assert score.logprobs == pytest.approx(expected_score(prompt, continuation)[0], abs=2e-4)
    assert generator.score([1, 2], [[4]])[0].token_ids == [4]
    assert generator.score([1, 2], []) == []


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[1], [2]], [[3]], "got 2 prompts and 1 continuations"),
        ([[1], [2]], [3], "got 2 prompts and one continuation"),
        ([], [3], "got 0 prompts and one continuation"),
        ([1], [[]], "the continuation is empty"),
        ([[]], [[1]], "the prompt is empty"),
        ([1], [97], "token id 97 is outside the vocabulary"),
        ([1], "text", "no tokenizer; pass the continuation as a list"),
        ([1] * 1000, [1] * 24, r"prompt \(1000 tokens\) \+ continuation \(24 tokens\) \+ 1 = 1025 exceeds max_seq_len"),
        ([1], 3, "got continuations of type int"),
    ],
)
def test_what_cannot_be_scored_is_refused(generator, prompts, continuations, message):
    with pytest.raises(ValueError, match=message):
        generator.score(prompts, continuations)


def test_texts_are_encoded_separately(tokenizer):
    model = randomized(small_config(vocab_size=tokenizer.vocab_size, eos_token_ids=()))
    with Generator(model, tokenizer, compile=False, max_seq_len=64) as generator:
        score = generator.score("the do", "g is")
        assert score.token_ids == tokenizer.encode("g is")
        ids = generator.score(tokenizer.encode("the do"), tokenizer.encode("g is"))
        assert score.logprobs == pytest.approx(ids.logprobs, abs=1e-5)


@pytest.mark.parametrize("value", [-1, 21, 1.5, "1", True])
def test_prompt_logprobs_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="prompt_logprobs must be an integer from 0 to 20"):
        SamplingParams(prompt_logprobs=value)
