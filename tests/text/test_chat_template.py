"""Chat templates: messages, tools and continued messages as in transformers, and bounds on time and size."""

from __future__ import annotations

import dataclasses
import enum
import threading
import time
import tracemalloc
from typing import Any, Literal, Optional

import numpy as np
import pydantic
import pytest
from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import models
from transformers import AutoTokenizer
from transformers.utils import get_json_schema

from qwen3fast.text.function_schema import function_schema
from qwen3fast.text.template_budget import TemplateLimits
from qwen3fast.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "What is 2 + 2?"}
BEGUN = {"role": "assistant", "content": "The answer is "}
CALL = {"type": "function", "function": {"name": "now", "arguments": {}}}


@pytest.fixture(scope="module")
def reference(tokenizer_folder):
    """transformers' tokenizer, from the same folder."""
    return AutoTokenizer.from_pretrained(str(tokenizer_folder))


def templated(template: str, limits: TemplateLimits | None = None) -> Tokenizer:
    """A tokenizer with nothing but a chat template."""
    tokenizer = Tokenizer(BaseTokenizer(models.BPE()), template, template_name="folder/chat_template.jinja")
    tokenizer.template_limits = limits or tokenizer.template_limits
    return tokenizer


# Messages.


@dataclasses.dataclass
class DataclassMessage:
    role: str
    content: str


class PydanticMessage(pydantic.BaseModel):
    role: str
    content: str
    tool_calls: list[Any] | None = None


@pytest.mark.parametrize(
    "message",
    [
        DataclassMessage("user", "What is 2 + 2?"),
        PydanticMessage(role="user", content="What is 2 + 2?"),
        {**USER, "tool_calls": None, "reasoning_content": None},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]},
        {"role": "user", "content": ({"text": "What is 2 + 2?"},)},
    ],
    ids=["dataclass", "pydantic", "fields that are None", "text parts", "part without a type"],
)
def test_messages_in_other_forms_render_the_same(tokenizer, message):
    assert tokenizer.apply_chat_template([message]) == tokenizer.apply_chat_template([USER])


@pytest.mark.parametrize("content", [{"content": None}, {}], ids=["null", "missing"])
def test_content_null_beside_tool_calls_is_empty(tokenizer, reference, content):
    conversation = [USER, {"role": "assistant", **content, "tool_calls": [CALL]}]
    expected = tokenizer.apply_chat_template([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}])
    assert tokenizer.apply_chat_template(conversation) == expected
    given = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert expected == reference.apply_chat_template(given, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("role", ["developer", "User", "human"])
def test_a_message_that_the_template_leaves_out_is_refused(tokenizer, role):
    message = {"role": role, "content": "Be brief."}
    with pytest.raises(ValueError, match=rf"leaves out messages\[1\], whose role is '{role}'; use system, user, "):
        tokenizer.apply_chat_template([USER, message, USER])
    generic = templated("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    assert generic.apply_chat_template([message]) == f"{role}: Be brief."


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_content_null_is_empty_for_every_role(tokenizer, role):
    expected = tokenizer.apply_chat_template([USER, {"role": role, "content": ""}, USER])
    assert tokenizer.apply_chat_template([USER, {"role": role, "content": None}, USER]) == expected


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], r"\[0\] is a part of type 'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "input_audio"}], r"\[1\] is a part of type 'input_audio'"),
        ([{"type": "text"}], r"\[0\] is a text part without text"),
        ([{"type": "text", "text": 3}], r"\[0\] is a text part without text"),
        (["text"], r"\[0\] is a part of type 'str'"),
        ({"text": "a"}, " must be text, a list of text parts or None, got dict"),
        (b"text", r" must be text, a number, a list or a dict, got bytes; decode it first"),
        (object(), r" must be text, a number, a list or a dict, got object"),
        ("hi \ud83d", r" holds the lone surrogate '\\ud83d' at character 3"),
        ([{"type": "text", "text": "\udfff"}], r".*\[0\].*holds the lone surrogate '\\udfff' at character 0"),
    ],
)
def test_content_that_cannot_be_read_is_refused_naming_its_place(tokenizer, content, named):
    with pytest.raises(ValueError, match=rf"messages\[1\]\['content'\]{named}"):
        tokenizer.apply_chat_template([USER, {"role": "user", "content": content}])


@pytest.mark.parametrize(
    "given",
    [
        {"tools": [{"type": "function", "function": {"name": "a\ud800"}}]},
        {"documents": [{"title": "\ud800"}]},
        {"note": {"\ud800": 1}},
    ],
    ids=["tools", "documents", "variables"],
)
def test_lone_surrogates_are_refused_wherever_they_stand(tokenizer, given):
    with pytest.raises(ValueError, match=rf"{next(iter(given))}.* holds the lone surrogate '\\ud800' at character \d"):
        tokenizer.apply_chat_template([USER], **given)


