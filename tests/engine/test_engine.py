"""The engine's fast paths against each other and against the plain model: uncached = cached = compiled = batched."""

import random

import pytest
import torch
from conftest import engine_of, randomized, small_config

from qwen3fast import Generator, SamplingParams
from qwen3fast.engine import StepKind
from qwen3fast.kernels import cpu
from qwen3fast.scheduling.request import Request
from qwen3fast.scheduling.scheduler import Scheduler

MAX_SEQ_LEN = 300
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return randomized(small_config(max_position_embeddings=1024, eos_token_ids=()), seed=3)


@pytest.fixture(scope="module")
def compiled(model):
    """A compiled, warmed-up Generator; shared, because compiling takes a while."""
    with Generator(model, max_seq_len=MAX_SEQ_LEN, max_batch_size=3, compile=True) as generator:
        generator.warmup()
        yield generator


@pytest.fixture(scope="module")
def eager(model):
    with Generator(model, max_seq_len=MAX_SEQ_LEN, max_batch_size=3, compile=False) as generator:
        yield generator


def random_prompts(model, lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 128, 129, 255, 290])
def test_prefill_logits_equal_the_plain_model(model, length):
    [prompt] = random_prompts(model, [length])
    expected_V = model(torch.tensor([prompt]))[0, -1]
    engine = engine_of(model, positions=MAX_SEQ_LEN)
    torch.testing.assert_close(engine.prefill_whole(1, prompt)[0], expected_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 100])
def test_uncached_logits_equal_the_plain_model(model, length):
    [prompt] = random_prompts(model, [length])
    expected_V = model(torch.tensor([prompt]))[0, -1]
    torch.testing.assert_close(engine_of(model).logits_uncached(prompt)[0], expected_V, rtol=1e-4, atol=1e-4)


def test_decode_addresses_never_change(model):
    engine = engine_of(model)
    tensors = [*engine.cache.keys, *engine.cache.values, *vars(engine.state).values()]
    before = [t.data_ptr() for t in tensors]
    engine.prefill_whole(0, [1, 2, 3])
    engine.set_row(0, 3)
    for used in range(4, 10):
        engine.decode(1, used, StepKind())
    after = [*engine.cache.keys, *engine.cache.values, *vars(engine.state).values()]
    assert [t.data_ptr() for t in after] == before


def test_decode_leaves_empty_rows_where_they_are(model):
    engine = engine_of(model)
    engine.prefill_whole(1, [1, 2, 3])
    engine.set_row(1, 3)
    engine.decode(2, 4, StepKind())
    assert engine.state.position_R.tolist() == [-1, 4, -1]


@pytest.mark.parametrize(("cache_dtype", "compile"), [(torch.float32, False), (torch.int8, False), (torch.int8, True)])
def test_empty_rows_leave_what_they_hold_as_it_is(model, cache_dtype, compile):
    """They write to the last position, which nothing reads: one past those that a bucket can hold."""
    engine, rng = engine_of(model, 3, 128, cache_dtype, compile), torch.Generator().manual_seed(0)
    cache = engine.cache
    for tensor in cache.tensors():
        tensor.copy_((100 * torch.randn(tensor.shape, generator=rng)).clamp(-127, 127))
    before = [tensor.clone() for tensor in cache.tensors()]
    engine.set_row(1, 120)
    for used in range(121, 129):  # to the end of the cache
        engine.decode(3, used, StepKind())
    is_new = torch.zeros(3, 129, dtype=torch.bool)
    is_new[1, 120:128] = is_new[[0, 2], 128] = True
    for tensor, old in zip(cache.tensors(), before, strict=True):
        assert torch.equal(tensor.transpose(1, 2)[~is_new], old.transpose(1, 2)[~is_new])
        assert (tensor.transpose(1, 2)[is_new] != old.transpose(1, 2)[is_new]).any(dim=1).all()
    assert engine.state.position_R.tolist() == [-1, 128, -1]


def test_reused_row_does_not_remember_the_request_before(model):
    long, short = random_prompts(model, [200, 20])
    generator = Generator(model, max_seq_len=MAX_SEQ_LEN, compile=False)
    fresh = generator.generate(short, SamplingParams(max_tokens=30)).token_ids
    generator.generate(long, SamplingParams(max_tokens=30))
    for tensor in (*generator.debug.engine.cache.keys, *generator.debug.engine.cache.values):
        tensor += 100 * torch.randn_like(tensor)  # whatever is left over must not be seen
    assert generator.generate(short, SamplingParams(max_tokens=30)).token_ids == fresh


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 5])
def test_batch_buckets_hold_every_batch(model, max_batch_size):
    engine = engine_of(model, rows=max_batch_size)
    for num_rows in range(1, max_batch_size + 1):
        assert num_rows <= engine.batch_bucket(num_rows) <= max_batch_size
        assert engine.batch_bucket(num_rows) in engine.batch_buckets()


@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_warmup_reports_as_often_as_it_says(model, max_batch_size):
    engine, parts = engine_of(model, rows=max_batch_size), []
    engine.warmup(parts.append)
    assert len(parts) == len(set(parts)) == engine.num_warmup_parts()
    assert f"decode step, batch {max_batch_size}" in parts


def test_greedy_tokens_are_the_same_in_every_mode(model, eager, compiled):
    prompts = random_prompts(model, [1, 7, 40, 120, 200], seed=1)  # one passes 128 positions in its reply
    params = SamplingParams(temperature=0, max_tokens=16)
    reference = [eager.generate(p, params, use_cache=False).token_ids for p in prompts]
    assert len({tuple(ids) for ids in reference}) == len(prompts)
    assert [eager.generate(p, params).token_ids for p in prompts] == reference
    assert [r.token_ids for r in eager.generate(prompts, params)] == reference
    assert [compiled.generate(p, params).token_ids for p in prompts] == reference
    assert [r.token_ids for r in compiled.generate(prompts, params)] == reference


