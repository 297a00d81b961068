"""Structured replies: whatever is chosen among the allowed tokens, the reply follows its schema or its pattern."""

from __future__ import annotations

import json
import random
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BaseTokenizer
from tokenizers import normalizers

from qwen3fast.sampling.constraints import AfterReasoning, AllOf, ThinkingBudget, TokenConstraint, bits_of
from qwen3fast.sampling.grammar import Grammar, GrammarCompiler
from qwen3fast.text.reasoning import CLOSING_TEXT, ReasoningFormat, ReasoningTracker
from qwen3fast.text.tokenizer import Tokenizer

PADDING = 77  # ids that the model has and the tokenizer has not; the last word of the mask is not full, either
SCHEMAS = {
    "any object": {"type": "object"},
    "flat": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": -3, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "list": {"type": "array", "items": {"type": "integer", "minimum": 18, "maximum": 23}, "minItems": 2, "maxItems": 4},
    "choice": {"enum": ["cat", "dog", 3, None, "naïve <think>"]},
    "nested": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["circle", "square"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
            "centre": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "seen": {"type": "boolean"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
        "required": ["kind", "centre"],
        "additionalProperties": False,
    },
}
PATTERNS = [
    r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]",
    r"[a-z.]{1,12}@[a-z]{2,8}\.(com|org|de)",
    r"(yes|no|maybe)(, (yes|no|maybe)){0,3}",
    r"^[^x]{0,6}$",
    r"(?s:.{3})",
    r"a*(é|è|今天)?",
]
# Words, and a pattern of just these words.
LANGUAGES = [
    (["foo", "bar", "foox", "barx"], "(foo|bar)x?"),
    (["the", "then", "there", "theory", "to", "cat", "ca"], "the(n|re|ory)?|to|cat?"),
    ([a + b + c for a in "abc" for b in ["", *"abc"] for c in ["", "a"]], "[abc][abc]?a?"),
    (["é", "èu", "êu", "今", "仁"], "é|èu|êu|今|仁"),
    (["", " ", "  "], " {0,2}"),
]


@pytest.fixture(scope="module")
def eos_ids(tokenizer: Tokenizer) -> list[int]:
    """Two ids that end a reply, the smaller not first."""
    return [tokenizer.base.token_to_id("<|im_end|>"), tokenizer.base.token_to_id("<|endoftext|>")]


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, eos_ids: list[int]) -> GrammarCompiler:
    """For a model whose vocabulary is larger than the tokenizer's."""
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING, eos_ids)


@pytest.fixture(scope="module")
def new_mask(tokenizer: Tokenizer):
    """A function that gives a mask with every bit set, also those beyond the vocabulary."""
    return lambda: np.full((tokenizer.vocab_size + PADDING + 31) // 32, -1, np.int32)


@pytest.fixture(scope="module")
def allowed(new_mask):
    """A function: which tokens a constraint allows next."""

    def ids(constraint: TokenConstraint) -> list[int]:
        words_W = new_mask()
        if constraint.is_active():
            constraint.fill_mask(words_W)
        return np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little")).tolist()

    return ids


@pytest.fixture(scope="module")
def walk(tokenizer: Tokenizer, eos_ids: list[int], allowed):
    """A function: the tokens of a reply whose every token is drawn among the allowed ones, without the last."""
    # After 40 tokens JSON is brought to an end: quotes and brackets close, where they can.
    closing = [tokenizer.base.token_to_id(text) for text in '"}]']

    def reply(constraint: TokenConstraint, seed: int) -> list[int]:
        rng, tokens = random.Random(seed), []
        while len(tokens) < 1000:
            may_come = allowed(constraint)
            if len(tokens) > 40:
                may_come = [i for i in eos_ids + closing if i in may_come][:1] or may_come
            token = rng.choice(may_come)
            constraint.accept(token)
            if token in eos_ids:
                assert allowed(constraint) == sorted(eos_ids)
                return tokens
            tokens.append(token)
        pytest.fail(f"no end to {tokenizer.decode(tokens)!r}")

    return reply


def is_valid(value, schema: dict) -> bool:
    """Return whether a value follows a schema (only the keywords used in this file)."""
    if "enum" in schema:
        return value in schema["enum"] and not isinstance(value, bool)
    if schema["type"] == "object":
        fields = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", [])) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(fields))
            and all(is_valid(value[name], fields[name]) for name in set(value) & set(fields))
        )
    if schema["type"] == "array":
        return (
            isinstance(value, list)
            and schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
            and all(is_valid(item, schema["items"]) for item in value)
        )
    if schema["type"] == "integer":
        return type(value) in (int, float) and value % 1 == 0 and schema["minimum"] <= value <= schema["maximum"]
    return type(value) in {"string": (str,), "number": (int, float), "boolean": (bool,)}[schema["type"]]


