"""Replies that follow a JSON schema or a regular expression, through the optional package llguidance.

Owns how our tokenizer is shown to llguidance, and how its matchers become constraints. Knows no model and no engine.
Key of names: W words of a mask, ceil(vocab_size / 32).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import numpy as np
from tokenizers import Tokenizer as BaseTokenizer

from qwen3fast.sampling.constraints import TokenConstraint, bits_of
from qwen3fast.text.tokenizer import Tokenizer

# What may stand, and need not, between two parts of a JSON text. With no limit a model can fill its whole reply with
# line breaks (llama.cpp limits it for the same reason); 40 characters are a line break and nine levels of indentation.
JSON_WHITESPACE = r"[ \n\r\t]{1,40}"


class GrammarError(RuntimeError):
    """A grammar that cannot be followed any further, such as one beyond llguidance's limits."""


class GrammarCompiler:
    """Compiles schemas and patterns for one vocabulary. Building it takes about a second for 151 thousand tokens.

    vocab_size: that of the model, which may be larger than the tokenizer's; ids without a token are never allowed.
    eos_ids: the ids of which any may end a reply, and of which one must.
    Raises: ImportError without llguidance; ValueError without an end-of-sequence id inside the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]) -> None:
        if not eos_ids or not all(0 <= i < vocab_size for i in eos_ids):
            raise ValueError(f"eos_ids must be one or more ids below {vocab_size}, got {sorted(eos_ids)}")
        self._llguidance = _import_llguidance()
        vocabulary = _Vocabulary(tokenizer, vocab_size, eos_ids)
        self._ll_tokenizer = self._llguidance.LLTokenizer(self._llguidance.TokenizerWrapper(vocabulary))
        self._eos_ids = frozenset(eos_ids)
        self._eos_W = bits_of(eos_ids, (vocab_size + 31) // 32)

    def json_schema(self, schema: dict[str, Any] | str) -> Grammar:
        """A grammar of the JSON texts that are valid under a schema; {"type": "object"} allows any object.

        schema: as a dictionary or as JSON text.
        Raises: ValueError for what is no schema, uses a keyword that llguidance lacks, or allows nothing.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as err:
            raise ValueError(f"this JSON schema cannot be used: {err}") from err
        if not isinstance(parsed, dict):
            raise ValueError(f"a JSON schema must be an object such as {{'type': 'object'}}, got {text[:100]}")
        # A schema may carry llguidance's own options under "x-guidance", as the one of forced tool calls does.
        options = None if "x-guidance" in parsed else {"whitespace_pattern": JSON_WHITESPACE}
        definition = self._llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)
        return self._compile(definition, "JSON schema")

    def regex(self, pattern: str) -> Grammar:
        """A grammar of the texts that a regular expression matches from their first to their last character.

        pattern: in the syntax of Rust's regex crate: no look-around, no references to groups.
        Raises: ValueError for an invalid pattern, or one that matches nothing.
        """
        if not isinstance(pattern, str):
            raise ValueError(f"a regular expression must be a string, got {pattern!r}")
        return self._compile(self._llguidance.LLMatcher.grammar_from_regex(pattern), "regular expression")

    def lark(self, grammar: str) -> Grammar:
        """A grammar in llguidance's form of Lark, whose start rule is `start`.

        Raises: ValueError for an invalid grammar, or one that allows nothing.
        """
        if not isinstance(grammar, str):
            raise ValueError(f"a grammar must be a string, got {grammar!r}")
        return self._compile(self._llguidance.LLMatcher.grammar_from_lark(grammar), "grammar")

    def _compile(self, definition: str, kind: str) -> Grammar:
        matcher = self._llguidance.LLMatcher(self._ll_tokenizer, definition, log_level=0)
        if matcher.is_error():
            raise ValueError(f"this {kind} cannot be used: {_error_of(matcher)}")
        grammar = Grammar(matcher, self._eos_ids, self._eos_W)
        try:  # a grammar that allows nothing shows it only when asked for a token
            grammar.start().fill_mask(np.full_like(self._eos_W, -1))
        except RuntimeError as err:
            raise ValueError(f"this {kind} allows no reply at all: {err}") from err
        return grammar


class Grammar:
    """A compiled schema or pattern. It serves any number of replies at once, all from one thread."""

    def __init__(self, matcher: Any, eos_ids: frozenset[int], eos_W: np.ndarray) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._eos_W = eos_W

    def start(self) -> TokenConstraint:
        """A constraint for a new reply (a few microseconds).

        Where the grammar leaves no choice of text, the tokenizer's own tokens for it are forced, since a model has
        seldom seen others. Once the reply is complete, only an end of sequence is allowed.
        Its methods raise GrammarError if llguidance gives up (its limits) or was given a forbidden token.
        """
        return _GrammarConstraint(self._matcher.deep_copy(), self._eos_ids, self._eos_W)


class _GrammarConstraint:
    """llguidance's matcher for one reply, as a TokenConstraint."""

    def __init__(self, matcher: Any, eos_ids: frozenset[int], eos_W: np.ndarray) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._eos_id = min(eos_ids)  # the one that llguidance knows
        self._eos_W = eos_W
        # A buffer of its own for each reply, because llguidance lets other threads run while it writes.
        self._allowed_W = np.zeros_like(eos_W)

    def is_active(self) -> bool:
        return True

    def fill_mask(self, words_W: np.ndarray) -> None:
        allowed_W = self._allowed_W
        self._matcher.unsafe_compute_mask_ptr(allowed_W.ctypes.data, allowed_W.nbytes)
        self._raise_on_error()
        if np.any(allowed_W & self._eos_W):
            allowed_W |= self._eos_W
        words_W &= allowed_W

    def accept(self, token: int) -> None:
        self._matcher.consume_token(self._eos_id if token in self._eos_ids else token)
        self._raise_on_error()

    def _raise_on_error(self) -> None:
        # Also after a mask: in its state of error llguidance writes one that allows the end of sequence.
        if self._matcher.is_error():
            raise GrammarError(f"the reply cannot follow its grammar: {_error_of(self._matcher)}")


class _Vocabulary:
    """Our tokenizer as llguidance.TokenizerWrapper reads it.

    llguidance can read tokenizer.json itself, but then writes text of a schema such as "<|im_end|>" as the control
    token, which ends the reply. Here added tokens are no text, and text is never tokenized into them.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]) -> None:
        self.eos_token_id = min(eos_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = sorted({*tokenizer.base.get_added_tokens_decoder(), *eos_ids})
        # The bare model: no added tokens, and no normalizer (Qwen's composes characters, which changes the bytes).
        self._plain = BaseTokenizer(tokenizer.base.model)
        if tokenizer.base.pre_tokenizer is not None:
            self._plain.pre_tokenizer = tokenizer.base.pre_tokenizer

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text that the grammar forces."""
        return self._plain.encode(text, add_special_tokens=False).ids


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as err:
        raise ImportError(
            "JSON schemas and regular expressions need llguidance; run: pip install 'qwen3fast[structured]'"
        ) from err
    return llguidance


def _error_of(matcher: Any) -> str:
    """llguidance's message without the dump of its state that follows in newer versions."""
    return matcher.get_error().partition("<state>")[0].strip()
