"""Generator on a small random model: arguments, errors, streams, and staying usable after trouble."""

import asyncio
import copy
import pickle
import signal
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import randomized, slow_steps, small_config

from qwen3fast import ChatSession, Embedder, Generator, RequestMetrics, SamplingParams, load_model
from qwen3fast.model.yarn import Yarn
from qwen3fast.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=12)
LONG = SamplingParams(temperature=0, max_tokens=150)


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1, "max_position_embeddings": 512}
    config = small_config(**sizes, eos_token_ids=())
    return randomized(config, seed=1)


@pytest.fixture
def generator(model, tokenizer):
    with Generator(model, tokenizer, max_seq_len=200, max_batch_size=2, compile=False) as generator:
        yield generator


def test_generate_gives_one_result_for_one_prompt(generator):
    assert len(generator.generate("hello", GREEDY).token_ids) == 12


def test_generate_gives_results_in_the_order_of_the_prompts(generator):
    prompts = ["a", "the dog", [1, 2, 3], "the dog", "zebra"]
    together = generator.generate(prompts, GREEDY)
    assert [r.token_ids for r in together] == [generator.generate(p, GREEDY).token_ids for p in prompts]


def test_replies_one_after_another_are_warned_of(model, tokenizer):
    with Generator(model, tokenizer, max_seq_len=200, compile=False) as generator:
        with pytest.warns(UserWarning, match=r"2 replies run one after another; .*max_batch_size=8") as caught:
            generator.generate("a", GREEDY)
            generator.generate(["a", "b"], GREEDY)
            generator.generate("a", replace(GREEDY, n=2))
        assert [warning.filename for warning in caught] == [__file__] * 2
    with (
        Generator(model, tokenizer, max_seq_len=200, max_batch_size=2, compile=False) as generator,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        generator.generate(["a", "b", "c"], GREEDY)


def test_generate_of_no_prompts_is_no_results(generator):
    assert generator.generate([], GREEDY) == []


@pytest.mark.parametrize(
    "prompts",
    [lambda: (p for p in ("a", "b")), lambda: np.array(["a", "b"]), lambda: ("a", "b"), lambda: iter(["a", "b"])],
)
def test_generate_reads_an_iterable_of_prompts_once(generator, prompts):
    expected = [r.token_ids for r in generator.generate(["a", "b"], GREEDY)]
    assert [r.token_ids for r in generator.generate(prompts(), GREEDY)] == expected


@pytest.mark.parametrize("form", [iter, tuple, np.array, torch.tensor])
def test_ids_of_any_form_are_the_same_prompt(generator, form):
    expected = generator.generate([1, 2, 3], GREEDY).token_ids
    assert generator.generate(form([1, 2, 3]), GREEDY).token_ids == expected
    assert list(generator.stream(form([1, 2, 3]), GREEDY))[-1].result.token_ids == expected
    assert generator.submit(form([1, 2, 3]), GREEDY).result().token_ids == expected
    assert generator.generate([form([1, 2, 3]), "x"], GREEDY)[0].token_ids == expected


def test_max_tokens_of_the_preset_is_a_default_that_refuses_nothing(model, generator, monkeypatch):
    preset = replace(generator.default_params, max_tokens=7)
    monkeypatch.setattr(SamplingParams, "from_generation_config", lambda config: preset)
    with Generator(model, max_seq_len=200, compile=False) as generator:
        assert len(generator.generate([5] * 10).token_ids) == 7
        assert len(generator.generate([5] * 196).token_ids) == 4
        assert len(generator.generate([5] * 10, SamplingParams(max_tokens=9)).token_ids) == 9


def test_generate_takes_params_for_each_prompt(generator):
    results = generator.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5)])
    assert [len(r.token_ids) for r in results] == [2, 5]


def test_generate_fills_the_context_without_max_tokens(generator):
    result = generator.generate([5] * 150, SamplingParams())
    assert (len(result.token_ids), result.finish_reason) == (50, "length")


def test_result_text_is_the_decoded_ids(generator):
    result = generator.generate("hello", GREEDY)
    assert result.text == generator.tokenizer.decode(result.token_ids, skip_special_tokens=True)