@pytest.mark.parametrize("name", SCHEMAS)
@given(seed=st.integers(0, 2**32))
def test_json_schema_holds_for_every_reply(name, seed, compiler, walk, tokenizer):
    text = tokenizer.decode(walk(compiler.json_schema(SCHEMAS[name]).start(), seed))
    assert is_valid(json.loads(text), SCHEMAS[name]), text


@pytest.mark.parametrize("pattern", PATTERNS)
@given(seed=st.integers(0, 2**32))
def test_regex_matches_every_reply(pattern, seed, compiler, walk, tokenizer):
    text = tokenizer.decode(walk(compiler.regex(pattern).start(), seed))
    assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(("words", "pattern"), LANGUAGES, ids=[pattern for _, pattern in LANGUAGES])
def test_regex_allows_exactly_the_tokens_that_some_word_goes_on_with(words, pattern, compiler, tokenizer, allowed):
    vocabulary = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if not tokenizer.is_special(i)}
    texts = {word.encode() for word in words}
    grammar, unseen, complete = compiler.regex(pattern), [()], set()
    while unseen:
        tokens = unseen.pop()
        constraint = grammar.start()
        for token in tokens:
            constraint.accept(token)
        before = b"".join(vocabulary[token] for token in tokens)
        rest = [text[len(before) :] for text in texts if text.startswith(before)]
        ends = {i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)} & set(allowed(constraint))
        may_come = set(allowed(constraint)) - ends
        expected = {i for i, piece in vocabulary.items() if any(text.startswith(piece) for text in rest)}
        assert bool(ends) == (b"" in rest)
        if len({text[:1] for text in rest}) == 1 and expected:  # no choice of text: one token of it may stand for all
            assert may_come and may_come <= expected
        else:
            assert may_come == expected
        unseen += [(*tokens, i) for i in may_come]
        complete |= {before} if ends else set()
    assert complete == texts


def test_regex_forces_the_tokenizers_own_tokens_where_there_is_no_choice(compiler, walk, tokenizer):
    text = "The capital of France is Paris"
    assert walk(compiler.regex(f"{text}(!|[?])").start(), seed=0)[:-1] == tokenizer.encode(text)


@pytest.mark.parametrize("start", ["", "1", "12"])
def test_grammar_allows_an_end_exactly_when_the_reply_is_complete(start, compiler, tokenizer, allowed, eos_ids):
    constraint = compiler.regex("[0-9]([0-9][a-z])?").start()
    for token in [tokenizer.base.token_to_id(digit) for digit in start]:
        constraint.accept(token)
    assert set(eos_ids) & set(allowed(constraint)) == (set(eos_ids) if len(start) == 1 else set())


@pytest.mark.parametrize("which", [0, 1])
def test_grammar_allows_only_an_end_after_either_end(which, compiler, allowed, eos_ids):
    constraint = compiler.regex("a?").start()
    for _ in range(3):
        constraint.accept(eos_ids[which])
        assert allowed(constraint) == sorted(eos_ids)


def test_grammar_takes_an_end_for_no_text(tokenizer, allowed):
    letter = tokenizer.base.token_to_id("b")
    constraint = GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING, [letter]).regex("[ab]c").start()
    assert letter not in allowed(constraint)


@pytest.mark.parametrize("pattern", ["(?s:.*)", "[^x]{2,}", r"\S+"])
def test_grammar_never_allows_padding_or_added_tokens(pattern, compiler, allowed, tokenizer, eos_ids):
    constraint = compiler.regex(pattern).start()
    added = set(tokenizer.base.get_added_tokens_decoder())
    for _ in range(3):
        may_come = set(allowed(constraint))
        assert max(may_come) < tokenizer.vocab_size
        assert may_come & added <= set(eos_ids)
        constraint.accept(min(may_come))


