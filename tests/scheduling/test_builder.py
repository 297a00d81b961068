"""What a request asks for is what it gets: n replies, log-probabilities, penalties, processors, structured output,
thoughts and tool calls. References are plain loops over the model's own forward pass.
"""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomized, slowly, small_config

from qwen3fast import ChatSession, Generator, SamplingParams, ToolCall
from qwen3fast.text.reasoning import CLOSING_TEXT

HOT = 30.0  # the random models are sure of themselves; at this temperature they choose among many tokens
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = "the dog and the cat"
QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}
DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]"


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights that end their replies with either of two ids, now and then."""
    ids = tuple(tokenizer.base.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    sizes = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1, "max_position_embeddings": 512}
    config = small_config(**sizes, eos_token_ids=ids)
    return randomized(config, seed=1)


@pytest.fixture
def generator(model, tokenizer):
    with Generator(model, tokenizer, max_seq_len=512, max_batch_size=3, compile=False) as generator:
        yield generator


@pytest.fixture
def wordless(model):
    """No tokenizer, and no end of sequence but by length."""
    endless = randomized(replace(model.config, eos_token_ids=()), seed=1)
    with Generator(endless, max_seq_len=128, compile=False) as generator:
        yield generator


@pytest.fixture(scope="module")
def tiny():
    """The fast one, which writes replies that make sense; where there is a compiler, it runs in C++."""
    with Generator.from_pretrained("tiny", dtype="bfloat16", max_batch_size=4, compile=True) as generator:
        yield generator


@pytest.fixture(scope="module")
def exact_tiny():
    with Generator.from_pretrained("tiny", dtype="float32", compile=False) as generator:
        yield generator


def next_logits(model, ids):
    """Logits after the last of ids, computed whole, (V,) in float32."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].float()


def plain_loop(model, ids, steps, change):
    """Greedy token ids of a reply; change(logits, reply so far) gives the logits to choose from."""
    reply = []
    for _ in range(steps):
        reply.append(int(change(next_logits(model, [*ids, *reply]), reply).argmax()))
    return reply


def bare(result):
    """All of a result but its figures."""
    return replace(result, metrics=None, samples=[bare(sample) for sample in result.samples])


# n


def test_n_gives_so_many_different_samples(generator):
    result = generator.generate(PROMPT, SamplingParams(temperature=HOT, n=5, max_tokens=10))
    assert len(result.samples) == 5
    assert len({tuple(sample.token_ids) for sample in result.samples}) == 5
    assert bare(replace(result, samples=[])) == bare(result.samples[0])
    assert all(sample.samples == [] for sample in result.samples)


def test_one_sample_has_no_list_of_samples(generator):
    assert generator.generate(PROMPT, GREEDY).samples == []


@pytest.mark.parametrize("n", [2, 24])
def test_seeded_sample_i_is_the_reply_to_seed_plus_i(generator, n):
    params = SamplingParams(temperature=HOT, max_tokens=4, seed=40)
    samples = generator.generate(PROMPT, replace(params, n=n)).samples
    expected = [generator.generate(PROMPT, replace(params, seed=40 + i)) for i in range(n)]
    assert [bare(sample) for sample in samples] == [bare(result) for result in expected]


def test_seeds_wrap_around_at_64_bits(generator):
    last = SamplingParams(temperature=HOT, max_tokens=8, seed=2**63 - 1)
    samples = generator.generate(PROMPT, replace(last, n=2)).samples
    assert samples[0].token_ids == generator.generate(PROMPT, last).token_ids
    assert samples[1].token_ids == generator.generate(PROMPT, replace(last, seed=-(2**63))).token_ids


@pytest.mark.parametrize("rows", [1, 3])
def test_samples_share_the_computation_of_their_prompt(model, tokenizer, rows):
    with Generator(model, tokenizer, max_seq_len=512, max_batch_size=rows, compile=False) as generator:
        ids = [i % 90 for i in range(200)]
        result = generator.generate(ids, SamplingParams(temperature=HOT, n=6, max_tokens=5))
        assert [sample.metrics.reused_tokens for sample in result.samples] == [0] + [200] * 5
        assert (generator.stats.prefilled_tokens, generator.stats.reused_tokens) == (200, 1000)


def test_samples_of_several_prompts_stay_apart(generator):
    each = [SamplingParams(temperature=HOT, n=n, max_tokens=6, seed=5) for n in (3, 1, 2)]
    results = generator.generate(["a", "b", "c"], each)
    assert [len(result.samples) for result in results] == [3, 0, 2]
    for prompt, params, result in zip("abc", each, results, strict=True):
        assert bare(result) == bare(generator.generate(prompt, params))


def test_samples_are_the_same_without_a_cache(generator):
    params = SamplingParams(temperature=HOT, n=3, max_tokens=6, seed=1)
    assert bare(generator.generate(PROMPT, params)) == bare(generator.generate(PROMPT, params, use_cache=False))


