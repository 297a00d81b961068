"""parse_tool_calls: which blocks are calls, which are not, and what is left of the text."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.text.tool_calls import ParsedAnswer, ToolCall, parse_tool_calls

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
WEATHER = ToolCall("weather", {"city": "Oslo"})

MALFORMED = {
    "empty": "<tool_call>\n</tool_call>",
    "words": "<tool_call>\nweather in Oslo\n</tool_call>",
    "broken JSON": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}\n</tool_call>',
    "text after the JSON": '<tool_call>\n{"name": "weather", "arguments": {}} please\n</tool_call>',
    "no arguments": '<tool_call>\n{"name": "weather"}\n</tool_call>',
    "unknown name for arguments": '<tool_call>\n{"name": "weather", "params": {"city": "Oslo"}}\n</tool_call>',
    "arguments and other parameters": '<tool_call>{"name": "a", "arguments": {}, "parameters": {"b": 1}}</tool_call>',
    "second object not a call": '<tool_call>\n{"name": "a", "arguments": {}}\n{"name": "b"}\n</tool_call>',
    "list with something else": '<tool_call>\n[{"name": "a", "arguments": {}}, 1]\n</tool_call>',
    "list of names": '<tool_call>\n["weather"]\n</tool_call>',
    "empty list": "<tool_call>[]</tool_call>",
    "list in a list": '<tool_call>[[{"name": "a", "arguments": {}}]]</tool_call>',
    "a number": "<tool_call>NaN</tool_call>",
    "no name": '<tool_call>\n{"arguments": {}}\n</tool_call>',
    "name not a string": '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>',
    "name empty": '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
    "arguments a list": '<tool_call>\n{"name": "a", "arguments": []}\n</tool_call>',
    "arguments a number": '<tool_call>\n{"name": "a", "arguments": 0}\n</tool_call>',
    "arguments false": '<tool_call>\n{"name": "a", "arguments": false}\n</tool_call>',
    "arguments a string without JSON": '<tool_call>\n{"name": "a", "arguments": "city"}\n</tool_call>',
    "arguments a string with a list": '<tool_call>\n{"name": "a", "arguments": "[]"}\n</tool_call>',
    "XML of Qwen3-Coder": "<tool_call>\n<function=a>\n<parameter=b>\n1\n</parameter>\n</function>\n</tool_call>",
    "unfinished after a whole call": '<tool_call>\n{"name": "a", "arguments": {}}\n{"name": "b',
    "cut short": '<tool_call>\n{"name": "wea',
    "opened only": "<tool_call>",
    "nested too deeply": '<tool_call>\n{"name": ' + "[" * 200_000 + "\n</tool_call>",
    "arguments nested too deeply": '<tool_call>{"name": "a", "arguments": "' + "[" * 200_000 + '"}</tool_call>',
    "a number too long": '<tool_call>{"name": ' + "1" * 5_000 + "}</tool_call>",
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
calls = st.builds(ToolCall, st.text(min_size=1), st.dictionaries(st.text(), json_values, max_size=3))
# Shreds of calls, in any order.
whole = [CALL, '{"name": "a", "arguments": null}', *MALFORMED.values()]
broken = ["<tool_call>", "</tool_call>", "<tool_call", '{"name": ', '"arguments": ', '"', "\\", "{", "}", "[" * 10_000]
others = ["\n", " ", "text", "NaN", "<think>", "字", "\ud800"]
pieces = st.sampled_from([*whole, *broken, *others])
shreds = st.lists(pieces, max_size=10).map("".join)
shreds_among_calls = st.lists(st.just(CALL) | pieces, max_size=10).map("".join)


def block(call: ToolCall, ensure_ascii: bool = False) -> str:
    """A call as Qwen3 writes it."""
    written = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=ensure_ascii)
    return f"<tool_call>\n{written}\n</tool_call>"


def test_tool_calls_of_an_answer_without_any():
    assert parse_tool_calls("  Hello.\n") == ParsedAnswer("  Hello.\n", [], [])


def test_tool_calls_of_an_empty_answer():
    assert parse_tool_calls("") == ParsedAnswer("", [], [])


def test_tool_calls_of_an_answer_that_is_one_call():
    assert parse_tool_calls(CALL) == ParsedAnswer("", [WEATHER], [])


def test_tool_calls_after_text_leave_the_text():
    assert parse_tool_calls(f"Let me look.\n{CALL}") == ParsedAnswer("Let me look.", [WEATHER], [])


def test_tool_calls_leave_a_line_break_between_the_texts_around_them():
    assert parse_tool_calls(f"Before.\n\n{CALL} \n After.\n").content == "Before.\nAfter.\n"


def test_tool_calls_of_several_calls_come_in_order():
    answer = f'One:\n{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>\n{CALL}'
    assert parse_tool_calls(answer) == ParsedAnswer("One:", [WEATHER, ToolCall("now", {}), WEATHER], [])


def test_tool_calls_are_found_in_a_code_block():
    assert parse_tool_calls(f"```json\n{CALL}\n```") == ParsedAnswer("```json\n```", [WEATHER], [])


@pytest.mark.parametrize("answer", [CALL.replace("\n", ""), CALL.replace("\n", "\r\n\n  ")], ids=["none", "more"])
def test_tool_calls_need_no_certain_whitespace_inside_the_tags(answer):
    assert parse_tool_calls(answer).tool_calls == [WEATHER]


@pytest.mark.parametrize("arguments", ["null", '""', '" \\n"', "{}", '"{}"', '"null"'])
def test_tool_calls_without_arguments_have_none(arguments):
    answer = f'<tool_call>{{"name": "now", "arguments": {arguments}}}</tool_call>'
    assert parse_tool_calls(answer) == ParsedAnswer("", [ToolCall("now", {})], [])


@pytest.mark.parametrize("key", ["arguments", "parameters"])
@pytest.mark.parametrize("as_string", [False, True])
def test_tool_calls_take_arguments_under_both_names_and_as_a_string(key, as_string):
    arguments = json.dumps({"city": "Oslo"})
    answer = (
        f'<tool_call>{{"name": "weather", "{key}": {json.dumps(arguments) if as_string else arguments}}}</tool_call>'
    )
    assert parse_tool_calls(answer) == ParsedAnswer("", [WEATHER], [])


def test_tool_calls_take_both_names_of_arguments_where_they_agree():
    answer = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}, "parameters": {"city": "Oslo"}}</tool_call>'
    assert parse_tool_calls(answer).tool_calls == [WEATHER]


@pytest.mark.parametrize("body", ["{0}{1}", "{0}\n{1}", "[{0}, {1}]", "[{0}]\n{1}"])
def test_tool_calls_take_several_in_one_block(body):
    calls = [json.dumps({"name": name, "arguments": {"n": n}}) for n, name in enumerate("ab")]
    parsed = parse_tool_calls("<tool_call>\n" + body.format(*calls) + "\n</tool_call>")
    assert parsed == ParsedAnswer("", [ToolCall("a", {"n": 0}), ToolCall("b", {"n": 1})], [])


def test_tool_calls_take_raw_line_breaks_in_strings():
    answer = '<tool_call>{"name": "write", "arguments": {"text": "one\n\ttwo"}}</tool_call>'
    assert parse_tool_calls(answer).tool_calls == [ToolCall("write", {"text": "one\n\ttwo"})]


@pytest.mark.parametrize("space", ["", "\n", " \n "])
def test_tool_calls_are_closed_by_the_end_of_the_reply(space):
    assert parse_tool_calls("Hm. " + CALL.removesuffix("\n</tool_call>") + space) == ParsedAnswer("Hm.", [WEATHER], [])


def test_tool_calls_are_not_closed_by_other_text():
    answer = CALL.removesuffix("\n</tool_call>") + " Done."
    assert parse_tool_calls(answer) == ParsedAnswer(answer, [], [answer])


def test_tool_calls_hold_valid_unicode_only():
    answer = '<tool_call>{"name": "a\\ud800", "arguments": {"\\udfff": ["\\ud83d\\ude00", "\\ud83d"]}}</tool_call>'
    assert parse_tool_calls(answer).tool_calls == [ToolCall("a\ufffd", {"\ufffd": ["\U0001f600", "\ufffd"]})]


def test_tool_calls_ignore_other_keys():
    answer = '<tool_call>{"id": 3, "name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert parse_tool_calls(answer).tool_calls == [WEATHER]


@pytest.mark.parametrize("text", ["</tool_call>", "<tool_call>", CALL])
def test_tool_calls_may_hold_the_tags_in_a_string(text):
    call = ToolCall("write", {"text": text})
    assert parse_tool_calls(f"a {block(call)} b") == ParsedAnswer("a\nb", [call], [])


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_tool_calls_malformed_stay_in_the_content(answer):
    assert parse_tool_calls(f"Hm. {answer}") == ParsedAnswer(f"Hm. {answer}", [], [answer])


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_tool_calls_are_found_after_a_malformed_one(answer):
    assert parse_tool_calls(f"{answer}\n{CALL}\nDone.") == ParsedAnswer(f"{answer}\nDone.", [WEATHER], [answer])


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_tool_calls_are_found_before_a_malformed_one(answer):
    assert parse_tool_calls(f"{CALL}{answer}") == ParsedAnswer(answer, [WEATHER], [answer])


@pytest.mark.parametrize("text", ["</tool_call>", "<tool_call", "< tool_call>", "<TOOL_CALL>", '{"name": "a"}'])
def test_tool_calls_almost_begun_are_text(text):
    assert parse_tool_calls(text) == ParsedAnswer(text, [], [])


def test_tool_calls_compare_by_value():
    assert ToolCall("a", {"b": 1}) == ToolCall("a", {"b": 1}) != ToolCall("a", {"b": 2})


@given(st.text() | shreds)
def test_tool_calls_of_any_text_never_raise_and_malformed_stays_text(answer):
    parsed = parse_tool_calls(answer)
    assert all(block in parsed.content for block in parsed.malformed)


def arguments_of(value: Any) -> Any:
    """Return what arguments stand for; a dict if they are any."""
    if isinstance(value, str) and value.strip():
        value = json.loads(value, strict=False)
    return {} if value is None or (isinstance(value, str) and not value.strip()) else value


def is_call(value: Any) -> bool:
    """Return whether a JSON value is a call with arguments that can be read in one way."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return False
    try:
        read = [arguments_of(value[key]) for key in ("arguments", "parameters") if key in value]
    except (ValueError, RecursionError):
        return False
    return bool(read) and all(isinstance(x, dict) for x in read) and read[0] == read[-1]


