"""AnswerStream: joined, the pieces are what the whole answer holds, wherever it was cut."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3fast.server.answer_stream import AnswerStream
from qwen3fast.text.tool_calls import parse_tool_calls

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call> <tool_call>"}}\n</tool_call>'
PARTS = st.sampled_from(
    ["text", " ", "\n", "<", "<tool", "<tool_call>", "</tool_call>", CALL, '{"name": "g", "arguments": {}}', "é", "<b>"]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PARTS, max_size=8).map("".join), st.lists(st.integers(0, 400), max_size=12))
@example(f"Let me look.\n{CALL}\n{CALL} done ", [3, 20, 100])
@example("a <tool_call> b", [4, 9])
def test_pieces_joined_are_the_whole_answer(answer, cuts):
    parsed = parse_tool_calls(answer)
    stream, pieces = AnswerStream(), []
    begin = 0
    for end in sorted(min(cut, len(answer)) for cut in cuts):
        pieces.append(stream.push(answer[begin:end]))
        begin = end
    pieces.append(stream.push(answer[begin:]))
    pieces.append(stream.finish(parsed.content, parsed.tool_calls))
    assert "".join(piece.content for piece in pieces) == parsed.content
    assert [call for piece in pieces for call in piece.tool_calls] == parsed.tool_calls


def test_text_is_given_at_once_and_a_call_when_it_is_closed():
    stream = AnswerStream()
    assert stream.push("Hello ").content == "Hello"
    assert stream.push("there.<tool_").content == " there."
    assert stream.push('call>{"name": "f", "arguments"').tool_calls == []
    assert [call.name for call in stream.push(": {}}</tool_call>").tool_calls] == ["f"]
    assert stream.push("more").content == "\nmore"