def test_each_sample_follows_its_own_constraint(generator):
    samples = generator.generate(PROMPT, SamplingParams(temperature=HOT, n=6, regex=DATE, max_tokens=40)).samples
    assert all(re.fullmatch(DATE, sample.text) for sample in samples)
    assert len({sample.text for sample in samples}) > 1


@pytest.mark.parametrize("method", ["stream", "submit", "stream_chat"])
def test_streams_refuse_several_samples(generator, method):
    prompt = QUESTION if method == "stream_chat" else PROMPT
    with pytest.raises(ValueError, match=r"n is 2, but a stream is one reply"):
        getattr(generator, method)(prompt, SamplingParams(n=2, temperature=1))


# Log-probabilities


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("temperature", [0, HOT])
def test_logprobs_are_those_of_the_models_own_logits(generator, model, temperature, use_cache):
    params = SamplingParams(
        temperature=temperature, seed=2, max_tokens=8, logprobs=5, ignore_eos=True, frequency_penalty=2.0
    )
    ids = generator.tokenizer.encode(PROMPT)
    result = generator.generate(ids, params, use_cache=use_cache)
    assert [at.token_id for at in result.logprobs] == result.token_ids
    for place, at in enumerate(result.logprobs):
        expected_V = next_logits(model, ids + result.token_ids[:place]).log_softmax(-1)
        values, likeliest = expected_V.topk(5)
        assert at.logprob == pytest.approx(expected_V[at.token_id].item(), abs=1e-4)
        assert [token for token, _ in at.top] == likeliest.tolist()
        assert [value for _, value in at.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("n", [0, 1, 20])
def test_logprobs_lists_are_as_long_as_asked_for_and_sorted(generator, n):
    result = generator.generate(PROMPT, replace(GREEDY, logprobs=n))
    assert len(result.logprobs) == len(result.token_ids)
    for at in result.logprobs:
        values = [value for _, value in at.top]
        assert len(at.top) == n
        assert values == sorted(values, reverse=True)
        assert len({token for token, _ in at.top}) == n
        assert n == 0 or at.top[0] == (at.token_id, pytest.approx(at.logprob))  # greedy


def test_logprobs_are_none_unless_asked_for(generator):
    plain, asked = generator.generate([PROMPT] * 2, [GREEDY, replace(GREEDY, logprobs=3)])
    assert plain.logprobs is None
    assert len(asked.logprobs) == len(plain.token_ids)


def test_logprobs_of_a_vocabulary_smaller_than_the_list():
    model = randomized(small_config(vocab_size=11, eos_token_ids=()))
    with Generator(model, max_seq_len=64, compile=False) as generator:
        result = generator.generate([1, 2], SamplingParams(max_tokens=2, logprobs=20))
    assert [len(at.top) for at in result.logprobs] == [11, 11]
    assert sum(np.exp(value) for _, value in result.logprobs[0].top) == pytest.approx(1, abs=1e-5)


def test_a_cancelled_reply_has_logprobs_for_what_there_is(generator):
    params = replace(GREEDY, max_tokens=400, logprobs=2, ignore_eos=True, logits_processor=slowly)
    handle = generator.submit(PROMPT, params)
    next(iter(handle))
    handle.cancel()
    result = handle.result(20)
    assert result.finish_reason == "cancelled"
    assert len(result.logprobs) == len(result.token_ids) > 0


# Ids of single tokens


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {0: 1.0, 10**6: 1.0}},
        {"allowed_token_ids": [3, 10**6]},
        {"logit_bias": {5: 1.0}, "allowed_token_ids": (10**6,)},
    ],
)
def test_ids_outside_the_vocabulary_are_refused(generator, params):
    last = generator.config.vocab_size - 1
    with pytest.raises(ValueError, match=rf"{list(params)[-1]}: token id 1000000 is outside .* \(0 to {last}\)"):
        generator.generate(PROMPT, SamplingParams(**params))
    generator.generate(PROMPT, SamplingParams(max_tokens=2, logit_bias={last: 1.0}, allowed_token_ids=[last]))


def test_only_allowed_tokens_are_chosen(generator):
    allowed = {7, 30, 31, 32, 63, 64}
    params = SamplingParams(temperature=HOT, seed=0, max_tokens=60, allowed_token_ids=allowed)
    assert set(generator.generate(PROMPT, params).token_ids) == allowed


def test_a_bias_of_minus_infinity_forbids_a_token(generator):
    [first, *_] = generator.generate(PROMPT, GREEDY).token_ids
    ids = generator.generate(PROMPT, replace(GREEDY, logit_bias={first: -float("inf")})).token_ids
    assert first not in ids