def test_metrics_count_tokens_and_time(generator):
    metrics = generator.generate([1] * 30, GREEDY).metrics
    assert (metrics.prompt_tokens, metrics.new_tokens) == (30, 12)
    assert 0 < metrics.prefill_s <= metrics.time_to_first_token_s
    assert metrics.prefill_s == pytest.approx(metrics.time_to_first_token_s - metrics.queue_s)
    assert metrics.prefill_tok_s == pytest.approx(30 / metrics.prefill_s)
    assert metrics.decode_tok_s == pytest.approx(11 / metrics.decode_s)


def test_prefill_tok_s_counts_computed_tokens_only():
    times = {"queue_s": 1.0, "time_to_first_token_s": 1.5, "prefill_s": 0.5, "decode_s": 2.0}
    metrics = RequestMetrics(prompt_tokens=30, new_tokens=4, reused_tokens=10, **times)
    assert metrics.prefill_tok_s == 40
    assert replace(metrics, prefill_s=0.0).prefill_tok_s == 0


def test_queue_s_lasts_until_a_slot_is_free(model):
    second_waits = threading.Event()

    def wait(logits_V, output_T):
        assert second_waits.wait(60)
        return logits_V

    with Generator(model, max_seq_len=64, compile=False) as generator:
        first = generator.submit([1, 2], replace(GREEDY, logits_processor=wait))
        second = generator.submit([3], GREEDY)
        second_waits.set()
        waited_s = second.result().metrics.queue_s
    assert waited_s >= first.request.finished_s - second.request.submitted_s > 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([[]], "the prompt is empty"),
        ([[1], [0, 10**6]], r"^prompts\[1\]: token id 1000000 is outside the vocabulary"),
        (["a", "b" * 500, "c"], r"^prompts\[1\]: prompt \(\d+ tokens\) \+ max_tokens"),
        ([[-1]], "token id -1 is outside the vocabulary"),
        ([None], r"a prompt must be a string or token ids .*, got prompts\[0\] of type NoneType"),
        (None, "a prompt must be a string or token ids .*, got prompts of type NoneType"),
        ([["a", "b"]], "a prompt must be a string or token ids .*, got str among its token ids"),
        ([[1.5]], "got float among its token ids"),
        ({"prompt": "x"}, "got prompts of type dict"),
        ("hi \ud83d", "lone surrogate"),
    ],
)
def test_generate_refuses_bad_prompts(generator, prompt, message):
    with pytest.raises(ValueError, match=message):
        generator.generate(prompt, GREEDY)
    assert generator.generate("still works", GREEDY).token_ids


def test_a_score_does_not_advise_to_cut(model, tokenizer):
    with Generator(model, tokenizer, max_seq_len=16, compile=False) as generator:
        for pair in (("a" * 10**5, "b"), ("a", "b" * 10**5)):
            with pytest.raises(ValueError, match=r"\(100,000 characters\) has more than 16 tokens; shorten it$"):
                generator.score(*pair)


def test_an_eos_token_outside_the_models_vocabulary_does_not_count(tokenizer):
    pytest.importorskip("llguidance")
    [end] = tokenizer.eos_ids
    model = randomized(small_config(vocab_size=end, num_hidden_layers=1, eos_token_ids=(3,)))
    with Generator(model, tokenizer, max_seq_len=64, compile=False) as generator:
        assert generator.generate([5], SamplingParams(regex="a")).finish_reason == "stop"


def test_the_tokenizers_eos_token_ends_replies_where_no_config_names_one(model, tokenizer):
    config = replace(model.config, eos_token_ids=())
    [end] = tokenizer.eos_ids
    assert tokenizer.decode([end]) == tokenizer.special_tokens["eos_token"] == "<|im_end|>"

    def force(logits, output):
        return logits.index_fill(0, torch.tensor(end), 100.0 if len(output) == 2 else -100.0)

    with Generator(randomized(config, seed=1), tokenizer, max_seq_len=64, compile=False) as generator:
        result = generator.generate("hello", replace(GREEDY, logits_processor=force))
    assert (len(result.token_ids), result.finish_reason) == (3, "stop")