def test_a_message_that_holds_itself_is_refused(tokenizer):
    message: dict[str, Any] = dict(USER)
    message["self"] = message
    with pytest.raises(ValueError, match=r"messages\[0\] is nested too deeply, or holds itself"):
        tokenizer.apply_chat_template([message])


def test_templates_see_numbers_of_numpy_as_numbers():
    assert templated("{{ n | tojson }}").apply_chat_template([USER], n=np.int64(3)) == "3"


# Continued messages.


def test_continue_final_message_equals_transformers(tokenizer, reference):
    for begun in ("The answer is ", "4", " \n4 ", "<think>\n2 + 2", "It is <b>4</b>"):
        messages = [USER, {**BEGUN, "content": begun}]
        expected = reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert tokenizer.apply_chat_template(messages, continue_final_message=True) == expected


def test_continue_final_message_of_text_parts(tokenizer):
    parts = [{"type": "text", "text": "The answer "}, {"type": "text", "text": "is "}]
    expected = tokenizer.apply_chat_template([USER, BEGUN], continue_final_message=True)
    assert expected.endswith("The answer is ")
    assert tokenizer.apply_chat_template([USER, {**BEGUN, "content": parts}], continue_final_message=True) == expected


def test_continue_final_message_continues_the_reasoning(tokenizer):
    message = {"role": "assistant", "content": "", "reasoning_content": "2 + 2 is"}
    text = tokenizer.apply_chat_template([USER, message], continue_final_message="reasoning_content")
    assert text.endswith("<|im_start|>assistant\n<think>\n2 + 2 is")


def test_continue_final_message_and_a_generation_prompt_exclude_each_other(tokenizer, reference):
    options = {"continue_final_message": True, "add_generation_prompt": True}
    with pytest.raises(ValueError, match="continue_final_message or add_generation_prompt"):
        tokenizer.apply_chat_template([USER, BEGUN], **options)
    with pytest.raises(ValueError, match="add_generation_prompt"):
        reference.apply_chat_template([USER, BEGUN], **options)


@pytest.mark.parametrize(
    ("message", "field", "words"),
    [
        ({"role": "assistant"}, True, "the final message has no text in 'content'"),
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, "reasoning_content", "no text in 'reasoning_con"),
        ({**BEGUN, "mood": "fine"}, "mood", "does not read the field 'mood'"),
    ],
)
def test_continue_final_message_that_is_impossible_is_refused(tokenizer, message, field, words):
    with pytest.raises(ValueError, match=words):
        tokenizer.apply_chat_template([USER, message], continue_final_message=field)


def test_continue_final_message_is_refused_where_the_template_changes_the_text():
    template = templated("{{ messages[-1].content | upper }}")
    with pytest.raises(ValueError, match="does not write 'content' of the final message as it is"):
        template.apply_chat_template([BEGUN], continue_final_message=True)


# Keywords of transformers' method.


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("padding", True),
        ("truncation", True),
        ("max_length", 10),
        ("return_tensors", "pt"),
        ("return_dict", True),
        ("return_assistant_tokens_mask", True),
        ("tokenizer_kwargs", {"a": 1}),
        ("conversation", [USER]),
        ("padding", 0),
    ],
)
def test_keywords_that_are_not_supported_are_refused(tokenizer, keyword, value):
    with pytest.raises(ValueError, match=f"^{keyword} is not supported"):
        tokenizer.apply_chat_template([USER], **{keyword: value})


def test_keywords_that_change_nothing_are_accepted(tokenizer):
    neutral = {"padding": False, "truncation": False, "max_length": None, "return_tensors": None, "return_dict": False}
    assert tokenizer.apply_chat_template([USER], **neutral) == tokenizer.apply_chat_template([USER])


def test_another_template_may_be_passed(tokenizer):
    assert tokenizer.apply_chat_template([USER], chat_template="{{ messages | length }}") == "1"
    assert tokenizer.apply_chat_template([USER]).startswith("<|im_start|>")


# Functions as tools.


