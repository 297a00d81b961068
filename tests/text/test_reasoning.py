"""Whether a reply begins inside reasoning: the prompt's whole last assistant turn decides, everywhere."""

from __future__ import annotations

import pytest

from qwen3fast import ChatSession, Generator, SamplingParams
from qwen3fast.text.reasoning import CLOSING_TEXT, ReasoningFormat
from qwen3fast.text.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
USER = "<|im_start|>user\nHi<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def generator():
    with Generator.from_pretrained("tiny", max_batch_size=2, compile=True) as generator:
        yield generator


@pytest.fixture(scope="module")
def whole(generator):
    """A greedy reply with reasoning and an answer."""
    with pytest.warns(UserWarning, match="greedy decoding"):
        reply = generator.chat(QUESTION, SamplingParams(max_tokens=200, temperature=0))
    assert reply.reasoning and reply.answer and reply.finish_reason == "stop"
    return reply


@pytest.fixture
def tokenizer(tokenizer_folder):
    """A tokenizer of each test's own, whose chat template may be changed."""
    return Tokenizer.from_folder(tokenizer_folder)


@pytest.mark.parametrize(
    ("prompt", "is_open", "may_open"),
    [
        (USER + ASSISTANT, False, True),
        (USER + ASSISTANT + "\n", False, True),
        (USER + ASSISTANT + "<think>", True, False),
        (USER + ASSISTANT + "<think>\nSo 2 and", True, False),
        (USER + ASSISTANT + "\n<think>\nSo <think> again", True, False),
        (USER + ASSISTANT + "<think>\nSo.\n</think>", False, False),
        (USER + ASSISTANT + "<think>\n\n</think>\n\nThe", False, False),
        (USER + ASSISTANT + "<think>\nSo.\n<tool_call>", False, False),
        (USER + ASSISTANT + "Well, <think>", False, False),
        (USER + ASSISTANT + "The answer", False, False),
        (USER, False, True),
        ("<|im_start|>user\n<think>", False, True),
        (USER + ASSISTANT + "<think>\nSo.<|im_end|>\n" + USER + ASSISTANT, False, True),
        (USER + ASSISTANT + "<think>\nSo.<|im_end|>\n", False, True),
        ("plain text", False, True),
        ("plain <think> text", True, False),
        ("<think>a</think> text", False, True),
        ("<think>a<tool_call>b", False, True),
    ],
)
def test_the_last_assistant_turn_says_where_a_reply_begins(tokenizer, prompt, is_open, may_open):
    tracker = ReasoningFormat(tokenizer).tracker_after(tokenizer.encode(prompt))
    assert (tracker.is_open, tracker.may_open) == (is_open, may_open)


@pytest.mark.parametrize(("begun", "is_open"), [("", True), ("So 2 and", True), ("So.</think>", False)])
def test_a_template_that_opens_the_reasoning_opens_it_for_every_reply(tokenizer, begun, is_open):
    source = tokenizer.chat_template
    assert not ReasoningFormat(tokenizer).tracker_after(tokenizer.encode(USER + ASSISTANT + begun)).is_open
    tokenizer.chat_template = source.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    assert tokenizer.apply_chat_template(QUESTION).endswith("<think>\n")
    assert ReasoningFormat(tokenizer).tracker_after(tokenizer.encode(USER + ASSISTANT + begun)).is_open == is_open


@pytest.mark.parametrize("way", ["chat", "stream_chat", "session"])
def test_reasoning_that_a_template_opens_whatever_it_is_asked_for_is_closed_at_once(way, generator, monkeypatch):
    tokenizer = generator.tokenizer
    source = tokenizer.chat_template.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    monkeypatch.setattr(tokenizer, "chat_template", source.replace("enable_thinking is false", "false"))
    monkeypatch.setattr(generator, "_has_warned_greedy_reasoning", True)
    params = SamplingParams(temperature=0, max_tokens=60)
    if way == "session":
        reply = ChatSession(generator, enable_thinking=False).send(QUESTION[0]["content"], params)
    elif way == "chat":
        reply = generator.chat(QUESTION, params, enable_thinking=False)
    else:
        *_, last = generator.stream_chat(QUESTION, params, enable_thinking=False)
        reply = last.result
    assert reply.reasoning == "" and reply.answer.strip()
    assert generator.chat(QUESTION, params).reasoning


def test_a_reply_continued_anywhere_tells_reasoning_from_answer_as_the_whole_one(generator, whole):
    prompt = generator.render(QUESTION)
    ends = range(len(whole.token_ids))
    params = SamplingParams(max_tokens=200, temperature=0)
    replies = generator.generate([prompt + whole.token_ids[:k] for k in ends], params)
    for k, reply in zip(ends, replies, strict=True):
        begun, end, answer = generator.tokenizer.decode(whole.token_ids[:k]).partition("</think>")
        reasoning = begun.removeprefix("<think>").removeprefix("\n") + reply.reasoning
        assert reasoning.rstrip("\n") == whole.reasoning, k
        assert (answer + reply.answer).lstrip("\n") == whole.answer, k
        assert reply.reasoning == "" or not end, k


def test_a_continued_reply_keeps_the_grammar_out_of_the_reasoning(generator, whole):
    params = SamplingParams(max_tokens=200, temperature=0, regex=r"7\d")
    for k in (0, 1, 3, 6):
        reply = generator.generate(generator.render(QUESTION) + whole.token_ids[:k], params)
        assert reply.reasoning and whole.reasoning.endswith(reply.reasoning)
        assert len(reply.answer) == 2 and reply.answer[0] == "7"


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_continued_reply_has_the_thinking_budget(generator, whole, k):
    prompt = generator.render(QUESTION) + whole.token_ids[:k]
    reply = generator.generate(prompt, SamplingParams(max_tokens=50, temperature=0, thinking_budget=2))
    assert reply.token_ids[:2] == whole.token_ids[k : k + 2]
    assert reply.token_ids[2] == generator.tokenizer.encode(CLOSING_TEXT)[0]


def test_chat_continues_the_final_message(generator, whole):
    begun = [*QUESTION, {"role": "assistant", "content": "", "reasoning_content": whole.reasoning[:5]}]
    params = SamplingParams(max_tokens=200, temperature=0)
    reply = generator.chat(begun, params, continue_final_message="reasoning_content")
    assert reply.reasoning and reply.answer and "<think>" not in reply.text
    chunks = list(generator.stream_chat(begun, params, continue_final_message="reasoning_content"))
    assert "".join(chunk.reasoning for chunk in chunks) == reply.reasoning
    answer = generator.chat(
        [*QUESTION, {"role": "assistant", "content": "The sum"}], params, continue_final_message=True
    )
    assert answer.reasoning == "" and answer.answer