def test_requests_that_fail_together_keep_tracebacks_of_their_own(model):
    with Generator(model, max_seq_len=64, compile=False) as generator:
        begun = threading.Event()

        def wait(logits_V, output_T):
            begun.set()
            time.sleep(0.01)
            return logits_V

        generator.submit([1], replace(GREEDY, max_tokens=50, logits_processor=wait))
        waiting = [generator.submit([1], GREEDY) for _ in range(5)]
        assert begun.wait(60)
    depths = []
    for handle in waiting:
        with pytest.raises(RuntimeError, match="closed") as caught:
            handle.result()
        depths.append(len(caught.traceback))
    assert len(set(depths)) == 1


def test_generate_refuses_too_few_params(generator):
    with pytest.raises(ValueError, match="got 1 SamplingParams for 2 prompts"):
        generator.generate(["a", "b"], [GREEDY])


def test_overflow_is_refused_with_the_arithmetic(generator):
    message = r"prompt \(190 tokens\) \+ max_tokens \(20\) = 210 exceeds max_seq_len 200.*to 210"
    with pytest.raises(ValueError, match=message):
        generator.generate([1] * 190, SamplingParams(max_tokens=20))


def test_overflow_cut_shortens_the_reply_first(generator):
    result = generator.generate([1] * 140, SamplingParams(max_tokens=90), on_overflow="cut")
    assert (result.metrics.prompt_tokens, len(result.token_ids)) == (140, 60)
    result = generator.generate([1] * 199, SamplingParams(max_tokens=90), on_overflow="cut")
    assert (result.metrics.prompt_tokens, len(result.token_ids)) == (150, 50)


def test_overflow_cut_keeps_the_newest_tokens_of_a_long_prompt(generator):
    ids = [i % 90 for i in range(300)]
    cut = generator.generate(ids, SamplingParams(temperature=0, max_tokens=20), on_overflow="cut")
    assert cut.token_ids == generator.generate(ids[-180:], SamplingParams(temperature=0, max_tokens=20)).token_ids


def test_overflow_cut_is_the_same_in_every_method(generator):
    ids, params = [i % 90 for i in range(300)], SamplingParams(temperature=0, max_tokens=20)
    expected = generator.generate(ids, params, on_overflow="cut").token_ids

    async def streamed() -> list[int]:
        return [i async for chunk in generator.astream(ids, params, on_overflow="cut") for i in chunk.token_ids]

    assert generator.submit(ids, params, on_overflow="cut").result().token_ids == expected
    assert [i for chunk in generator.stream(ids, params, on_overflow="cut") for i in chunk.token_ids] == expected
    assert asyncio.run(streamed()) == expected
    for method in (generator.submit, generator.stream):
        with pytest.raises(ValueError, match="exceeds max_seq_len"):
            method(ids, params)


def test_overflow_cut_is_passed_on_by_chats():
    messages, params = [{"role": "user", "content": "word " * 80}], SamplingParams(temperature=0, max_tokens=4)
    with Generator.from_pretrained("tiny", max_seq_len=64, compile=False) as generator:
        with pytest.raises(ValueError, match="exceeds max_seq_len"):
            generator.chat(messages, params, enable_thinking=False)
        *_, last = generator.stream_chat(messages, params, enable_thinking=False, on_overflow="cut")
        whole = generator.chat(messages, params, enable_thinking=False, on_overflow="cut")
    assert (whole.metrics.prompt_tokens, last.result.token_ids) == (60, whole.token_ids)


def test_overflow_cut_needs_room_for_a_reply(model):
    with (
        Generator(model, max_seq_len=1, compile=False) as generator,
        pytest.raises(ValueError, match="max_seq_len 1 leaves no room for a reply"),
    ):
        generator.generate([1, 2], GREEDY, on_overflow="cut")


def test_unknown_overflow_is_refused(generator):
    with pytest.raises(ValueError, match="on_overflow must be 'error' or 'cut', got 'drop'"):
        generator.generate([1], GREEDY, on_overflow="drop")


METHODS = [getattr(Generator, name) for name in ("generate", "stream", "submit", "astream", "chat", "stream_chat")]