class Unit(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


def weather(city: str, days: int = 1, unit: Literal["c", "f"] = "c") -> str:
    """Get the weather.

    Args:
        city: The name of the city,
            with its country.
        days: How many days.
        unit: Celsius or Fahrenheit.

    Returns:
        A sentence.
    """
    return f"{city} {days} {unit}"


def search(
    words: list[str], filters: dict[str, int] | None = None, box: tuple[float, float] = (0.0, 0.0), exact: bool = False
):
    """Search for words.

    Args:
        words: The words.
        filters: Numbers by name.
        box: Where (choices: ["here", "there"])
        exact: No stemming.
    """


def nothing():
    """Do nothing."""


def optional(value: Optional[int] = None, both: int | str = 0, anything: Any = None):  # noqa: UP045
    """Take values.

    Args:
        value: An integer.
        both: A number or its name.
        anything: Anything.
    """


@pytest.mark.parametrize("function", [weather, search, nothing, optional])
def test_function_schema_equals_transformers(function):
    assert function_schema(function) == get_json_schema(function)


def test_functions_and_schemas_may_stand_side_by_side(tokenizer):
    tools = [weather, get_json_schema(nothing)]
    expected = tokenizer.apply_chat_template([USER], [get_json_schema(weather), get_json_schema(nothing)])
    assert tokenizer.apply_chat_template([USER], tools) == expected


def untyped(a):
    """Do.

    Args:
        a: It.
    """


def undescribed(a: int):
    """Do."""


def undocumented(a: int):
    pass


def unreadable(a: Unit, b: threading.Lock):  # type: ignore[valid-type]
    """Do.

    Args:
        a: It.
        b: A lock.
    """


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (untyped, "parameter a has no type hint"),
        (undescribed, "no description of a under 'Args:'"),
        (undocumented, "it has no docstring"),
        (unreadable, "has no JSON schema"),
    ],
)
def test_functions_that_cannot_be_described_are_refused(tokenizer, function, words):
    with pytest.raises(ValueError, match=f"the function {function.__name__} cannot be described as a tool: .*{words}"):
        tokenizer.apply_chat_template([USER], [function])


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        (weather, "tools must be a list"),
        ({}, "tools must be a list"),
        (["weather"], r"tools\[0\] must be a JSON sch"),
        ([int], r"tools\[0\] must be a JSON schema \(a dict\) or a function, got type"),
    ],
)
def test_tools_of_other_types_are_refused(tokenizer, tools, words):
    with pytest.raises(ValueError, match=words):
        tokenizer.apply_chat_template([USER], tools)


# Bounds.

ENDLESS = {
    "long loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long loop with output": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "doubled text": "{% set n = namespace(t='x') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "added text": "{% set n = namespace(t='x') %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "repeated text": "{{ 'x' * 10 ** 10 }}",
    "repeated list": "{{ ([1] * 10 ** 10) | length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "wide field": "{{ '%999999999d' % 1 }}",
    "wide format": "{{ '{:999999999}'.format(1) }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "center": "{{ 'x' | center(10 ** 10) }}",
    "ljust": "{{ 'x'.ljust(10 ** 10) }}",
    "indent": "{{ ('x\n' * 10000) | indent(10 ** 7) }}",
    "replace": "{% set n = namespace(t='xx') %}"
    "{% for i in range(99) %}{% set n.t = n.t.replace('x', n.t) %}{% endfor %}",
    "replace filter": "{{ ('x' * 10 ** 6) | replace('x', 'x' * 10 ** 6) }}",
    "join": "{{ range(99999) | join('x' * 10 ** 6) }}",
    "nested lists": "{% set n = namespace(t=[1]) %}"
    "{% for i in range(99) %}{% set n.t = [n.t, n.t] %}{% endfor %}{{ n.t }}",
    "batch": "{{ [1] | batch(10 ** 10, 0) | list | length }}",
    "sum of lists": "{{ ([[1, 2]] * 9999) | sum(start=[]) | length }}",
    "json indent": "{{ messages | tojson(indent=10 ** 9) }}",
    "macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "constant folded while compiling": "{% set x = 'x' * 10 ** 10 %}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_templates_that_loop_or_grow_end_with_an_error_that_names_them(template):
    tokenizer = templated(template, TemplateLimits(max_chars=100_000, max_seconds=0.3))
    with pytest.raises(ValueError, match=r"folder/chat_template\.jinja .*template_limits"):
        tokenizer.apply_chat_template([USER])


@pytest.mark.parametrize("items", ["range(99999)", "loop"])
def test_a_large_text_is_refused_before_it_is_made(items):
    joined = f"{{{{ {items} | join('x' * 1000) | length }}}}"  # 100 million characters
    tokenizer = templated(f"{{% for x in range(99999) %}}{{% if loop.first %}}{joined}{{% endif %}}{{% endfor %}}")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="template_limits"):
            tokenizer.apply_chat_template([USER])
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_time_is_bounded_whatever_the_size(monkeypatch):
    now = iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    tokenizer = templated("{% for i in range(999) %}{% endfor %}", TemplateLimits(max_chars=10**9, max_seconds=50))
    with pytest.raises(ValueError, match="took longer than max_seconds=50"):
        tokenizer.apply_chat_template([USER])


def test_a_giant_template_is_not_compiled():
    with pytest.raises(ValueError, match="has 300000 characters; templates of up to 200000 are compiled"):
        templated("x" * 300_000).apply_chat_template([USER])


def test_limits_do_not_touch_long_conversations(tokenizer):
    turns = [USER, {"role": "assistant", "content": "word " * 200}] * 400  # 400,000 characters
    text = tokenizer.apply_chat_template([*turns, USER])
    assert len(text) > 400_000 and text.endswith("<|im_start|>assistant\n")


def test_limits_are_per_rendering_and_per_thread():
    tokenizer = templated("{% for i in range(1000) %}{{ 'x' * 50 }}{% endfor %}", TemplateLimits(max_chars=100_000))
    texts: list[Any] = []
    threads = [threading.Thread(target=lambda: texts.append(tokenizer.apply_chat_template([USER]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["x" * 50_000] * 4