def test_int8_cache_gives_the_same_tokens_in_every_mode(model, eager):
    prompts = random_prompts(model, [1, 40, 200, 120], seed=1)
    params = SamplingParams(temperature=20.0, seed=0, max_tokens=40)  # these weights are sure of themselves
    plain = [eager.generate(p, params) for p in prompts]
    sizes = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": 3, "kv_cache_dtype": "int8"}
    results = []
    for compile in (False, True):
        with Generator(model, compile=compile, **sizes) as generator:
            results.append([generator.generate(p, params).token_ids for p in prompts])
            results.append([r.token_ids for r in generator.generate(prompts, params)])
            assert generator.stats.kv_cache_bytes < eager.stats.kv_cache_bytes / 2
    assert all(result == results[0] for result in results)
    assert results[0] != [r.token_ids for r in plain]  # rounding can be seen


def test_seeded_samples_are_the_same_in_every_mode(model, eager, compiled):
    prompts = random_prompts(model, [3, 50, 140, 20], seed=2)
    params = [SamplingParams(1.0, 20, 0.9, seed=i, max_tokens=12) for i in range(4)]
    reference = [eager.generate(p, s).token_ids for p, s in zip(prompts, params, strict=True)]
    assert [r.token_ids for r in eager.generate(prompts, params)] == reference
    assert [r.token_ids for r in compiled.generate(prompts, params)] == reference
    assert [compiled.generate(p, s).token_ids for p, s in zip(prompts, params, strict=True)] == reference
    uncached = [eager.generate(p, s, use_cache=False).token_ids for p, s in zip(prompts, params, strict=True)]
    assert uncached == reference


def test_nothing_compiles_after_warmup(model, compiled):
    compilations = compiled.stats.compilations
    assert compilations > 0
    rng = random.Random(5)
    for round_ in range(12):
        prompts = random_prompts(model, [rng.randint(1, 280) for _ in range(rng.randint(1, 5))], seed=round_)
        params = [
            SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.5]),
                top_k=rng.choice([0, 1, 20, 64, 65, 1000]),
                top_p=rng.choice([0.5, 1.0]),
                min_p=rng.choice([0.0, 0.1]),
                max_tokens=rng.randint(1, 20),
                prompt_logprobs=rng.choice([None, 2]),
            )
            for _ in prompts
        ]
        with torch.compiler.set_stance("fail_on_recompile"):  # in all threads
            compiled.generate(prompts, params)
            compiled.score(prompts[0], [[1], [2, 3]])
    assert compiled.stats.compilations == compilations


def test_uncached_mode_compiles_once_for_all_lengths(model):
    engine = engine_of(model, positions=MAX_SEQ_LEN, compile=True)
    engine.logits_uncached([1])
    compilations = engine.compiler.compilations
    for length in (2, 16, 17, 96, 128, 299):
        [prompt] = random_prompts(model, [length])
        expected_V = model(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(engine.logits_uncached(prompt)[0], expected_V, rtol=1e-4, atol=1e-4)
    assert engine.compiler.compilations == compilations


@pytest.mark.parametrize("cxx", [None, "/nonexistent/g++", "ccache g++", "/bin/false"])
def test_missing_cpp_compiler_falls_back_with_a_warning(model, monkeypatch, tmp_path, cxx):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for name in ["clang++", *(["g++"] if cxx else [])]:  # which torch.compile does not ask
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    with (
        pytest.warns(UserWarning, match=r"no C\+\+ compiler found that works \(tried .*apt-get install g\+\+"),
        Generator(model, max_seq_len=64, compile=True) as generator,
    ):
        assert len(generator.generate([1, 2], SamplingParams(max_tokens=3)).token_ids) == 3
        assert generator.stats.compilations == 0


@pytest.mark.skipif(not cpu.load(), reason="no C++ operations here")
def test_models_that_run_in_cpp_need_no_compiler(monkeypatch, recwarn):
    monkeypatch.setattr("qwen3fast.engine.compile._has_cpp_compiler", lambda: False)
    with Generator.from_pretrained("tiny", dtype="bfloat16", max_seq_len=64, compile=True) as generator:
        assert generator.generate(list(range(1, 40)), SamplingParams(max_tokens=3)).token_ids
    assert not [str(warning.message) for warning in recwarn]


def test_scheduler_gives_a_freed_row_to_the_next_request(model):
    engine = engine_of(model, rows=2)
    scheduler = Scheduler(engine)
    requests = [Request([1, 2, i], max_tokens=n) for i, n in enumerate([2, 30, 5, 5])]
    for request in requests:
        scheduler.add(request)
    order = []
    while any(r.finish_reason is None for r in requests):
        scheduler.step()
        assert len(scheduler.active) <= 2
        order += [i for i, r in enumerate(requests) if r.finish_reason and i not in order]
    assert order == [0, 2, 3, 1]
    assert [len(r.output_ids) for r in requests] == [2, 30, 5, 5]


def test_scheduler_cancel_frees_the_row_at_once(model):
    scheduler = Scheduler(engine_of(model, rows=1))
    running, waiting = (Request([1, 2], max_tokens=50) for _ in range(2))
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.step()
    scheduler.cancel(running)
    assert (running.finish_reason, running.slot in scheduler.active) == ("cancelled", False)
    scheduler.step()
    assert waiting.output_ids
