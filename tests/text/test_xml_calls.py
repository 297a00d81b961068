"""Qwen3-Coder's tool calls: which blocks are calls, what their values are, and what is left of the text."""

from typing import Any

import pytest
from coder_template import CODER_TEMPLATE, TOOLS, tool
from hypothesis import given
from hypothesis import strategies as st

from qwen3fast.text.chat_template import ChatTemplate
from qwen3fast.text.tool_calls import JsonCalls, ParsedAnswer, ToolCall, XmlCalls, call_format_of, parse_tool_calls

XML = XmlCalls(TOOLS)
CALL = "<tool_call>\n<function=edit>\n<parameter=path>\na.py\n</parameter>\n</function>\n</tool_call>"
EDIT_A = ToolCall("edit", {"path": "a.py"})

MALFORMED = {
    "empty": "<tool_call>\n</tool_call>",
    "opened only": "<tool_call>",
    "JSON": '<tool_call>\n{"name": "edit", "arguments": {}}\n</tool_call>',
    "function not closed": "<tool_call>\n<function=edit>\n<parameter=path>\na\n</parameter>\n</tool_call>",
    "value not closed": "<tool_call>\n<function=edit>\n<parameter=path>\na",
    "value not closed before the next block": "<tool_call>\n<function=edit>\n<parameter=path>\na\n",
    "text between parameters": "<tool_call><function=edit>and<parameter=path>a</parameter></function></tool_call>",
    "text before the function": "<tool_call>so: <function=edit></function></tool_call>",
    "text behind the function": "<tool_call><function=edit></function> so</tool_call>",
    "no name": "<tool_call><function=></function></tool_call>",
    "name not closed": "<tool_call><function=edit\n</function></tool_call>",
    "parameter without a name": "<tool_call><function=edit><parameter=>a</parameter></function></tool_call>",
    "second function cut short": "<tool_call><function=now></function><function=now></tool_call>",
    "no opener and cut short": "<function=edit>\n<parameter=path>\na",
}

texts = st.text("ab<>/=\n é", max_size=6)
TAGS = ["<tool_call>", "</tool_call>", "<function=edit>", "<function=other>", "</function>", "<parameter=path>"]
TAGS += ["<parameter=line>", "</parameter>", "<function=", "<"]
BARE = CALL.removeprefix("<tool_call>\n")
pieces = st.sampled_from([CALL, BARE, *MALFORMED.values(), *TAGS, "\n", " ", "text", "1", "字", "\ud800"])
shreds = st.lists(pieces, max_size=12).map("".join)


def call_of(*parameters: tuple[str, str], function: str = "edit") -> str:
    """Return a call as Qwen3-Coder writes it."""
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={function}>\n{body}</function>\n</tool_call>"


def value_of(text: str, key: str, call_format: XmlCalls = XML) -> Any:
    """Return how the value of one parameter is read."""
    [call] = parse_tool_calls(call_of((key, text)), call_format).tool_calls
    return call.arguments[key]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("path", "a.py", "a.py"),
        ("path", "12", "12"),
        ("path", "null", "null"),
        ("path", "", ""),
        ("path", "\n a\n", "\n a\n"),
        ("path", '{"a": 1}', '{"a": 1}'),
        ("line", "12", 12),
        ("line", " -3 ", -3),
        ("line", "12.0", 12),
        ("line", "12.5", "12.5"),
        ("line", "twelve", "twelve"),
        ("line", "true", "true"),
        ("line", "null", None),
        ("line", "1" * 5000, "1" * 5000),
        ("ratio", "0.5", 0.5),
        ("ratio", "2", 2),
        ("ratio", "NaN", "NaN"),
        ("ratio", "1e999", "1e999"),
        ("dry", "true", True),
        ("dry", "False", False),
        ("dry", "1", "1"),
        ("dry", "None", None),
        ("tags", '["a", "b"]', ["a", "b"]),
        ("tags", "a, b", "a, b"),
        ("tags", '{"a": 1}', '{"a": 1}'),
        ("tags", "[" * 100_000, "[" * 100_000),
        ("options", '{"a":\n [1, null]}', {"a": [1, None]}),
        ("options", '{"a": NaN}', '{"a": NaN}'),
        ("note", "null", None),
        ("note", "None", None),
        ("note", "5", "5"),
        ("limit", "5", 5),
        ("limit", "none", None),
        ("unknown", "5", "5"),
    ],
)
def test_xml_calls_read_a_value_by_its_type(key, text, value):
    read = value_of(text, key)
    assert read == value
    assert type(read) is type(value)