@pytest.mark.parametrize("text", ["<|im_end|>", "a <think> b</think>", "<|endoftext|>!"])
def test_grammar_writes_the_names_of_control_tokens_in_ordinary_ones(text, compiler, walk, tokenizer):
    for grammar in (compiler.json_schema({"const": text}), compiler.regex(re.escape(json.dumps(text)))):
        tokens = walk(grammar.start(), seed=0)
        assert json.loads(tokenizer.decode(tokens)) == text
        assert not set(tokens) & set(tokenizer.base.get_added_tokens_decoder())


def test_grammar_keeps_characters_that_the_tokenizer_would_compose(tokenizer, eos_ids, walk):
    composing = BaseTokenizer.from_str(tokenizer.base.to_str())
    composing.normalizer = normalizers.NFC()
    compiler = GrammarCompiler(Tokenizer(composing), tokenizer.vocab_size + PADDING, eos_ids)
    text = "cafe\u0301"
    assert tokenizer.decode(walk(compiler.regex(text).start(), seed=0)) == text


@given(seed=st.integers(0, 2**32))
def test_grammar_clears_bits_and_sets_none(seed, compiler, new_mask):
    constraint = compiler.json_schema({"type": "object"}).start()
    alone, before = new_mask(), new_mask()
    before[:] = np.random.default_rng(seed).integers(-(2**31), 2**31, len(before))
    together = before.copy()
    constraint.fill_mask(alone)
    constraint.fill_mask(together)
    assert np.array_equal(together, alone & before)


def test_grammar_serves_replies_that_do_not_disturb_each_other(compiler, walk, allowed, eos_ids):
    grammar = compiler.json_schema(SCHEMAS["nested"])
    replies = [walk(grammar.start(), seed) for seed in range(6)]
    constraints = [grammar.start() for _ in replies]
    for position in range(max(map(len, replies)) + 1):  # the same replies, a token of each in turn
        for reply, constraint in zip(replies, constraints, strict=True):
            if position <= len(reply):
                token = [*reply, eos_ids[0]][position]
                assert token in allowed(constraint)
                constraint.accept(token)


def test_grammar_survives_a_reply_that_failed(compiler, allowed):
    grammar = compiler.regex("[ab]+")
    before = allowed(grammar.start())
    with pytest.raises(RuntimeError):
        grammar.start().accept(0)
    assert allowed(grammar.start()) == before


@pytest.mark.parametrize("forbidden", ["another text", "end", "padding", "control token"])
def test_grammar_reports_a_token_that_it_had_forbidden(forbidden, compiler, tokenizer, eos_ids, new_mask):
    token = {
        "another text": tokenizer.base.token_to_id("x"),
        "end": eos_ids[0],
        "padding": tokenizer.vocab_size,
        "control token": tokenizer.base.token_to_id("<think>"),
    }[forbidden]
    constraint = compiler.regex("[ab]+").start()
    with pytest.raises(RuntimeError, match=r"cannot follow its grammar: .") as caught:
        constraint.accept(token)
    assert "<state>" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"cannot follow its grammar: ."):
        constraint.fill_mask(new_mask())


def test_grammar_of_an_answer_leaves_the_reasoning_before_it_free(compiler, walk, tokenizer, eos_ids):
    reasoning = ReasoningFormat(tokenizer)
    tracker = ReasoningTracker(reasoning, is_open=True)
    closing = [*tokenizer.encode(CLOSING_TEXT), reasoning.end_id, *tokenizer.encode("\n\n")]
    for seed in range(10):
        answer = compiler.json_schema(SCHEMAS["flat"]).start()
        constraint = AllOf(
            [
                ThinkingBudget(5, reasoning, tracker),
                AfterReasoning(answer, reasoning, tracker),
                _Without([*eos_ids, reasoning.end_id], 5),
            ]
        )
        tokens = walk(constraint, seed)
        assert tokens[5 : 5 + len(closing)] == closing
        assert is_valid(json.loads(tokenizer.decode(tokens[5 + len(closing) :])), SCHEMAS["flat"])


