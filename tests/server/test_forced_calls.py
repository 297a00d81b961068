"""tool_choice: the grammar of a forced call allows what the parser reads back, and nothing else."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from coder_template import CODER_TEMPLATE, NOW, TOOLS, tool

from qwen3fast import SamplingParams
from qwen3fast.sampling.grammar import Grammar, GrammarCompiler
from qwen3fast.server.errors import ApiError
from qwen3fast.server.forced_calls import forced, grammar_of_calls
from qwen3fast.server.sampling import Sampling
from qwen3fast.text.tokenizer import Tokenizer
from qwen3fast.text.tool_calls import ToolCall, XmlCalls, parse_tool_calls

pytest.importorskip("llguidance")

STRICT = tool(
    "strict",
    {
        "city": {"enum": ["Oslo", 'Rome \\ "é"']},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "where": {"$ref": "#/$defs/Point"},
        "really": {"type": "boolean"},
        "text": {"type": "string"},
    },
    required=["city", "days"],
    **{"$defs": {"Point": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "additionalProperties": False}}},
)
FREE = {"type": "function", "function": {"name": "free", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def coder(tokenizer_folder) -> Tokenizer:
    """A tokenizer whose chat template asks for XML."""
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    tokenizer.chat_template = CODER_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def compiler(coder) -> GrammarCompiler:
    """Of grammars for that tokenizer."""
    return GrammarCompiler(coder, coder.vocab_size, [coder.base.token_to_id("<|im_end|>")])


def allows(grammar: Grammar, coder: Tokenizer, text: str) -> bool:
    """Return whether a reply may be this text, token by token, and end then."""
    rule = grammar.start()
    for token in [*coder.encode(text), coder.base.token_to_id("<|im_end|>")]:
        words_W = np.full((coder.vocab_size + 31) // 32, -1, np.int32)
        rule.fill_mask(words_W)
        if not words_W[token // 32] >> token % 32 & 1:
            return False
        rule.accept(token)
    return True


def written(function: str, *parameters: tuple[str, str]) -> str:
    """Return a call as the template writes it."""
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={function}>\n{body}</function>\n</tool_call>"


OSLO, DAYS = ("city", "Oslo"), ("days", "3")
ALLOWED = [
    written("strict", OSLO, DAYS),
    written("strict", ("city", 'Rome \\ "é"'), DAYS, ("where", '{"x": 2}'), ("really", "true"), ("text", "")),
    written("strict", OSLO, DAYS, ("text", "<b>\n\n</par> {1}\n")),
    written("now"),
    written("free"),
    written("free", ("any thing", "a"), ("other", "b\nc")),
]
REFUSED = [
    written("strict"),
    written("strict", OSLO),
    written("strict", DAYS, OSLO),
    written("strict", ("city", "Paris"), DAYS),
    written("strict", OSLO, ("days", "12")),
    written("strict", OSLO, ("days", "three")),
    written("strict", OSLO, DAYS, ("where", '{"x": 3}')),
    written("strict", OSLO, DAYS, ("really", "True")),
    written("strict", OSLO, DAYS, ("text", "a</parameter>")),
    written("strict", OSLO, DAYS, ("text", "a<function=now>")),
    written("strict", OSLO, DAYS, ("more", "a")),
    written("now", ("more", "a")),
    written("other"),
    written("now") + "\n",
    written("now").replace("\n", ""),
    '{"name": "now", "arguments": {}}',
]


@pytest.fixture(scope="module")
def grammar(coder, compiler) -> Grammar:
    """Of a call of one of three functions."""
    now = tool("now", {}, additionalProperties=False)
    return compiler.lark(grammar_of_calls([STRICT, now, FREE], coder))


@pytest.mark.parametrize("text", ALLOWED)
def test_grammar_of_calls_allows_calls_that_follow_the_schema(grammar, coder, text):
    assert allows(grammar, coder, text)
    parsed = parse_tool_calls(text, XmlCalls([STRICT, NOW, FREE]))
    assert (len(parsed.tool_calls), parsed.content) == (1, "")


@pytest.mark.parametrize("text", REFUSED)
def test_grammar_of_calls_refuses_everything_else(grammar, coder, text):
    assert not allows(grammar, coder, text)


def test_grammar_of_calls_without_tokens_for_the_tags_has_them_as_text(coder):
    assert grammar_of_calls([NOW], coder).startswith(f"start: <[{coder.base.token_to_id('<tool_call>')}]>")
    base = type(coder.base).from_str(coder.base.to_str().replace("<tool_call>", "<tool_calm>"))
    assert grammar_of_calls([NOW], Tokenizer(base)).startswith('start: "<tool_call>"')


@pytest.mark.parametrize("seed", range(8))
def test_random_walks_through_the_grammar_are_read_back(grammar, coder, seed):
    rule, rng, ids = grammar.start(), random.Random(seed), []
    closing, end = coder.encode("\n</parameter>\n"), coder.base.token_to_id("<|im_end|>")
    num_closing = 0
    while end not in ids:
        assert len(ids) < 2000
        words_W = np.full((coder.vocab_size + 31) // 32, -1, np.int32)
        rule.fill_mask(words_W)
        allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist()
        token = rng.choice(allowed)
        if len(ids) > 60:  # bring names and values to an end
            wanted = [closing[num_closing], *coder.encode(">")]
            token = next((i for i in wanted if i in allowed), token)
        num_closing = (num_closing + 1) % len(closing) if token == closing[num_closing] else 0
        ids.append(token)
        rule.accept(token)
    answer = coder.decode(ids[:-1])
    parsed = parse_tool_calls(answer, XmlCalls([STRICT, NOW, FREE]))
    assert (len(parsed.tool_calls), parsed.content, parsed.malformed) == (1, "", [])


def test_forced_follows_the_format_of_the_template(tokenizer, coder):
    sampling, is_json = forced(Sampling(SamplingParams()), tokenizer, TOOLS, "now")
    assert is_json
    assert json.loads(sampling.params.json_schema)["properties"]["name"] == {"const": "now"}
    sampling, is_json = forced(Sampling(SamplingParams()), coder, TOOLS, "now")
    assert not is_json
    assert "<function=now>" in sampling.params.grammar
    assert "<function=edit>" not in sampling.params.grammar
    assert "<function=edit>" in forced(Sampling(SamplingParams()), coder, TOOLS, "")[0].params.grammar
    assert forced(Sampling(SamplingParams()), coder, TOOLS, None) == (Sampling(SamplingParams()), False)


@pytest.mark.parametrize("name", ["a<b", "a>b", "a\nb", ""])
def test_forced_refuses_names_that_xml_cannot_hold(coder, name):
    for tools in ([tool(name, {})], [tool("a", {name: {"type": "string"}})]):
        with pytest.raises(ApiError, match="must have"):
            forced(Sampling(SamplingParams()), coder, tools, "")


def test_forced_refuses_schemas_that_repeat_too_much(coder):
    definitions = {f"d{i}": {"type": "integer"} for i in range(2000)}
    properties = {f"p{i}": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/d0"}]} for i in range(2000)}
    with pytest.raises(ApiError, match=r"longer than 4,194,304 characters"):
        forced(Sampling(SamplingParams()), coder, [tool("f", properties, **{"$defs": definitions})], "")


@pytest.mark.parametrize("given", [{"required": True}, {"required": None}, {"properties": 5}, {"properties": {"a": 5}}])
def test_grammar_of_a_damaged_schema_leaves_the_damaged_part_out(coder, compiler, given):
    function = tool("f", {"a": {"enum": 5}})
    function["function"]["parameters"] |= given
    text = grammar_of_calls([function], coder)
    assert allows(compiler.lark(text), coder, written("f", ("a", "b")))


def test_forced_excludes_another_shape(coder):
    with pytest.raises(ApiError, match="exclude each other"):
        forced(Sampling(SamplingParams(grammar='start: "a"')), coder, TOOLS, "")


def test_read_back_of_a_named_tool_has_types():
    [call] = parse_tool_calls(ALLOWED[1], XmlCalls([STRICT])).tool_calls
    arguments = {"city": 'Rome \\ "é"', "days": 3, "where": {"x": 2}, "really": True, "text": ""}
    assert call == ToolCall("strict", arguments)
