"""Metadata of a GGUF file -> our Tokenizer, built like the tokenizer.json that it was converted from.

Source: convert_hf_to_gguf.py of github.com/ggml-org/llama.cpp; for patterns, the tokenizer.json files named below.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, models, normalizers, processors
from tokenizers import Tokenizer as BaseTokenizer

from qwen3fast.checkpoint.gguf.header import Header
from qwen3fast.checkpoint.vocab_files import WORDS, use_byte_level
from qwen3fast.text.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
EMBEDDING = "token_embd.weight"
SPECIAL = {"eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}  # names that chat templates use
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # values of token_type
# The splitting of text into words, before pairs are merged, by llama.cpp's name for it.
PATTERNS = {
    # Qwen2's and Qwen3's, and the same in models distilled from DeepSeek-R1; text is composed first (NFC).
    "qwen2": WORDS,
    "deepseek-r1-qwen": WORDS,
    # The shipped tiny model's (tools/train_tiny.py), which llama.cpp has no name for.
    "qwen3fast-tiny": r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
COMPOSED = ("qwen2", "deepseek-r1-qwen")
# Control tokens that end a reply even if the file does not name them: generation_config.json of chat models has both.
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def tokenizer_of(header: Header) -> Tokenizer:
    """Return the byte-level BPE, with control tokens as special ones, and the chat template.

    Raises: ValueError for another kind of tokenizer, and for metadata that are missing or do not fit each other.
    """
    kind, pre = header.get(PREFIX + "model", str), header.get(PREFIX + "pre", str)
    if kind != "gpt2":
        raise ValueError(f"{header.file}: {PREFIX}model {kind!r} is not supported; only 'gpt2' (byte-level BPE) is")
    if pre not in PATTERNS:
        raise ValueError(f"{header.file}: {PREFIX}pre {pre!r} is not supported; supported: {', '.join(PATTERNS)}")
    tokens, types = _tokens(header)
    if EMBEDDING in header.tensors and len(tokens) > (rows := header.tensors[EMBEDDING].shape[0]):
        raise ValueError(f"{header.file}: there are {len(tokens)} tokens, but {EMBEDDING} has {rows} rows")
    vocab = {token: i for i, (token, type) in enumerate(zip(tokens, types, strict=True)) if type != UNUSED}
    if len(vocab) != len(types) - types.count(UNUSED):
        raise ValueError(f"{header.file}: some token of {PREFIX}tokens appears twice")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(header, "merges"))]
    try:
        base = BaseTokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as err:  # tokenizers raises bare Exception
        raise ValueError(f"{header.file}: its tokenizer cannot be built: {err}") from err
    _add_rules(base, pre, tokens, types)
    ids = {ours: header.get(f"{PREFIX}{name}_token_id", int) for ours, name in SPECIAL.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    template, adds_bos = header.get("tokenizer.chat_template", str), header.get(PREFIX + "add_bos_token", bool, False)
    if adds_bos or "bos_token" in (template or ""):  # other files name one, too, that their models do not know
        bos_id = header.get(PREFIX + "bos_token_id", int)
        if bos_id is None or not 0 <= bos_id < len(tokens):
            raise ValueError(f"{header.file}: {PREFIX}bos_token_id {bos_id} names no token, but it is used")
        bos = special["bos_token"] = tokens[bos_id]
        if adds_bos:
            base.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    return Tokenizer(base, template, special)


def _add_rules(base: BaseTokenizer, pre: str, tokens: list[str], types: list[int]) -> None:
    """Add tokens (they are in the vocabulary and keep their ids), normalizer, pre-tokenizer and decoder."""
    for kind, add in ((CONTROL, base.add_special_tokens), (USER_DEFINED, base.add_tokens)):
        add([AddedToken(token, normalized=False) for token, i in zip(tokens, types, strict=True) if i == kind])
    if pre in COMPOSED:
        base.normalizer = normalizers.NFC()
    use_byte_level(base, PATTERNS[pre])


def stop_ids(header: Header) -> tuple[int, ...]:
    """Return the ids that end a reply: the ones that the metadata name, and control tokens in STOP_TOKENS.

    Raises: ValueError for an id without a token.
    """
    if PREFIX + "tokens" not in header.metadata:
        return ()
    tokens, types = _tokens(header)
    named = [header.get(f"{PREFIX}{name}_token_id", int) for name in ("eos", "eot", "eom")]
    known = [i for i in named if i is not None]
    if not all(0 <= i < len(tokens) for i in known):
        raise ValueError(f"{header.file}: there are {len(tokens)} tokens, but ids that end a reply are {known}")
    texts = [i for i, token in enumerate(tokens) if token in STOP_TOKENS and types[i] == CONTROL]
    return tuple(dict.fromkeys([*known, *texts]))


def _tokens(header: Header) -> tuple[list[str], list[int]]:
    """Return all tokens and their types."""
    tokens = _strings(header, "tokens")
    types = header.metadata.get(PREFIX + "token_type")
    if not isinstance(types, list) or len(types) != len(tokens) or not all(isinstance(i, int) for i in types):
        raise ValueError(f"{header.file}: {PREFIX}token_type must give the type of each of {len(tokens)} tokens")
    return tokens, types


def _strings(header: Header, name: str) -> list[str]:
    found: Any = header.metadata.get(PREFIX + name)
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError(f"{header.file}: {PREFIX}{name} is missing, or holds no strings")
    return found
