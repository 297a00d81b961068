"""AnswerStream: joined, the pieces are what the whole answer holds, wherever it was cut."""

from __future__ import annotations

import pytest
from coder_template import TOOLS
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3fast.server.answer_stream import AnswerStream
from qwen3fast.text.tool_calls import CallFormat, JsonCalls, XmlCalls, parse_tool_calls

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> <tool_call>"}}\n</tool_call>'
PARTS = st.sampled_from(
    ["text", " ", "\n", "<", "<tool", "<tool_call>", "</tool_call>", CALL, '{"name": "g", "arguments": {}}', "é", "<b>"]
)
BARE = "<function=edit>\n<parameter=path>\na </parameter> <tool_call>\n</parameter>\n</function>"
XML_CALL = f"<tool_call>\n{BARE}\n</tool_call>"
XML_TAGS = ["<tool_call>", "</tool_call>", "<function=edit>", "\n<function=now>", "\n<function=other>\n", "</function>"]
XML_TAGS += ["<parameter=path>", "<parameter=line>", "</parameter>", "<", "\n<function=", "</tool", "</func"]
XML_PARTS = st.sampled_from(["text", " ", "\n", XML_CALL, BARE, f"\n{BARE}", "é", "<b>", *XML_TAGS])
CUTS = st.lists(st.integers(0, 400), max_size=12)


def check_pieces(answer: str, cuts: list[int], call_format: CallFormat) -> None:
    parsed = parse_tool_calls(answer, call_format)
    stream, pieces = AnswerStream(call_format), []
    begin = 0
    for end in sorted(min(cut, len(answer)) for cut in cuts):
        pieces.append(stream.push(answer[begin:end]))
        begin = end
    pieces.append(stream.push(answer[begin:]))
    pieces.append(stream.finish(parsed.content, parsed.tool_calls))
    assert "".join(piece.content for piece in pieces) == parsed.content
    assert [call for piece in pieces for call in piece.tool_calls] == parsed.tool_calls


@settings(deadline=None, max_examples=300)
@given(st.lists(PARTS, max_size=8).map("".join), CUTS)
@example(f"Let me look.\n{CALL}\n{CALL} done ", [3, 20, 100])
@example("a <tool_call> b", [4, 9])
def test_pieces_joined_are_the_whole_answer(answer, cuts):
    check_pieces(answer, cuts, JsonCalls())


@settings(deadline=None, max_examples=500)
@given(st.lists(XML_PARTS, max_size=10).map("".join), CUTS, st.sampled_from([XmlCalls(TOOLS), XmlCalls()]))
@example(f"Look.\n{BARE}\n</tool_call>done ", [3, 20, 70, 85, 90, 98], XmlCalls(TOOLS))
def test_pieces_joined_are_the_whole_answer_of_coder(answer, cuts, call_format):
    check_pieces(answer, cuts, call_format)


@pytest.mark.parametrize(
    "answer", [f"Look.\n{BARE}\n</tool_call> done", f"{XML_CALL}\n{BARE}\n{BARE}<fun", BARE + "</f"]
)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_pieces_of_every_split_in_two_are_the_whole_answer_of_coder(answer, tools):
    for cut in range(len(answer) + 1):
        check_pieces(answer, [cut], XmlCalls(tools))
    check_pieces(answer, list(range(len(answer))), XmlCalls(tools))


def test_text_is_given_at_once_and_a_call_when_it_is_closed():
    stream = AnswerStream()
    assert stream.push("Hello ").content == "Hello"
    assert stream.push("there.<tool_").content == " there."
    assert stream.push('call>{"name": "f", "arguments"').tool_calls == []
    assert [call.name for call in stream.push(": {}}</tool_call>").tool_calls] == ["f"]
    assert stream.push("more").content == "\nmore"


def test_a_call_of_coder_is_given_when_it_is_closed():
    stream = AnswerStream(XmlCalls(TOOLS))
    assert stream.push("Hello.\n<tool_call>\n<function=edit>\n<parameter=line>\n1").content == "Hello."
    assert stream.push("2\n</parameter>\n</function>\n").tool_calls == []
    assert [call.arguments for call in stream.push("</tool_call>").tool_calls] == [{"line": 12}]


def test_a_call_of_coder_without_the_opening_tag_is_given_when_other_text_follows():
    stream = AnswerStream(XmlCalls(TOOLS))
    assert stream.push("Hello.\n<function=no").content == "Hello."
    assert stream.push("w>\n</function>\n<").tool_calls == []
    assert [call.name for call in stream.push("b>").tool_calls] == ["now"]
    assert stream.push("\n").content == ""