@pytest.mark.parametrize("method", [*METHODS, ChatSession.send, ChatSession.stream], ids=lambda m: m.__qualname__)
def test_a_field_of_sampling_params_as_a_keyword_is_told_where_it_belongs(method):
    name, instead = method.__name__, r"pass SamplingParams\(max_tokens=\.\.\., seed=\.\.\.\)"
    with pytest.raises(TypeError, match=rf"^{name}\(\) takes no keyword max_tokens or seed; {instead}$"):
        method(None, "hello", max_tokens=5, seed=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_len'"):
        method(None, "hello", max_len=5)
    instead = r"pass SamplingParams\(max_tokens=\.\.\., temperature=\.\.\.\)"
    with pytest.raises(TypeError, match=rf"^{name}\(\) takes no keyword max_new_tokens or do_sample; {instead}$"):
        method(None, "hello", max_new_tokens=5, do_sample=False)


def test_a_name_instead_of_a_model_is_told_where_it_belongs():
    with pytest.raises(TypeError, match=r"^model must be a Qwen3, got 'tiny'; from_pretrained takes names"):
        Generator("tiny")


def test_generators_are_not_pickled_or_copied(generator):
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"cannot be pickled or copied; pass the arguments of .*from_pretrained"):
            copied(generator)


MAKERS = [Generator, Generator.from_pretrained, load_model, ChatSession, Embedder.from_pretrained]