def test_forbidding_every_token_says_so(generator):
    params = replace(GREEDY, allowed_token_ids=[5], logit_bias={5: -float("inf")})
    with pytest.raises(ValueError, match="no token is allowed at token 0 of the reply"):
        generator.generate(PROMPT, params)
    assert generator.generate(PROMPT, GREEDY).token_ids


def test_params_must_be_sampling_params(generator):
    with pytest.raises(ValueError, match="params must be a SamplingParams, got dict"):
        generator.generate(PROMPT, {"temperature": 0})


# Processors of logits


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 1.5, "logit_bias": {9: 3.0}},
    ],
    ids=lambda penalties: "+".join(penalties),
)
def test_penalties_change_greedy_replies_as_a_plain_loop_does(exact_tiny, penalties):
    ids = exact_tiny.tokenizer.encode("the dog the dog the dog")
    repetition = penalties.get("repetition_penalty", 1.0)

    def change(logits_V, reply):
        logits_V = logits_V.clone()
        for token in {*ids, *reply}:
            logits_V[token] *= repetition if logits_V[token] < 0 else 1 / repetition
        for token in set(reply):
            logits_V[token] -= penalties.get("presence_penalty", 0.0)
            logits_V[token] -= penalties.get("frequency_penalty", 0.0) * reply.count(token)
        for token, bias in penalties.get("logit_bias", {}).items():
            logits_V[token] += bias
        return logits_V

    plain = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True)
    reply = exact_tiny.generate(ids, replace(plain, **penalties)).token_ids
    assert reply == plain_loop(exact_tiny.model, ids, 25, change)
    assert reply == exact_tiny.generate(ids, replace(plain, **penalties), use_cache=False).token_ids
    assert reply != exact_tiny.generate(ids, plain).token_ids


def lean_to_seven(logits, output):
    """A logits_processor: token 7 is likelier, the longer the reply."""
    bias = torch.zeros_like(logits)
    bias[7] = 2.0 * len(output)
    return logits + bias