# Loop refers to itself so often that following each reference would take for ever.
DEFINITIONS = {
    "Point": {"type": "object"},
    "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}] * 1000 + [{"type": "integer"}]},
}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({}, "5", "5"),
        ({"description": "no type"}, "true", "true"),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"type": ["integer", "string"]}, "a", "a"),
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"anyOf": [{"type": "null"}, {"type": "boolean"}]}, "true", True),
        ({"oneOf": [{"type": "array"}, {"type": "object"}]}, "{}", {}),
        ({"allOf": [{"$ref": "#/$defs/Point"}]}, '{"x": 1}', {"x": 1}),
        ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}),
        ({"$ref": "#/$defs/Missing"}, "1", "1"),
        ({"$ref": "#/properties/it"}, "1", "1"),
        ({"$ref": "http://example.org"}, "1", "1"),
        ({"$ref": "#/$defs/Loop"}, "1", 1),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"const": True}, "true", True),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"type": 5}, "5", "5"),
        ({"type": "date"}, "5", "5"),
        (True, "5", "5"),
    ],
)
def test_xml_calls_find_the_type_in_the_schema(schema, text, value):
    tools = [tool("f", {"it": schema}, **{"$defs": DEFINITIONS})]
    [call] = parse_tool_calls(call_of(("it", text), function="f"), XmlCalls(tools)).tool_calls
    assert call.arguments["it"] == value
    assert type(call.arguments["it"]) is type(value)


@pytest.mark.parametrize("tools", [None, [], [{"type": "function", "function": {"name": "edit"}}], [{"name": "edit"}]])
def test_xml_calls_without_a_schema_have_texts(tools):
    assert value_of("5", "line", XmlCalls(tools)) == "5"


def test_xml_calls_of_an_answer_that_is_one_call():
    assert parse_tool_calls(CALL, XML) == ParsedAnswer("", [EDIT_A], [])


def test_xml_calls_need_no_line_breaks():
    assert parse_tool_calls(CALL.replace("\n", ""), XML) == ParsedAnswer("", [EDIT_A], [])


def test_xml_calls_without_parameters():
    assert parse_tool_calls(call_of(function="now"), XML).tool_calls == [ToolCall("now", {})]


def test_xml_calls_leave_the_texts_around_them():
    assert parse_tool_calls(f"Before.\n\n{CALL} \n{CALL}\n\nAfter.\n", XML) == ParsedAnswer(
        "Before.\nAfter.\n", [EDIT_A, EDIT_A], []
    )


def test_xml_calls_take_several_functions_in_a_block():
    answer = CALL.replace("\n</tool_call>", "\n<function=now>\n</function>\n</tool_call>")
    assert parse_tool_calls(answer, XML) == ParsedAnswer("", [EDIT_A, ToolCall("now", {})], [])


@pytest.mark.parametrize("end", ["", "\n", "\n</tool_call>"])
def test_xml_calls_are_found_without_the_opening_tag(end):
    answer = "I will edit.\n\n" + CALL.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>") + end
    assert parse_tool_calls(answer, XML) == ParsedAnswer("I will edit.", [EDIT_A], [])


def test_xml_calls_without_the_opening_tag_may_be_followed_by_text():
    answer = CALL.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>") + "\nDone."
    assert parse_tool_calls(answer, XML) == ParsedAnswer("Done.", [EDIT_A], [])


@pytest.mark.parametrize("answer", ["A <function=now></function>.", "<function=other>\n</function>", "<function=no"])
def test_xml_calls_without_the_opening_tag_begin_a_line_and_name_a_tool(answer):
    assert parse_tool_calls(answer, XML) == ParsedAnswer(answer, [], [])


def test_xml_calls_without_the_opening_tag_may_have_any_name_where_the_tools_are_not_known():
    assert parse_tool_calls("<function=other>\n</function>", XmlCalls()).tool_calls == [ToolCall("other", {})]


@pytest.mark.parametrize("text", ["</parameter>", "</function>", "</tool_call>", "<tool_call>", "<parameter=a>", "<b>"])
def test_xml_calls_may_hold_tags_in_a_value(text):
    text = f"one {text} two\n{text}\nthree"
    assert parse_tool_calls(call_of(("path", text), ("line", "1")), XML).tool_calls == [
        ToolCall("edit", {"path": text, "line": 1})
    ]