def num_calls(text: str) -> int:
    """Return the number of calls that a text between two tags holds; 0 if it holds anything else."""
    values: list[Any] = []
    while text := text.strip():
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(text)
        except (ValueError, RecursionError):
            return 0
        values += value if isinstance(value, list) else [value]
        text = text[end:]
    return len(values) if all(is_call(value) for value in values) else 0


def without_calls(answer: str) -> tuple[str, int]:
    """Return the answer without its calls, and their number: every pair of tags is tried, the nearest first."""
    before, tag, after = answer.partition("<tool_call>")
    for end in re.finditer("</tool_call>|\\Z", after if tag else ""):
        if number := num_calls(after[: end.start()]):
            rest, others = without_calls(after[end.end() :])
            return before + rest, number + others
    rest, number = without_calls(after) if tag else ("", 0)
    return before + tag + rest, number


@given(st.text() | shreds_among_calls)
def test_tool_calls_of_any_text_lose_nothing_else(answer):
    parsed = parse_tool_calls(answer)
    rest, number = without_calls(answer)
    assert len(parsed.tool_calls) == number
    assert "".join(parsed.content.split()) == "".join(rest.split())
    assert number or parsed.content == answer


@given(shreds)
def test_tool_calls_and_malformed_are_as_many_as_blocks_at_most(answer):
    parsed = parse_tool_calls(answer)
    blocks = len(parsed.malformed) + (1 if parsed.tool_calls else 0)
    assert blocks <= answer.count("<tool_call>")


@given(
    st.lists(calls, max_size=4),
    st.lists(st.text("ab.\n 字", max_size=6), min_size=5, max_size=5),
    st.booleans(),
)
def test_tool_calls_written_out_are_read_back(wanted, texts, ensure_ascii):
    answer = texts[0] + "".join(block(c, ensure_ascii) + text for c, text in zip(wanted, texts[1:], strict=False))
    parsed = parse_tool_calls(answer)
    assert (parsed.tool_calls, parsed.malformed) == (wanted, [])
    assert "".join(parsed.content.split()) == "".join("".join(texts[: len(wanted) + 1]).split())
