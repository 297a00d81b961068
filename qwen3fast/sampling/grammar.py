"""Replies that follow a JSON schema or a regular expression, through the optional package llguidance.

It passes our tokenizer's vocabulary to llguidance and wraps llguidance's matchers as constraints. It knows no model and
no engine.

W 32-bit words of a mask, ceil(vocab_size / 32)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import numpy as np
from tokenizers import Tokenizer as BaseTokenizer

from qwen3fast.sampling.constraints import TokenConstraint, bits_of
from qwen3fast.text.tokenizer import Tokenizer

# Optional whitespace between two parts of a JSON text, llama.cpp's: a space, or a line break or two and indentation.
# With more, a model can fill most of its reply with it.
JSON_WHITESPACE = r" |\n{1,2}[ \t]{0,20}"


class GrammarError(RuntimeError):
    """The error of a reply that cannot follow its grammar any further, for example beyond llguidance's limits."""


class GrammarCompiler:
    """A compiler of JSON schemas and regular expressions for one vocabulary.

    Building it takes about a second for 151 thousand tokens.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: of the model, which may be larger than the tokenizer's; ids without a token are never allowed.
        eos_ids: end-of-sequence ids; every reply must end with one of them.

    Raises: ImportError without llguidance; ValueError for no eos_ids, or for ids outside the vocabulary.
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
        """Compile a JSON schema to a grammar of the JSON texts that are valid under it.

        schema: a dictionary or JSON text; {"type": "object"} allows any object.
        Raises: ValueError for an invalid schema, a keyword that llguidance does not support, or a schema that allows
        no text.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as err:
            raise ValueError(f"this JSON schema cannot be used: {err}") from err
        if not isinstance(parsed, dict):
            raise ValueError(f"a JSON schema must be an object such as {{'type': 'object'}}, got {text[:100]}")
        # A schema may carry llguidance's own options under "x-guidance", as the one of forced tool calls does.
        options = {"whitespace_pattern": JSON_WHITESPACE}
        definition = self._llguidance.LLMatcher.grammar_from_json_schema(text, defaults=options)
        return self._compile(definition, "JSON schema")

    def regex(self, pattern: str) -> Grammar:
        """Compile a regular expression to a grammar of the texts that it matches as a whole.

        pattern: in the syntax of Rust's regex crate: without look-around and without references to groups.
        Raises: ValueError for an invalid pattern, or one that matches no text.
        """
        return self._compile(self._llguidance.LLMatcher.grammar_from_regex(pattern), "regular expression")

    def lark(self, grammar: str) -> Grammar:
        """Compile a grammar in llguidance's form of Lark, whose start rule is `start`.

        Raises: ValueError for an invalid grammar, or one that allows no text.
        """
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
    """A compiled schema or pattern. Any number of replies may use it at the same time, all from one thread."""

    def __init__(self, matcher: Any, eos_ids: frozenset[int], eos_W: np.ndarray) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._eos_W = eos_W

    def start(self) -> TokenConstraint:
        """Return a constraint for a new reply, within a few microseconds.

        Where the grammar leaves only one text, the tokenizer's own tokens for it are forced: a model has rarely seen
        others. Once the reply is complete, only an end-of-sequence token is allowed.
        The constraint's methods raise GrammarError if llguidance exceeds its limits or receives a forbidden token.
        """
        return _GrammarConstraint(self._matcher.deep_copy(), self._eos_ids, self._eos_W)


class _GrammarConstraint:
    """A TokenConstraint around llguidance's matcher for one reply."""

    def __init__(self, matcher: Any, eos_ids: frozenset[int], eos_W: np.ndarray) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._eos_id = min(eos_ids)  # llguidance knows only one
        self._eos_W = eos_W
        # One buffer per reply: llguidance releases the GIL while it writes.
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

    def is_free_for(self, num_tokens: int) -> bool:
        return False

    def _raise_on_error(self) -> None:
        # Also after writing a mask: in an error state, llguidance writes one that allows the end of sequence.
        if self._matcher.is_error():
            raise GrammarError(f"the reply cannot follow its grammar: {_error_of(self._matcher)}")


class _Vocabulary:
    """Our tokenizer with the attributes that llguidance.TokenizerWrapper reads.

    llguidance can read tokenizer.json itself, but then tokenizes "<|im_end|>" inside a schema as the control token,
    which ends the reply. Here, added tokens are not text, and text is never tokenized into them.
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
        """Return the token ids of a text that the grammar forces."""
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
    """Return llguidance's message without the dump of its state that newer versions append."""
    return str(matcher.get_error()).partition("<state>")[0].strip()