def test_xml_calls_take_the_end_of_the_function_for_the_end_of_the_last_value():
    assert parse_tool_calls(CALL.replace("\n</parameter>", ""), XML) == ParsedAnswer("", [EDIT_A], [])


def test_xml_calls_take_the_next_parameter_for_the_end_of_a_value():
    answer = call_of(("path", "a.py"), ("line", "3")).replace("</parameter>\n", "", 1)
    assert parse_tool_calls(answer, XML).tool_calls == [ToolCall("edit", {"path": "a.py", "line": 3})]


def test_xml_calls_leave_a_parameter_that_is_given_already_in_the_value():
    [call] = parse_tool_calls(call_of(("line", "3"), ("path", "a\n<parameter=line>\nb")), XML).tool_calls
    assert call.arguments == {"line": 3, "path": "a\n<parameter=line>\nb"}


def test_xml_calls_are_closed_by_the_end_of_the_reply():
    assert parse_tool_calls(CALL.removesuffix("\n</tool_call>"), XML) == ParsedAnswer("", [EDIT_A], [])


def test_xml_calls_hold_valid_unicode_only():
    answer = call_of(("pa\ud800th", "\udfff"), function="a\ud800")
    assert parse_tool_calls(answer, XmlCalls()).tool_calls == [ToolCall("a\ufffd", {"pa\ufffdth": "\ufffd"})]


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_xml_calls_malformed_stay_in_the_content(answer):
    parsed = parse_tool_calls(f"Hm.\n{answer}", XML)
    assert (parsed.content, parsed.tool_calls) == (f"Hm.\n{answer}", [])
    assert parsed.malformed == [answer.rstrip()]


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED.keys())
def test_xml_calls_are_found_around_a_malformed_one(answer):
    parsed = parse_tool_calls(f"{CALL}\n{answer}\n{CALL}\nDone.", XML)
    assert parsed == ParsedAnswer(f"{answer.strip()}\nDone.", [EDIT_A, EDIT_A], [answer.rstrip()])


@given(st.text() | shreds, st.sampled_from([XML, XmlCalls()]))
def test_xml_calls_of_any_text_never_raise_and_malformed_stays_text(answer, call_format):
    parsed = parse_tool_calls(answer, call_format)
    assert all(block in parsed.content for block in parsed.malformed)
    assert parsed.tool_calls or parsed.content == answer


@given(st.lists(st.dictionaries(st.sampled_from(["path", "note", "other"]), texts, max_size=3), max_size=3), texts)
def test_xml_calls_written_out_are_read_back(wanted, text):
    answer = text + "".join(call_of(*arguments.items()) for arguments in wanted)
    parsed = parse_tool_calls(answer, XML)
    assert [call.arguments for call in parsed.tool_calls] == wanted
    assert parsed.malformed == []


def test_xml_calls_read_what_the_template_writes():
    arguments = {"path": "a.py", "line": 3, "dry": True, "tags": ["x"], "options": {"y": 1}, "limit": None}
    call = {"function": {"name": "edit", "arguments": arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes.", "tool_calls": [call]}]
    text = ChatTemplate(CODER_TEMPLATE, "coder").render(messages, TOOLS, add_generation_prompt=False)
    reply = text.rpartition("<|im_start|>assistant\n")[2].removesuffix("<|im_end|>\n")
    assert parse_tool_calls(reply, XML) == ParsedAnswer("Yes.", [ToolCall("edit", arguments)], [])


HOSTILE = [
    "<tool_call>",
    "<tool_call><function=edit><parameter=path>",
    "\n<function=edit><parameter=path>",
    "<parameter=k>x<tool_call>\n<function=edit></parameter>",
    "<tool_call><function=edit></function>x",
    "\n<function=edit></function>x",
]


@pytest.mark.parametrize("repeated", HOSTILE)
def test_xml_calls_of_a_model_that_repeats_itself_are_read_in_linear_time(repeated):
    # Not timed: in quadratic time, each of these would take minutes.
    parsed = parse_tool_calls("<tool_call><function=edit>" + repeated * 50_000, XML)
    assert len(parsed.malformed) + len(parsed.tool_calls) > 0


def test_the_format_of_calls_follows_from_the_template():
    assert isinstance(call_format_of(CODER_TEMPLATE, TOOLS), XmlCalls)
    assert isinstance(call_format_of("{{ tools }}"), JsonCalls)
    assert isinstance(call_format_of(None), JsonCalls)