EVERY_FIELD = {
    "greedy": {"temperature": 0},
    "sampled": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.3},
    "stop": {"stop": ["a", "e"]},
    "stop_token_ids": {"stop_token_ids": list(range(0, 900, 9))},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {1015: 60.0}},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": -1.5},
    "logit_bias": {"logit_bias": {7: 40.0, 9: 40.0, 11: -float("inf")}},
    "allowed_token_ids": {"allowed_token_ids": range(50, 80)},
    "logprobs": {"logprobs": 4},
    "n": {"n": 3},
    "logits_processor": {"logits_processor": lean_to_seven},
    "json_schema": {"json_schema": SCHEMA},
    "regex": {"regex": DATE},
    "thinking_budget": {"thinking_budget": 3, "logit_bias": {1018: 100.0}},
    "all": {
        "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.3, "logit_bias": {7: 4.0}, "allowed_token_ids": range(1024), "logprobs": 2, "n": 2,
        "logits_processor": lean_to_seven, "regex": "[a-z ]{5,9}!", "stop": ["x"], "thinking_budget": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("fields", EVERY_FIELD.values(), ids=EVERY_FIELD)
def test_every_field_means_the_same_without_a_cache(generator, fields):
    """Alone, beside requests that ask for other things, and without a cache."""
    prompt = generator.render(QUESTION, SamplingParams(temperature=1))  # a reply that may begin with a thought
    params = SamplingParams(**({"temperature": HOT, "seed": 5, "max_tokens": 16} | fields))
    others = [SamplingParams(temperature=HOT, seed=6, max_tokens=9, logprobs=1, presence_penalty=1.0), GREEDY]
    uncached = bare(generator.generate(prompt, params, use_cache=False))
    cached = bare(generator.generate(prompt, params))
    beside, *_ = generator.generate([prompt, "something else", "more"], [params, *others])
    assert strip_logprobs(cached) == strip_logprobs(uncached) == strip_logprobs(bare(beside))
    for mine, theirs in zip(logprobs_of(cached), logprobs_of(uncached), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def strip_logprobs(result):
    return replace(result, logprobs=None, samples=[strip_logprobs(sample) for sample in result.samples])


def logprobs_of(result):
    """Log-probabilities of all samples, which are compared with a tolerance."""
    return [at.logprob for sample in [result, *result.samples] for at in sample.logprobs or ()]


def test_logits_processor_sees_the_logits_and_the_reply_so_far(generator, model):
    seen = []

    def look(logits, output):
        seen.append((logits.clone(), output.tolist(), logits.dtype, output.dtype))
        return logits

    ids = generator.tokenizer.encode(PROMPT)
    reply = generator.generate(ids, replace(GREEDY, max_tokens=5, logits_processor=look)).token_ids
    assert reply == generator.generate(ids, replace(GREEDY, max_tokens=5)).token_ids
    assert [output for _, output, *_ in seen] == [reply[:i] for i in range(5)]
    assert {(d, e) for *_, d, e in seen} == {(torch.float32, torch.int64)}
    for logits_V, output, *_ in seen:
        torch.testing.assert_close(logits_V, next_logits(model, ids + output), atol=1e-3, rtol=1e-4)


def test_logits_processor_may_force_a_reply(generator):
    wanted = [5, 900, 77, 5]

    def force(logits, output):
        forced = torch.full_like(logits, -float("inf"))
        forced[wanted[len(output)]] = 0
        return forced

    params = SamplingParams(temperature=HOT, max_tokens=4, logits_processor=force)
    results = generator.generate([PROMPT, "beside it"], [params, GREEDY])
    assert results[0].token_ids == wanted
    assert results[1].token_ids == generator.generate("beside it", GREEDY).token_ids


WRONG = {
    "raises": (lambda logits, output: 1 / 0, ZeroDivisionError, "division by zero"),
    "short": (lambda logits, output: logits[:5], ValueError, r"must return logits of shape \(\d+,\), got \(5,\)"),
    "batched": (lambda logits, output: logits[None], ValueError, r"logits of shape \(\d+,\), got \(1, \d+\)"),
    "none": (lambda logits, output: None, ValueError, r"must return logits of shape \(\d+,\), got NoneType"),
    "list": (lambda logits, output: logits.tolist(), ValueError, r"must return logits of shape \(\d+,\), got list"),
    "nan": (lambda logits, output: logits * float("nan"), FloatingPointError, "no token is allowed, or .* at token 0"),
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("processor", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_a_logits_processor_does_wrong_is_raised(generator, processor, error, message, use_cache):
    with pytest.raises(error, match=message):
        generator.generate(PROMPT, replace(GREEDY, logits_processor=processor), use_cache=use_cache)
    assert generator.stats.slots_in_use == 0


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize(("processor", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_a_logits_processor_does_wrong_is_not_felt_by_others(generator, processor, error, message, place):
    expected = [generator.generate(p, replace(GREEDY, max_tokens=10)).token_ids for p in ("one", "two", "three")]

    def at_place(logits, output):
        return processor(logits, output) if len(output) == place else logits

    bad = generator._builder.build_one("bad", replace(GREEDY, logits_processor=at_place))
    good = [generator._builder.build_one(p, replace(GREEDY, max_tokens=10)) for p in ("one", "two", "three")]
    generator.debug.worker.add([good[0].request, bad.request, good[1].request, good[2].request])
    with pytest.raises(error, match=message.replace("at token 0", f"at token {place}")):
        bad.result(20)
    assert [handle.result(20).token_ids for handle in good] == expected


# Structured replies


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["random", "tiny"])
def test_json_schema_is_followed_at_any_temperature(generator, tiny, name, seed):
    generator = {"random": generator, "tiny": tiny}[name]
    params = SamplingParams(temperature=HOT, top_k=0, top_p=1.0, seed=seed, json_schema=SCHEMA, max_tokens=400)
    results = generator.generate([PROMPT, "x", [1, 2, 3]], [replace(params, seed=10 * seed + i) for i in range(3)])
    ended = [result for result in results if result.finish_reason == "stop"]
    assert ended
    for result in ended:
        value = json.loads(result.text)
        assert set(value) == {"age", "kind"}
        assert type(value["age"]) is int
        assert 0 <= value["age"] <= 99
        assert value["kind"] in ("cat", "dog")
        assert result.text == result.answer


@pytest.mark.parametrize(
    ("schema", "check"),
    [
        ({"type": "object"}, lambda value: type(value) is dict),
        ({"type": "array", "items": {"type": "boolean"}, "maxItems": 4}, lambda value: type(value) is list),
        ({"enum": ["yes", 3, None, "naïve <think>"]}, lambda value: value in ("yes", 3, None, "naïve <think>")),
        ('{"type": "string", "maxLength": 12}', lambda value: type(value) is str and len(value) <= 12),
        ({"const": '"quoted\\"'}, lambda value: value == '"quoted\\"'),
    ],
    ids=["object", "array", "enum", "string", "const"],
)
def test_json_schemas_of_all_kinds_are_followed(generator, schema, check):
    params = [SamplingParams(temperature=HOT, seed=i, json_schema=schema, max_tokens=300) for i in range(6)]
    ended = [r for r in generator.generate([PROMPT] * 6, params) if r.finish_reason == "stop"]
    assert ended
    for result in ended:
        assert check(json.loads(result.text)), result.text


@pytest.mark.parametrize("name", ["random", "tiny"])
@pytest.mark.parametrize(
    "pattern", [DATE, r"(yes|no|maybe)(, (yes|no|maybe)){0,3}", r"[a-zé]{1,9}@[a-z]{2,5}\.org", "(今天|é){2,4}", "a"]
)
def test_regex_is_matched_whole_at_any_temperature(generator, tiny, name, pattern):
    generator = {"random": generator, "tiny": tiny}[name]
    params = [
        SamplingParams(temperature=HOT, top_k=0, top_p=1.0, seed=i, regex=pattern, max_tokens=80) for i in range(6)
    ]
    results = generator.generate([PROMPT] * 6, params)
    assert {result.finish_reason for result in results} == {"stop"}
    for result in results:
        assert re.fullmatch(pattern, result.text), result.text


def test_a_structured_reply_that_is_cut_off_is_the_beginning_of_a_whole_one(generator):
    params = SamplingParams(temperature=HOT, seed=1, regex=DATE, max_tokens=30)
    whole = generator.generate(PROMPT, params)
    cut = generator.generate(PROMPT, replace(params, max_tokens=4))
    assert cut.finish_reason == "length"
    assert whole.token_ids[:4] == cut.token_ids


def test_a_structured_reply_that_ignores_its_end_gets_no_text_behind_it(generator):
    params = SamplingParams(temperature=HOT, seed=1, regex="(yes|no)", max_tokens=10, ignore_eos=True)
    assert generator.generate(PROMPT, params).text in ("yes", "no")


def test_structured_requests_from_several_threads_do_not_disturb_each_other(model, tokenizer):
    patterns = [f"[{a}-{chr(ord(a) + 3)}]{{4,8}}" for a in "adgjmpsv"]
    with Generator(model, tokenizer, max_seq_len=512, max_batch_size=3, compile=False) as generator:

        def work(pattern):
            for seed in range(4):
                params = SamplingParams(temperature=HOT, seed=seed, regex=pattern, max_tokens=20)
                result = generator.submit(PROMPT, params).result(30)
                assert re.fullmatch(pattern, result.text), (pattern, result.text)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, patterns))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("json_schema", {"type": "nonsense"}, "this JSON schema cannot be used"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "JSON schema"),
        ("regex", "(unclosed", "this regular expression cannot be used"),
        ("regex", "a(?=b)", "this regular expression cannot be used"),
        ("regex", "[^\\s\\S]", "regular expression"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_runs(generator, field, value, message):
    params = SamplingParams(**{field: value})
    for call in (generator.generate, generator.submit, generator.stream):
        with pytest.raises(ValueError, match=message):
            call(PROMPT, params)
    with pytest.raises(ValueError, match=message):
        generator.generate([PROMPT, PROMPT], [GREEDY, params])
    assert (generator.stats.prefilled_tokens, generator.stats.slots_in_use) == (0, 0)


def test_a_failed_request_for_structure_leaves_others_possible(generator):
    with pytest.raises(ValueError):
        generator.generate(PROMPT, SamplingParams(regex="("))
    assert generator.generate(PROMPT, SamplingParams(regex="abc", max_tokens=9)).text == "abc"


@pytest.mark.parametrize("field", ["json_schema", "regex"])
def test_structure_without_llguidance_names_the_package(generator, monkeypatch, field):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"need llguidance; run: pip install 'qwen3fast\[structured\]'"):
        generator.generate(PROMPT, SamplingParams(**{field: {"regex": "a", "json_schema": SCHEMA}[field]}))
    assert generator.generate(PROMPT, GREEDY).token_ids


def test_structure_without_a_tokenizer_is_refused(wordless):
    for params in (SamplingParams(regex="a"), SamplingParams(json_schema=SCHEMA)):
        with pytest.raises(ValueError, match="json_schema, regex and grammar need a tokenizer"):
            wordless.generate([1], params)


def test_a_thinking_budget_without_the_tags_is_refused(wordless):
    with pytest.raises(ValueError, match="thinking_budget needs a tokenizer with the tokens <think> and </think>"):
        wordless.generate([1], SamplingParams(thinking_budget=3))


# Thoughts


@pytest.mark.parametrize("seed", range(3))
def test_a_thought_is_told_from_the_answer(tiny, seed):
    result = tiny.chat(QUESTION, SamplingParams(seed=seed, max_tokens=100))
    assert result.finish_reason == "stop"
    assert result.text == f"<think>\n{result.reasoning}\n</think>\n\n{result.answer}"
    assert result.answer.isdigit()
    assert re.search(r"carry \d\.", result.reasoning)


def test_without_thinking_all_is_answer(tiny):
    result = tiny.chat(QUESTION, GREEDY, enable_thinking=False)
    assert (result.reasoning, result.answer, result.text) == ("", "42", "42")


def test_without_thinking_the_preset_of_reasoning_is_not_used(tiny):
    given = SamplingParams(temperature=2.0, top_p=0.5, seed=3, max_tokens=20)
    replies = [
        lambda params: tiny.chat(QUESTION, params, enable_thinking=False),
        lambda params: list(tiny.stream_chat(QUESTION, params, enable_thinking=False))[-1].result,
        lambda params: ChatSession(tiny, enable_thinking=False).send(QUESTION[0]["content"], params),
    ]
    prompt = tiny.render(QUESTION, enable_thinking=False)
    for reply in replies:
        for temperature, top_p in ((None, None), (2.0, None), (None, 0.5), (2.0, 0.5)):
            params = replace(given, temperature=temperature, top_p=top_p)
            used = replace(params, temperature=temperature or 0.7, top_p=top_p or 0.8)
            assert tiny._builder.without_reasoning(params, prompt) == used
            assert reply(params).token_ids == tiny.generate(prompt, used).token_ids
    assert (tiny.default_params.temperature, tiny.default_params.top_p) == (0.6, 0.95)


@pytest.mark.parametrize("preset", [{}, {"do_sample": True, "temperature": 0.6, "top_p": 0.8}])
def test_without_thinking_other_presets_are_left_alone(model, tokenizer, preset):
    with Generator(model, tokenizer, generation_config=preset, max_seq_len=512, compile=False) as generator:
        assert generator._builder.without_reasoning(None, [1, 2, 3]) == SamplingParams()


def test_without_thinking_a_template_without_the_switch_leaves_the_preset_alone(tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "{{ messages[0].content }}")
    assert tiny._builder.without_reasoning(None, [1, 2, 3]) == SamplingParams()


def test_a_thought_that_is_never_closed_is_all_thought(tiny):
    result = tiny.chat(QUESTION, SamplingParams(seed=0, max_tokens=10))
    assert result.finish_reason == "length"
    assert result.answer == ""
    assert result.text.startswith("<think>\n" + result.reasoning)


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n\n"])
def test_a_prompt_that_ends_in_a_thought_begins_the_reply_inside_it(tiny, opening):
    """As the template of Qwen3-Thinking-2507 does."""
    prompt = tiny.render(QUESTION, SamplingParams(temperature=1)) + tiny.tokenizer.encode(opening)
    result = tiny.generate(prompt, SamplingParams(seed=0, max_tokens=60))
    reasoning, answer = result.text.split("</think>")
    assert "<think>" not in result.text
    assert (result.reasoning, result.answer) == (reasoning.strip("\n"), answer.strip("\n"))
    assert result.reasoning
    assert result.answer.isdigit()


def test_a_prompt_that_has_closed_its_thought_begins_with_the_answer(tiny):
    prompt = tiny.render(QUESTION, SamplingParams(temperature=1)) + tiny.tokenizer.encode("<think>\nSo.\n</think>\n\n")
    result = tiny.generate(prompt, GREEDY)
    assert (result.reasoning, result.answer) == ("", result.text)


def tags(generator):
    """Ids of <think> and </think>, and of what stands behind a thought."""
    token = generator.tokenizer.base.token_to_id
    return token("<think>"), token("</think>"), generator.tokenizer.encode("\n\n")


def closing(generator, budget):
    """Ids of the sentence that closes a thought at its budget."""
    return generator.tokenizer.encode(CLOSING_TEXT) if budget else []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("structured", [False, True])
def test_thinking_budget_ends_a_thought_after_exactly_so_many_tokens(tiny, seed, structured):
    begin, end, after = tags(tiny)
    params = SamplingParams(seed=seed, max_tokens=160, regex=DATE if structured else None)
    free = tiny.chat(QUESTION, params)
    assert free.token_ids.index(end) - 1 > 5
    for budget in (0, 1, 5):
        result = tiny.chat(QUESTION, replace(params, thinking_budget=budget))
        sentence = closing(tiny, budget)
        opening = result.token_ids[: 1 + budget + len(sentence) + 1 + len(after)]
        assert opening == [*free.token_ids[: 1 + budget], *sentence, end, *after]
        assert opening[0] == begin
        assert begin not in result.token_ids[1:]
        assert end not in result.token_ids[len(opening) :]
        assert result.finish_reason == "stop"
        assert not structured or re.fullmatch(DATE, result.answer)
        thought = tiny.tokenizer.decode([*free.token_ids[1 : 1 + budget], *sentence])
        assert result.reasoning == thought.strip("\n")


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_thinking_budget_counts_all_tokens_of_a_reply_that_begins_in_its_thought(tiny, budget):
    _, end, after = tags(tiny)
    prompt = tiny.render(QUESTION, SamplingParams(temperature=1)) + tiny.tokenizer.encode("<think>\n")
    result = tiny.generate(prompt, SamplingParams(seed=0, max_tokens=160, thinking_budget=budget))
    index = budget + len(closing(tiny, budget))
    assert result.token_ids.index(end) == index
    assert result.token_ids[index + 1 : index + 1 + len(after)] == after
    assert result.answer


def test_a_thought_within_its_budget_is_left_alone(tiny):
    _, end, _ = tags(tiny)
    params = SamplingParams(seed=0, max_tokens=100)
    free = tiny.chat(QUESTION, params)
    length = free.token_ids.index(end) - 1
    for budget in (length + 1, 100):
        assert tiny.chat(QUESTION, replace(params, thinking_budget=budget)).token_ids == free.token_ids


def test_a_reply_without_a_thought_feels_no_budget(tiny):
    params = replace(GREEDY, thinking_budget=0)
    assert tiny.chat(QUESTION, params, enable_thinking=False).text == "42"
    assert tiny.generate("The capital of France is", params).text.startswith(" Paris")


@pytest.fixture(scope="module", params=range(3))
def free_reasoning(tiny, request):
    """Parameters of one seed, and the reply to QUESTION without a structure."""
    params = SamplingParams(seed=request.param, max_tokens=80)
    return params, tiny.chat(QUESTION, params)


@pytest.mark.parametrize(
    ("field", "structure", "check"),
    [
        ("json_schema", {"enum": ["cat", "dog"]}, lambda text: json.loads(text) in ("cat", "dog")),
        (
            "json_schema",
            {"type": "integer", "minimum": 100, "maximum": 999},
            lambda text: 100 <= json.loads(text) <= 999,
        ),
        ("regex", r"[0-9]{3}( \w{1,9})?", lambda text: re.fullmatch(r"[0-9]{3}( \w{1,9})?", text)),
    ],
    ids=["enum", "integer", "regex"],
)
def test_the_thought_is_free_and_the_answer_follows_the_structure(tiny, field, structure, check, free_reasoning):
    params, free = free_reasoning
    result = tiny.chat(QUESTION, replace(params, **{field: structure}))
    assert result.finish_reason == "stop"
    assert result.reasoning == free.reasoning
    assert "carry" in result.reasoning
    assert check(result.answer)
    assert result.text == f"<think>\n{result.reasoning}\n</think>\n\n{result.answer}"


@pytest.mark.parametrize("seed", range(4))
def test_at_high_temperature_the_answer_follows_the_structure_behind_a_thought_or_none(tiny, seed):
    params = SamplingParams(
        temperature=HOT, top_k=0, top_p=1.0, seed=seed, max_tokens=200, regex=DATE, thinking_budget=20
    )
    opened = []
    for bias in (-float("inf"), 0.0, 1000.0):  # of <think>
        result = tiny.chat(QUESTION, replace(params, logit_bias={tags(tiny)[0]: bias}))
        assert result.finish_reason == "stop"
        assert re.fullmatch(DATE, result.answer), result.text
        opened.append(result.text.startswith("<think>"))
    assert (opened[0], opened[2]) == (False, True)


def test_a_reply_with_structure_does_not_end_in_its_reasoning(tiny):
    begin = tags(tiny)[0]
    bias = {begin: 1000.0, **dict.fromkeys(tiny.config.eos_token_ids, 2000.0)}  # it wants to end, at once
    params = SamplingParams(temperature=0, max_tokens=200, regex=DATE, thinking_budget=5, logit_bias=bias)
    result = tiny.chat(QUESTION, params)
    assert re.fullmatch(DATE, result.answer), result.text
    assert result.reasoning and result.finish_reason == "stop"


def test_without_thinking_structure_holds_from_the_first_token(tiny):
    for seed in range(3):
        params = SamplingParams(temperature=HOT, seed=seed, top_k=0, top_p=1.0, regex=DATE, max_tokens=60)
        result = tiny.chat(QUESTION, params, enable_thinking=False)
        assert re.fullmatch(DATE, result.text)


# Tool calls


def writing(generator, text):
    """A logits_processor that makes the model write a text and end its turn."""
    ids = [*generator.tokenizer.encode(text), generator.tokenizer.base.token_to_id("<|im_end|>")]

    def force(logits, output):
        forced = torch.full_like(logits, -float("inf"))
        forced[ids[len(output)]] = 0
        return forced

    return force


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": [25]}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("text", "answer", "calls", "malformed"),
    [
        (CALL, "", [ToolCall("add", {"a": 17, "b": [25]})], []),
        ("Let me see.\n" + CALL, "Let me see.", [ToolCall("add", {"a": 17, "b": [25]})], []),
        (CALL + "\n" + CALL, "", [ToolCall("add", {"a": 17, "b": [25]})] * 2, []),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [ToolCall("now", {})], []),
        ('<tool_call>{"name": "now"}</tool_call>', '<tool_call>{"name": "now"}</tool_call>', [], 1),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', [], 1),
        ("<tool_call>\nadd(17)", "<tool_call>\nadd(17)", [], 1),
        (CALL + "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", [ToolCall("add", {"a": 17, "b": [25]})], 1),
        (f"<think>\nHm.\n{CALL}", "", [ToolCall("add", {"a": 17, "b": [25]})], []),
        (f"<think>\nHm.\n</think>\n\n{CALL}", "", [ToolCall("add", {"a": 17, "b": [25]})], []),
    ],
)
def test_tool_calls_are_taken_from_the_answer(tiny, text, answer, calls, malformed):
    params = SamplingParams(temperature=1, max_tokens=200, logits_processor=writing(tiny, text))
    result = tiny.chat(QUESTION, params, tools=TOOLS)
    assert (result.text, result.finish_reason) == (text, "stop")
    assert (result.answer, result.tool_calls) == (answer, calls)
    assert len(result.malformed_tool_calls) == (malformed or 0)
    assert all(block in result.answer for block in result.malformed_tool_calls)


def test_a_tool_call_that_is_cut_off_is_flagged(tiny):
    params = SamplingParams(temperature=1, max_tokens=9, logits_processor=writing(tiny, CALL))
    result = tiny.chat(QUESTION, params, tools=TOOLS)
    assert (result.finish_reason, result.tool_calls) == ("length", [])
    assert result.answer == result.text
    assert result.malformed_tool_calls == [result.text.rstrip()]


def test_a_stream_gives_tool_calls_as_written_and_its_result_has_them_parsed(tiny):
    params = SamplingParams(temperature=1, max_tokens=200, logits_processor=writing(tiny, "See:\n" + CALL))
    chunks = list(tiny.stream_chat(QUESTION, params, tools=TOOLS))
    assert "".join(chunk.answer for chunk in chunks) == "See:\n" + CALL
    assert chunks[-1].result.tool_calls == [ToolCall("add", {"a": 17, "b": [25]})]
    assert chunks[-1].result.answer == "See:"


def test_a_regex_may_ask_for_a_tool_call(tiny):
    pattern = r'<tool_call>\n\{"name": "(add|sub)", "arguments": \{"a": [0-9]{1,3}\}\}\n</tool_call>'
    for seed in range(3):
        params = SamplingParams(temperature=HOT, top_k=0, top_p=1.0, seed=seed, regex=pattern, max_tokens=120)
        result = tiny.chat(QUESTION, params, enable_thinking=False, tools=TOOLS)
        assert re.fullmatch(pattern, result.text)
        [call] = result.tool_calls
        assert call.name in ("add", "sub")
        assert set(call.arguments) == {"a"}
        assert (result.answer, result.malformed_tool_calls) == ("", [])


# Ends of replies


def test_min_tokens_puts_off_ids_and_strings_that_end_a_reply(generator):
    free = generator.generate(PROMPT, replace(GREEDY, max_tokens=30, ignore_eos=True))
    first = free.token_ids[0]
    short = generator.generate(PROMPT, replace(GREEDY, stop_token_ids=[first]))
    assert (short.token_ids, short.finish_reason, short.stop_reason) == ([first], "stop", first)
    for n in (1, 3):
        later = generator.generate(PROMPT, replace(GREEDY, max_tokens=30, stop_token_ids=[first], min_tokens=n))
        assert first not in later.token_ids[:n] and len(later.token_ids) > n
        unending = generator.generate(PROMPT, replace(GREEDY, min_tokens=12))
        assert len(unending.token_ids) == 12 and unending.finish_reason == "length"
    text = generator.tokenizer.decode(free.token_ids[:1])
    passed = generator.generate(PROMPT, replace(GREEDY, ignore_eos=True, stop=[text], min_tokens=1))
    assert passed.text.startswith(text) and len(passed.token_ids) > 1


def test_stop_reason_names_what_the_caller_chose(tiny):
    params = SamplingParams(temperature=0, max_tokens=20)
    reply = tiny.chat(QUESTION, params, enable_thinking=False)
    assert (reply.text, reply.finish_reason, reply.stop_reason) == ("42", "stop", None)
    reply = tiny.chat(QUESTION, replace(params, stop=["z", "2"]), enable_thinking=False)
    assert (reply.text, reply.finish_reason, reply.stop_reason) == ("4", "stop", "2")
    (two,) = tiny.tokenizer.encode("2")
    for ignore_eos in (True, False):
        of_id = replace(params, stop_token_ids=[two], ignore_eos=ignore_eos)
        assert tiny.chat(QUESTION, of_id, enable_thinking=False).stop_reason == two
    assert tiny.chat(QUESTION, replace(params, max_tokens=1), enable_thinking=False).stop_reason is None


def test_min_tokens_is_refused_where_it_cannot_hold():
    with pytest.raises(ValueError, match=r"min_tokens must be at most max_tokens \(3\), got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)
    with pytest.raises(ValueError, match="min_tokens must be 0 with regex, got 1"):
        SamplingParams(regex="a", min_tokens=1)
    with pytest.raises(ValueError, match="min_tokens must be an integer from 0"):
        SamplingParams(min_tokens=-1)
    with pytest.raises(TypeError, match=r"SamplingParams\(min_tokens=\.\.\.\)"):
        SamplingParams(min_new_tokens=1)
