"""Generator.chat of several conversations, and chat in asyncio."""

import asyncio
import warnings

import pytest

from qwen3fast import ChatSession, ContextLengthError, Generator, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=30)
CONVERSATIONS = [
    [{"role": "user", "content": "What is 17 + 25?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 4 + 5?"}],
    [
        {"role": "user", "content": "What is 4 + 5?"},
        {"role": "assistant", "content": "9"},
        {"role": "user", "content": "And 2 + 2?"},
    ],
]


@pytest.fixture(scope="module")
def generator():
    with Generator.from_pretrained("tiny", dtype="float32", max_batch_size=3, compile=False) as generator:
        yield generator


@pytest.mark.parametrize("thinking", [True, False])
def test_each_of_several_conversations_gets_the_reply_that_it_gets_alone(generator, thinking):
    params = SamplingParams(seed=5, max_tokens=30)
    alone = [generator.chat(c, params, enable_thinking=thinking) for c in CONVERSATIONS]
    together = generator.chat(CONVERSATIONS, params, enable_thinking=thinking)
    assert [reply.token_ids for reply in together] == [reply.token_ids for reply in alone]
    assert all(reply.reasoning for reply in together) == thinking


def test_conversations_may_have_parameters_of_their_own(generator):
    each = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2, 3)]
    replies = generator.chat(tuple(CONVERSATIONS), each)
    assert [len(reply.token_ids) for reply in replies] == [1, 2, 3]
    with pytest.raises(ValueError, match="got 2 SamplingParams for 3 conversations; pass one, or one for each"):
        generator.chat(CONVERSATIONS, each[:2])
    with pytest.raises(ValueError, match="got 3 SamplingParams for 1 conversations"):
        generator.chat(CONVERSATIONS[0], each)


def test_a_list_of_one_conversation_is_several(generator):
    (reply,) = generator.chat(CONVERSATIONS[:1], GREEDY)
    assert reply.token_ids == generator.chat(CONVERSATIONS[0], GREEDY).token_ids


def test_a_bad_conversation_among_several_is_refused_before_any_runs(generator):
    with pytest.raises(ValueError, match="messages"):
        generator.chat([*CONVERSATIONS, [{"role": "user"}]], GREEDY)
    with pytest.raises(ValueError, match="messages"):
        generator.chat([], GREEDY)


@pytest.mark.parametrize("way", ["one", "several"])
def test_the_warning_of_greedy_reasoning_names_the_callers_line(way):
    with (
        Generator.from_pretrained("tiny", compile=False) as generator,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        generator.chat(CONVERSATIONS if way == "several" else CONVERSATIONS[0], GREEDY)
    reasoning = [w for w in caught if "greedy decoding" in str(w.message)]
    assert [w.filename for w in reasoning] == [__file__]


@pytest.mark.parametrize(
    ("messages", "params", "error"),
    [
        ({"role": "user", "content": "Hi"}, None, "messages"),
        (iter(CONVERSATIONS[0]), None, "messages"),
        ("Hi", None, "messages"),
        (CONVERSATIONS[0], {"temperature": 0}, "params must be a SamplingParams, got dict"),
        ([CONVERSATIONS[0], [{"role": "user"}]], None, r"conversations\[1\]: the chat template"),
    ],
)
def test_wrong_arguments_are_named(generator, messages, params, error):
    with pytest.raises(ValueError, match=error):
        generator.chat(messages, params)


def test_a_single_conversation_that_is_too_long_has_no_number(generator):
    long = [{"role": "user", "content": "a b " * 9000}]
    with pytest.raises(ContextLengthError, match=r"^prompt") as caught:
        generator.chat(long, GREEDY)
    assert "prompts[0]" not in str(caught.value)
    with pytest.raises(ContextLengthError, match=r"^prompts\[1\]: prompt"):
        generator.chat([CONVERSATIONS[0], long], GREEDY)
    for prompts in ("a b " * 9000, ["a", "a b " * 9000], [[1] * 4097]):
        with pytest.raises(ContextLengthError):
            generator.generate(prompts, GREEDY)
    with pytest.raises(ContextLengthError, match="continuation"):
        generator.score([1] * 4000, [2] * 97)


def test_a_reply_that_ends_in_its_reasoning_is_warned_of(generator):
    with pytest.warns(UserWarning, match="ended inside its reasoning, without an answer; thinking_budget") as caught:
        reply = generator.chat(CONVERSATIONS[0], SamplingParams(seed=0, max_tokens=5))
    assert reply.reasoning and not reply.answer and [w.filename for w in caught] == [__file__]


def test_a_reply_as_a_message_is_what_a_session_keeps(generator):
    session = ChatSession(generator)
    reply = session.send("What is 17 + 25?", SamplingParams(seed=1, max_tokens=60))
    assert reply.to_message() == session.messages[-1] and reply.to_message()["reasoning_content"] == reply.reasoning
    assert generator.chat([*session.messages, *CONVERSATIONS[0]], GREEDY).token_ids


@pytest.mark.parametrize("thinking", [True, False])
def test_submit_chat_starts_the_reply_of_chat(generator, thinking):
    params = SamplingParams(seed=2, max_tokens=30)
    handle = generator.submit_chat(CONVERSATIONS[0], params, enable_thinking=thinking, timeout=0)
    expected = generator.chat(CONVERSATIONS[0], params, enable_thinking=thinking)
    assert handle.result().token_ids == expected.token_ids
    assert asyncio.run(generator.submit_chat(CONVERSATIONS[0], GREEDY).aresult()).token_ids


@pytest.mark.parametrize("thinking", [True, False])
def test_astream_chat_streams_the_reply_of_chat(generator, thinking):
    params = SamplingParams(seed=2, max_tokens=30)

    async def stream():
        return [c async for c in generator.astream_chat(CONVERSATIONS[0], params, enable_thinking=thinking)]

    chunks = asyncio.run(stream())
    expected = generator.chat(CONVERSATIONS[0], params, enable_thinking=thinking)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert chunks[-1].result.token_ids == expected.token_ids


def test_astream_chat_raises_at_the_first_chunk(generator):
    stream = generator.astream_chat([{"role": "user"}])
    with pytest.raises(ValueError, match="messages"):
        asyncio.run(anext(stream))
