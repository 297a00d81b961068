"""ChatSession on tiny: the replies of Generator.chat, or all that was computed used again; failures leave no trace."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from conftest import Gate, randomized, small_config

from qwen3fast import ChatSession, Generator, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore:greedy decoding")

GREEDY = SamplingParams(temperature=0, max_tokens=60, thinking_budget=8)
NATURAL = replace(GREEDY, thinking_budget=None)  # the model ends its reasoning itself, which takes longer
QUESTIONS = ["What is 17 + 25?", "Copy: red fox hill", "Count from 5 to 9.", "What is the capital of France?"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tiny(request):
    """With three rows, where a test does not ask for others."""
    rows = getattr(request, "param", 3)
    with Generator.from_pretrained("tiny", dtype="float32", max_batch_size=rows, compile=False) as generator:
        yield generator


one_row_or_three = pytest.mark.parametrize("tiny", [1, 3], indirect=True, ids=["1 row", "3 rows"])


@pytest.fixture(scope="module")
def alone():
    """Takes nothing over from earlier requests."""
    with Generator.from_pretrained("tiny", dtype="float32", compile=False, prefix_reuse=False) as generator:
        yield generator


@pytest.fixture
def prompts(tiny, monkeypatch):
    """Prompts of all turns, as ids."""
    seen, build = [], tiny._builder.build_one

    def noting(prompt, *arguments, **options):
        seen.append(prompt)
        return build(prompt, *arguments, **options)

    monkeypatch.setattr(tiny._builder, "build_one", noting)
    return seen


def turns(session, params=GREEDY, questions=QUESTIONS[:3]):
    return [session.send(question, params) for question in questions]


def user(content):
    return {"role": "user", "content": content}


def assert_same_reply(result, expected):
    """All but the figures is the same."""
    assert replace(result, metrics=None) == replace(expected, metrics=None)


# Mode "exact"


@one_row_or_three
@pytest.mark.parametrize("flag", [0, "no", None])  # which templates would read as True
def test_enable_thinking_must_be_a_bool(tiny, flag):
    with pytest.raises(ValueError, match="enable_thinking must be True or False, got"):
        tiny.chat([user(QUESTIONS[0])], GREEDY, enable_thinking=flag)
    assert tiny.render([user(QUESTIONS[0])], None, np.False_) == tiny.render([user(QUESTIONS[0])], None, False)


@pytest.mark.parametrize(("enable_thinking", "system"), [(True, None), (False, "Be brief.")])
def test_exact_turns_are_those_of_chat_on_the_same_messages(tiny, alone, enable_thinking, system):
    session = ChatSession(tiny, system=system, enable_thinking=enable_thinking)
    for number, question in enumerate(QUESTIONS[:3]):
        params = replace(NATURAL, temperature=0 if number % 2 else None, seed=number)
        messages = [*session.messages, user(question)]
        result = session.send(question, params)
        expected = alone.chat(messages, params, enable_thinking=enable_thinking)
        assert_same_reply(result, expected)
        assert result.metrics.prompt_tokens == expected.metrics.prompt_tokens
        assert bool(result.reasoning) == enable_thinking
    roles = ["system"] * (system is not None) + ["user", "assistant"] * 3
    assert [message["role"] for message in session.messages] == roles
    assert [m["content"] for m in session.messages if m["role"] == "user"] == QUESTIONS[:3]


def test_exact_turns_reuse_what_the_template_leaves_as_it_was(tiny, prompts):
    session = ChatSession(tiny, system="Be brief.")
    results = turns(session)
    for earlier, prompt, result in zip(prompts, prompts[1:], results[1:], strict=False):
        assert result.metrics.reused_tokens >= len(earlier) - 1
        assert prompt[: len(earlier)] == earlier


def test_messages_hold_thoughts_and_answers(tiny):
    session = ChatSession(tiny)
    result = session.send(QUESTIONS[0], replace(NATURAL, temperature=None, seed=1))
    assert session.messages == [
        user(QUESTIONS[0]),
        {"role": "assistant", "content": result.answer, "reasoning_content": result.reasoning},
    ]


def test_streamed_turns_are_the_same_as_sent_ones(tiny):
    session, streamed = ChatSession(tiny), ChatSession(tiny)
    for number, question in enumerate(QUESTIONS[:2]):
        params = replace(GREEDY, temperature=None, seed=number)
        chunks = list(streamed.stream(question, params))
        result = session.send(question, params)
        assert "".join(chunk.text for chunk in chunks) == result.text
        assert_same_reply(chunks[-1].result, result)
    assert session.messages == streamed.messages


# Mode "append"


@pytest.mark.parametrize(
    ("tiny", "enable_thinking", "system"), [(1, True, None), (3, False, "Be brief.")], indirect=["tiny"], ids=str
)
def test_append_turns_put_the_message_behind_all_that_is_there(tiny, alone, prompts, enable_thinking, system):
    session = ChatSession(tiny, system=system, enable_thinking=enable_thinking, mode="append")
    opening = [{"role": "system", "content": system}] if system else []
    expected = tiny.render([*opening, user(QUESTIONS[0])], NATURAL, enable_thinking)
    for number, question in enumerate(QUESTIONS[:3]):
        params = replace(NATURAL, temperature=None, seed=number)
        result = session.send(question, params)
        assert prompts[-1] == expected
        assert_same_reply(result, alone.generate(expected, params))
        assert bool(result.reasoning) == enable_thinking
        assert result.token_ids[-1:] == tiny.tokenizer.encode("<|im_end|>")
        behind = tiny.tokenizer.encode("\n") + tiny.render([user(QUESTIONS[number + 1])], params, enable_thinking)
        expected = [*prompts[-1], *result.token_ids, *behind]


@one_row_or_three
def test_append_turns_reuse_all_but_the_last_token(tiny, prompts):
    session = ChatSession(tiny, system="Nobody else says this.", mode="append")  # or more is there, from other tests
    results = turns(session, replace(GREEDY, temperature=None, seed=0))
    for earlier, before, result in zip(prompts, results, results[1:], strict=False):
        assert result.metrics.reused_tokens == len(earlier) + len(before.token_ids) - 1


def test_append_ends_the_turn_of_a_reply_that_max_tokens_cut_off(tiny, alone, prompts):
    session = ChatSession(tiny, system="Nor this.", mode="append", enable_thinking=False)
    first = session.send("Count from 5 to 9.", replace(GREEDY, max_tokens=3))
    assert first.finish_reason == "length"
    result = session.send(QUESTIONS[0], GREEDY)
    end_of_turn = tiny.tokenizer.encode("<|im_end|>\n")
    assert prompts[1] == [
        *prompts[0],
        *first.token_ids,
        *end_of_turn,
        *tiny.render([user(QUESTIONS[0])], GREEDY, False),
    ]
    assert result.metrics.reused_tokens == len(prompts[0]) + 3 - 1
    assert_same_reply(result, alone.generate(prompts[1], GREEDY))


def test_append_ends_the_turn_of_a_reply_that_a_stop_string_ended(tiny, prompts):
    session = ChatSession(tiny, mode="append", enable_thinking=False)
    first = session.send("Count from 5 to 9.", replace(GREEDY, stop="7"))
    assert (first.text, first.finish_reason) == ("5 6 ", "stop")
    session.send(QUESTIONS[0], GREEDY)
    assert prompts[1][: len(prompts[0]) + len(first.token_ids)] == [*prompts[0], *first.token_ids]
    assert tiny.tokenizer.decode(prompts[1][len(prompts[0]) :]).startswith("5 6 7<|im_end|>\n<|im_start|>user\n")


def test_append_reads_as_the_template_would_write_it_where_nothing_is_thought(tiny, prompts):
    """Then the modes differ in the empty thought alone, which the template writes before the last reply only."""
    session = ChatSession(tiny, mode="append", enable_thinking=False)
    turns(session)
    whole = tiny.tokenizer.apply_chat_template(session.messages[:-1], enable_thinking=False)
    empty = "<think>\n\n</think>\n\n"
    assert tiny.tokenizer.decode(prompts[-1]).replace(empty, "") == whole.replace(empty, "")


def test_append_refuses_a_template_that_renders_a_message_otherwise_alone(tokenizer):
    template = "{% for m in messages %}{{ loop.index }}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    config = small_config(vocab_size=tokenizer.vocab_size, eos_token_ids=())
    counting = type(tokenizer)(tokenizer.base, template)
    with Generator(randomized(config), counting, max_seq_len=128, compile=False) as generator:
        session = ChatSession(generator, mode="append")
        session.send("a", replace(GREEDY, max_tokens=3))
        messages = list(session.messages)
        with pytest.raises(ValueError, match=r"does not render a message alone as it does behind others.*mode 'exact'"):
            session.send("b", replace(GREEDY, max_tokens=3))
        assert session.messages == messages


# Turns that come to nothing


def failing(logits, output):
    """A logits_processor that raises at the third token."""
    if len(output) == 2:
        raise KeyError("mine")
    return logits


@pytest.mark.parametrize("mode", ["exact", "append"])
@pytest.mark.parametrize("turns_before", [0, 1])
def test_a_turn_that_fails_or_is_dropped_leaves_the_conversation_as_it_was(tiny, mode, turns_before):
    params = replace(GREEDY, temperature=None, seed=0)
    session, untroubled = ChatSession(tiny, mode=mode), ChatSession(tiny, mode=mode)
    for question in QUESTIONS[:turns_before]:
        session.send(question, params)
        untroubled.send(question, params)
    before = [dict(message) for message in session.messages]

    with pytest.raises(KeyError, match="mine"):
        session.send("Copy: this fails", replace(params, logits_processor=failing))
    assert session.messages == before
    with pytest.raises(ValueError, match="exceeds max_seq_len"):
        session.send("Copy: too long", SamplingParams(max_tokens=5000))
    with pytest.raises(ValueError, match="regular expression cannot be used"):
        session.send("Copy: bad pattern", SamplingParams(regex="("))
    with pytest.raises(ValueError, match="chat template cannot render"):
        session.send({"role": "user"}, params)
    with pytest.raises(ValueError, match="n is 2"):
        session.send("Copy: two of it", SamplingParams(n=2))
    assert session.messages == before

    gate = Gate(2)
    dropped = session.stream("Copy: this is dropped", replace(params, logits_processor=gate))
    next(dropped)
    gate.is_open.set()
    dropped.close()
    gate = Gate(2)
    for chunk in session.stream("Copy: this one, too", replace(params, logits_processor=gate)):
        assert chunk.result is None
        gate.is_open.set()
        break
    never_begun = session.stream("Copy: never begun", params)
    del never_begun
    assert session.messages == before
    assert tiny.stats.slots_in_use == 0

    assert_same_reply(session.send("What is 3 + 4?", params), untroubled.send("What is 3 + 4?", params))
    assert session.messages == untroubled.messages


def test_a_turn_counts_when_its_last_chunk_is_given(tiny):
    session = ChatSession(tiny, enable_thinking=False)
    for chunk in session.stream(QUESTIONS[0], GREEDY):
        assert bool(session.messages) == (chunk.result is not None)
    assert session.messages[-1] == {"role": "assistant", "content": "42"}


# Reset, roles, tools


@pytest.mark.parametrize(("mode", "system"), [("exact", "Be brief."), ("append", None), ("append", "Be brief.")])
def test_reset_forgets_all_but_the_system_message(tiny, prompts, mode, system):
    session = ChatSession(tiny, system=system, mode=mode)
    first = session.send(QUESTIONS[0], GREEDY)
    session.send(QUESTIONS[1], GREEDY)
    session.reset()
    assert session.messages == ([{"role": "system", "content": system}] if system else [])
    again = session.send(QUESTIONS[0], GREEDY)
    assert prompts[2] == prompts[0]
    assert_same_reply(again, first)


@pytest.mark.parametrize("mode", ["exact", "append"])
def test_the_system_message_comes_first(tiny, prompts, mode):
    session = ChatSession(tiny, system="Be brief.", mode=mode)
    session.send("Hi", GREEDY)
    assert tiny.tokenizer.decode(prompts[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def writing(tokenizer, text):
    """A logits_processor that makes the model write a text and end its turn."""
    ids = [*tokenizer.encode(text), *tokenizer.encode("<|im_end|>")]

    def force(logits, output):
        forced = logits - float("inf")
        forced[ids[len(output)]] = 0
        return forced

    return force


@pytest.mark.parametrize("mode", ["exact", "append"])
def test_tool_calls_and_their_results_are_part_of_the_conversation(tiny, alone, prompts, mode):
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": 25}}\n</tool_call>'
    session = ChatSession(tiny, tools=TOOLS, mode=mode, enable_thinking=False)
    params = replace(GREEDY, max_tokens=100, logits_processor=writing(tiny.tokenizer, call))
    result = session.send(QUESTIONS[0], params)
    assert result.tool_calls[0].arguments == {"a": 17, "b": 25}
    function = {"name": "add", "arguments": {"a": 17, "b": 25}}
    assert session.messages[1] == {
        "role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]
    }  # fmt: skip
    answer = session.send({"role": "tool", "content": "42"}, GREEDY)
    text = tiny.tokenizer.decode(prompts[1])
    assert text.startswith("<|im_start|>system\n# Tools\n<tools>")
    assert text.count("<tools>") == 1
    assert call in text
    tail = "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert text.removesuffix("<think>\n\n</think>\n\n").endswith(tail)
    assert session.messages[2] == {"role": "tool", "content": "42"}
    assert_same_reply(answer, alone.generate(prompts[1], GREEDY))
    if mode == "append":
        assert answer.metrics.reused_tokens == len(prompts[0]) + len(result.token_ids) - 1
    else:
        assert prompts[1] == tiny.render(session.messages[:-1], GREEDY, False, TOOLS)


def test_a_message_is_not_changed_by_the_session(tiny):
    message = user("Hi")
    session = ChatSession(tiny)
    session.send(message, GREEDY)
    session.send("Hello", GREEDY)
    assert message == user("Hi")


# Several sessions


@pytest.mark.parametrize(
    ("tiny", "mode"), [(1, "append"), (3, "append"), (3, "exact")], indirect=["tiny"], ids=str
)  # with one row in mode "exact": the next test
def test_alternating_sessions_do_not_see_each_other(tiny, mode):
    params = [replace(GREEDY, temperature=None, seed=seed) for seed in (1, 2)]
    orders = [QUESTIONS[:2], QUESTIONS[2:0:-1]]
    expected = []
    for each, questions in zip(params, orders, strict=True):
        expected.append(turns(ChatSession(tiny, mode=mode), each, questions))
    sessions = [ChatSession(tiny, mode=mode) for _ in range(2)]
    for number in range(2):
        for who, session in enumerate(sessions):
            result = session.send(orders[who][number], params[who])
            assert_same_reply(result, expected[who][number])
            if number and tiny.stats.max_batch_size > 1:  # with one row, each takes it from the other
                before = expected[who][number - 1]
                least = before.metrics.prompt_tokens - 1
                if mode == "append":
                    least += len(before.token_ids)
                assert result.metrics.reused_tokens >= least
    assert [m["content"] for m in sessions[0].messages[::2]] == orders[0]


@one_row_or_three
def test_sessions_in_threads_of_their_own_do_not_see_each_other(tiny):
    modes, questions = ["exact", "append"], QUESTIONS[:2]
    params = [replace(GREEDY, temperature=None, seed=seed) for seed in range(2)]
    expected = [turns(ChatSession(tiny, mode=mode), each, questions) for mode, each in zip(modes, params, strict=True)]
    results = {}

    def work(number):
        results[number] = turns(ChatSession(tiny, mode=modes[number]), params[number], questions)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        for result, other in zip(results[number], expected[number], strict=True):
            assert_same_reply(result, other)


def test_without_prefix_reuse_a_session_works_all_the_same(alone):
    params = replace(GREEDY, temperature=None, seed=3)
    session = ChatSession(alone)
    for question in QUESTIONS[:2]:
        messages = [*session.messages, user(question)]
        result = session.send(question, params)
        assert_same_reply(result, alone.chat(messages, params))
        assert result.metrics.reused_tokens == 0


# What cannot be


def test_an_unknown_mode_is_refused(alone):
    with pytest.raises(ValueError, match="mode must be 'exact' or 'append', got 'fast'"):
        ChatSession(alone, mode="fast")


def test_a_generator_that_cannot_chat_is_refused(tokenizer):
    model = randomized(small_config(vocab_size=tokenizer.vocab_size))
    for bare in (None, type(tokenizer)(tokenizer.base)):
        with (
            Generator(model, bare, max_seq_len=64, compile=False) as generator,
            pytest.raises(ValueError, match="no chat template, so it cannot chat"),
        ):
            ChatSession(generator)


def test_a_closed_generator_says_so():
    generator = Generator.from_pretrained("tiny", compile=False)
    session = ChatSession(generator)
    session.send("Hi", GREEDY)
    generator.close()
    messages = list(session.messages)
    with pytest.raises(RuntimeError, match="this Generator is closed"):
        session.send("Hi", GREEDY)
    assert session.messages == messages


@pytest.mark.parametrize("mode", ["exact", "append"])
def test_a_full_session_is_cut_where_this_is_asked_for(tiny, mode):
    session = ChatSession(tiny, mode=mode)
    session.send("caf\u00e9", GREEDY)
    long = "What is 17 + 25? " * (2 * tiny.max_seq_len) + "aaaaa"  # too long to be encoded
    for question in (QUESTIONS[0], long):
        with pytest.raises(ValueError, match="pass on_overflow='cut'"):
            session.send(long, GREEDY)
        result = session.send(question, GREEDY, on_overflow="cut")
        assert result.token_ids and session.messages[-2]["content"] == question
    assert session.send(QUESTIONS[0], GREEDY, on_overflow="cut").token_ids and len(session.messages) == 8