class _Without:
    """Forbids some tokens among the first of a reply."""

    def __init__(self, token_ids: list[int], num_tokens: int) -> None:
        self._token_ids = token_ids
        self._tokens_left = num_tokens

    def is_active(self) -> bool:
        return self._tokens_left > 0

    def fill_mask(self, words_W: np.ndarray) -> None:
        words_W &= ~bits_of(self._token_ids, len(words_W))

    def accept(self, token: int) -> None:
        self._tokens_left -= 1

    def is_free_for(self, num_tokens: int) -> bool:
        return False


def test_json_schema_reads_a_dictionary_and_its_text_alike(compiler, walk):
    schema = SCHEMAS["nested"]
    as_text = compiler.json_schema(json.dumps(schema))
    assert walk(as_text.start(), seed=1) == walk(compiler.json_schema(schema).start(), seed=1)


def test_json_schema_limits_whitespace(compiler, tokenizer, allowed):
    constraint = compiler.json_schema({"type": "object"}).start()
    [space], [line] = tokenizer.encode(" "), tokenizer.encode("\n")
    constraint.accept(tokenizer.base.token_to_id("{"))
    constraint.accept(space)
    assert not {space, line} & set(allowed(constraint))  # a single space, or
    constraint = compiler.json_schema({"type": "object"}).start()
    for token in (tokenizer.base.token_to_id("{"), line, line, *[space] * 20):
        assert token in allowed(constraint)
        constraint.accept(token)
    assert not {space, line} & set(allowed(constraint))
    separated = {"type": "object", "x-guidance": {"item_separator": ", "}}
    constraint = compiler.json_schema(separated).start()
    constraint.accept(tokenizer.base.token_to_id("{"))
    constraint.accept(space)
    assert not {space, line} & set(allowed(constraint))  # with options of its own


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "bogus"}, "cannot be used: .*bogus"),
        ('{"type": ', "cannot be used: Expecting value"),
        ("[" * 100_000, "cannot be used: .*recursion"),
        ('["object"]', r'must be an object such as .*, got \["object"\]'),
        ("true", "must be an object"),
        (None, "must be an object"),
        ({"type": {1, 2}}, "cannot be used: .*set"),
        ({"minimum": float("nan")}, "cannot be used: .*float"),
        ({"type": "string", "pattern": "("}, "cannot be used: .*unclosed group"),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, "cannot be used: .*/nowhere"),
        ({"type": "array", "uniqueItems": True}, "cannot be used: .*uniqueItems"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, r"cannot be used: .*minimum \(5\)"),
        ({"enum": []}, "cannot be used: ."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_json_schema_refuses_what_it_cannot_follow(schema, reason, compiler):
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        compiler.json_schema(schema)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "cannot be used: .*unclosed group"),
        (r"a(?=b)", "cannot be used: .*look-around"),
        (r"(a)\1", "cannot be used: .*backreferences"),
        (r"[^\s\S]", "allows no reply at all: ."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_regex_refuses_what_it_cannot_follow(pattern, reason, compiler):
    with pytest.raises(ValueError, match=f"(?s){reason}"):
        compiler.regex(pattern)


@pytest.mark.parametrize("eos_ids", [[], [3, 2000], [-1]])
def test_grammar_compiler_refuses_ends_outside_the_vocabulary(eos_ids, tokenizer):
    with pytest.raises(ValueError, match=re.escape(f"ids below 1101, got {sorted(eos_ids)}")):
        GrammarCompiler(tokenizer, 1101, eos_ids)


def test_grammar_compiler_works_without_ids_to_spare(tokenizer, eos_ids):
    assert isinstance(GrammarCompiler(tokenizer, tokenizer.vocab_size, eos_ids).regex("a"), Grammar)


def test_grammar_compiler_says_how_to_install_what_it_needs(tokenizer, eos_ids, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'qwen3fast[structured]'")):
        GrammarCompiler(tokenizer, tokenizer.vocab_size, eos_ids)


def test_grammar_of_lark_is_followed(compiler, walk, tokenizer):
    grammar = compiler.lark('start: "a" (B | "c")+\nB: /[xy]{2}/')
    for seed in range(3):
        assert re.fullmatch(r"a([xy]{2}|c)+", tokenizer.decode(walk(grammar.start(), seed)))


@pytest.mark.parametrize("text", ["", "begin: a", 'start: "a', "start: <no_such_token>"])
def test_grammar_of_lark_that_is_none_is_refused(compiler, text):
    with pytest.raises(ValueError, match=r"^this grammar cannot be used"):
        compiler.lark(text)