def test_no_max_seq_len_is_advised_that_the_model_cannot_have(model):
    longest = model.config.longest_context
    with Generator(model, max_seq_len=64, compile=False) as generator:
        for prompt, is_possible in (([1] * (longest - 1), True), ([1] * longest, False)):
            with pytest.raises(ValueError, match=f"= {len(prompt) + 1} exceeds max_seq_len 64") as error:
                generator.generate(prompt)
            assert ("set max_seq_len" in str(error.value)) is is_possible
            assert (f"(of at most {longest} for this model)" in str(error.value)) is not is_possible
            with pytest.raises(ValueError, match="exceeds max_seq_len 64; shorten one") as error:
                generator.score(prompt[:-1], [1])
            assert ("set max_seq_len" in str(error.value)) is is_possible


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__qualname__)
def test_a_field_of_sampling_params_is_not_for_what_loads_a_model(make):
    instead = r"generate\(prompt, SamplingParams\(temperature=\.\.\., top_k=\.\.\.\)\)"
    message = rf"^{make.__name__}\(\) takes no keyword temperature or top_k; only requests .*: {instead}$"
    with pytest.raises(TypeError, match=message):
        make("tiny", temperature=0, top_k=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_len'"):
        make("tiny", max_len=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_length'; the options are max_seq_len, "):
        Generator.from_pretrained("tiny", max_length=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_model_len'; use max_seq_len"):
        Generator.from_pretrained("tiny", max_model_len=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'adapter'"):
        Embedder.from_pretrained("tiny", adapter="folder")


def test_max_seq_len_beyond_the_model_is_refused(model):
    with pytest.raises(ValueError, match="max_seq_len 513 exceeds the model's max_position_embeddings 512"):
        Generator(model, max_seq_len=513)


def test_max_seq_len_may_go_as_far_as_yarn_reaches(model):
    stretched = randomized(replace(model.config, yarn=Yarn(2.0, 512)), seed=1)
    with Generator(stretched, max_seq_len=1024, compile=False) as generator:
        ids = [i % 90 for i in range(700)]
        cached, plain = (generator.generate(ids, GREEDY, use_cache=use).token_ids for use in (True, False))
    assert cached == plain
    with pytest.raises(ValueError, match=r"exceeds .* 1024 \(stretched by YaRN\); choose at most that"):
        Generator(stretched, max_seq_len=1025)


def test_stop_token_ends_the_reply(generator):
    ids = generator.generate("hello", GREEDY).token_ids
    stop = ids[5]
    result = generator.generate("hello", SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop]))
    assert result.token_ids == ids[: ids.index(stop) + 1]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize(("number", "is_eos"), [(0, True), (1, True), (2, True), (3, True), (4, False)])
def test_every_eos_id_of_both_configs_stops_and_no_other(model, tokenizer, generator, number, is_eos):
    plain = generator.generate("hello", GREEDY).token_ids
    unused = [token for token in range(tokenizer.vocab_size) if token not in plain]
    of_config, of_preset, forced = tuple(unused[:2]), unused[2:4], unused[number]

    def force(logits, output):
        if len(output) == 3:
            logits = torch.full_like(logits, -torch.inf)
            logits[forced] = 0
        return logits

    ending = randomized(replace(model.config, eos_token_ids=of_config), seed=1)
    preset = {"eos_token_id": of_preset}
    with Generator(ending, tokenizer, generation_config=preset, max_seq_len=64, compile=False) as generator:
        result = generator.generate("hello", replace(GREEDY, logits_processor=force))
        ignoring = generator.generate("hello", replace(GREEDY, logits_processor=force, ignore_eos=True))
    assert result.token_ids[:4] == ignoring.token_ids[:4] == [*plain[:3], forced]
    assert (len(result.token_ids), result.finish_reason) == ((4, "stop") if is_eos else (12, "length"))
    assert len(ignoring.token_ids) == 12


def test_stop_string_is_cut_off(generator):
    text = generator.generate("hello", GREEDY).text
    stop = text[4:7]
    result = generator.generate("hello", SamplingParams(temperature=0, max_tokens=12, stop=stop))
    assert result.text == text[: text.index(stop)]
    assert result.finish_reason == "stop"


def test_preset_of_the_checkpoint_is_the_default(model):
    preset = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    params = Generator(model, generation_config=preset, max_seq_len=64, compile=False).default_params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.6, 20, 0.95, 0.0)


def test_default_without_a_preset_is_greedy(model):
    assert Generator(model, max_seq_len=64, compile=False).default_params.temperature == 0


def test_stream_chunks_join_to_the_result(generator):
    chunks = list(generator.stream("hello", GREEDY))
    expected = generator.generate("hello", GREEDY)
    assert "".join(c.text for c in chunks) == expected.text == chunks[-1].result.text
    assert [i for c in chunks for i in c.token_ids] == expected.token_ids
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_abandoned_stream_frees_its_slot(generator):
    with slow_steps(generator):
        stream = generator.stream("hello", LONG)
        next(stream)
        assert generator.stats.slots_in_use == 1
        stream.close()
    assert generator.stats.slots_in_use == 0


def test_streams_may_be_interleaved(generator):
    alone = [generator.generate(p, GREEDY).token_ids for p in ("one", "two", "three")]
    streams = [generator.stream(p, GREEDY) for p in ("one", "two", "three")]
    seen = [[], [], []]
    running = [True] * 3
    while any(running):
        for i, stream in enumerate(streams):
            chunk = next(stream, None)
            running[i] = chunk is not None
            seen[i] += chunk.token_ids if chunk else []
    assert seen == alone


def test_generate_may_be_called_from_threads(generator):
    expected = [generator.generate([i, 5, 9], GREEDY).token_ids for i in range(6)]
    results = [None] * 6

    def work(i):
        results[i] = generator.generate([i, 5, 9], GREEDY).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_nan_logits_raise_and_leave_the_generator_usable(tokenizer):
    config = small_config(vocab_size=tokenizer.vocab_size, tie_word_embeddings=False, eos_token_ids=())
    model = randomized(config, seed=2)
    # Without reuse: what was computed with other weights must not be gone on from.
    with Generator(model, max_seq_len=64, max_batch_size=2, compile=False, prefix_reuse=False) as generator:
        before = generator.generate([1, 2], GREEDY).token_ids
        good = model.lm_head.weight.clone()
        model.lm_head.weight[5] = float("nan")
        with pytest.raises(FloatingPointError, match="logits are NaN or infinite at token 0"):
            generator.generate([1, 2], GREEDY)
        model.lm_head.weight.copy_(good)
        assert generator.generate([1, 2], GREEDY).token_ids == before


def test_interrupted_generate_frees_its_slots(generator, monkeypatch):
    calls = []
    launch = generator.debug.engine.launch

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return launch(*args)

    monkeypatch.setattr(generator.debug.engine, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generator.generate(["a", "b", "c"], GREEDY)
    assert (generator.stats.slots_in_use, generator.stats.waiting) == (0, 0)


def test_closed_generator_says_so(model):
    generator = Generator(model, max_seq_len=64, compile=False)
    generator.close()
    generator.close()
    with pytest.raises(RuntimeError, match="this Generator is closed"):
        generator.generate([1], GREEDY)


def test_closing_ends_a_running_stream(model):
    generator = Generator(model, max_seq_len=64, compile=False)
    with slow_steps(generator):
        stream = generator.stream([1], replace(LONG, max_tokens=60))
        next(stream)
        generator.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)


def test_text_prompt_without_a_tokenizer_is_refused(model):
    generator = Generator(model, max_seq_len=64, compile=False)
    with pytest.raises(ValueError, match="no tokenizer; pass the prompt as a list of token ids"):
        generator.generate("hello")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generator.generate([1], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match="this model has no tokenizer, so it cannot chat"):
        generator.chat([{"role": "user", "content": "Hi"}])


def test_greedy_thinking_warns_once(generator):
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.warns(UserWarning, match=r"greedy decoding .* with reasoning .*\(no --think\)") as caught:
        generator.chat(messages, GREEDY)
    assert caught[0].filename == __file__  # the line that calls chat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: pytest.fail("warned twice"))
        generator.chat(messages, GREEDY)


def test_greedy_decoding_warns_where_the_template_opens_the_reasoning(model, tokenizer):
    always = Tokenizer(tokenizer.base, chat_template="{{ messages[0].content }}<think>\n")
    generator = Generator(model, always, max_seq_len=64, compile=False)
    with pytest.warns(UserWarning, match="with reasoning .*, for Qwen3 temperature 0.6, top_p 0.95, top_k 20$"):
        generator.render([{"role": "user", "content": "Hi"}], enable_thinking=False)


def test_chat_without_a_template_is_refused(model, tokenizer):
    bare = Generator(model, Tokenizer(tokenizer.base), max_seq_len=64, compile=False)
    with pytest.raises(ValueError, match="no chat template"):
        bare.chat([{"role": "user", "content": "Hi"}])


def test_warmup_is_refused_while_requests_run(generator):
    stream = generator.stream("hello", LONG)
    with slow_steps(generator), pytest.raises(RuntimeError, match="needs all slots empty"):
        next(stream)
        generator.warmup()


def test_unknown_quantization_is_refused_by_name():
    formats = "int8, int4, uint4, fp8, int6, uint5, nl4, lossless"
    with pytest.raises(ValueError, match=f"quantization='fp3' is not supported; supported: {formats}, or None"):
        Generator.from_pretrained("tiny", quantization="fp3")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("no/such/folder/here", FileNotFoundError, "no folder 'no/such/folder/here'"),
        ("random:9b", ValueError, "unknown Qwen3 shape '9b'; known shapes: 0.6b"),
        ("random:0.6b:x", ValueError, "the seed must be a whole number"),
    ],
)
def test_from_pretrained_names_a_bad_source(source, error, message):
    with pytest.raises(error, match=message):
        Generator.from_pretrained(source)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="sees no CUDA device"):
        Generator.from_pretrained("tiny", device="cuda")


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_an_application_change_no_reply(model, tokenizer, setting):
    params = [
        SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=5),
        SamplingParams(temperature=0, repetition_penalty=1.3, logit_bias={5: 0.123}, logprobs=2, max_tokens=5),
    ]

    def replies(use_cache):
        with Generator(model, tokenizer, max_seq_len=99, compile=False, kv_cache_dtype="int8") as generator:
            results = generator.generate(["a", "the dog"], params, use_cache=use_cache)
            return [(result.token_ids, result.logprobs) for result in results]

    for use_cache in (True, False):
        expected = replies(use_cache)
        with SETTINGS[setting]():
            assert replies(use_cache) == expected


def test_a_model_loaded_in_inference_mode_is_used_outside_of_it():
    with torch.inference_mode():
        model = load_model("tiny", "cpu")
    assert not any(parameter.is_inference() for parameter in model.parameters())
