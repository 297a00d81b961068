"""The tokenizer of a folder that holds vocab.json and merges.txt, as slow tokenizers wrote them, and no tokenizer.json.

Source: Qwen2Tokenizer of transformers 5, and AutoAWQ's and older trainers' folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BaseTokenizer

from qwen3fast.files import read_optional_json

VOCAB_FILES = ("vocab.json", "merges.txt")
CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3Tokenizer", "Qwen3TokenizerFast")
# Qwen2's and Qwen3's splitting of text into words, before pairs are merged.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # in the order in which transformers adds them
DEFAULT_TOKEN = "<|endoftext|>"  # of all in NAMED but bos_token


def has_vocab_files(folder: Path) -> bool:
    """Return whether the folder holds both files."""
    return all((folder / name).is_file() for name in VOCAB_FILES)


def tokenizer_from_vocab(folder: Path) -> BaseTokenizer:
    """Return the byte-level BPE of vocab.json and merges.txt with the added tokens that other files name.

    Raises: ValueError naming the file that is damaged, or the class of another tokenizer.
    """
    settings = read_optional_json(folder / "tokenizer_config.json")
    if (kind := settings.get("tokenizer_class")) not in CLASSES:
        raise ValueError(f"{folder / 'tokenizer_config.json'}: tokenizer_class={kind!r:.100} needs a tokenizer.json")
    try:
        vocab, merges = models.BPE.read_file(*(str(folder / name) for name in VOCAB_FILES))
    except Exception as err:  # tokenizers raises bare Exception
        raise ValueError(f"{folder}: vocab.json and merges.txt are not a tokenizer: {err}; download again") from err
    added = _added_tokens(folder, settings)
    try:
        base = BaseTokenizer(models.BPE(vocab={**vocab, **{t.content: i for i, t in added.items()}}, merges=merges))
    except Exception as err:
        raise ValueError(f"{folder}: vocab.json and merges.txt do not fit each other: {err}") from err
    base.normalizer = normalizers.NFC()
    use_byte_level(base, WORDS, add_prefix_space=settings.get("add_prefix_space") is True)
    for token in added.values():  # those in the vocabulary keep their ids
        (base.add_special_tokens if token.special else base.add_tokens)([token])
    named = [_text_of(settings.get(name, DEFAULT_TOKEN if name != "bos_token" else None)) for name in NAMED]
    base.add_special_tokens([AddedToken(text, normalized=False) for text in named if text is not None])
    return base


def use_byte_level(base: BaseTokenizer, words: str, add_prefix_space: bool = False) -> None:
    """Let a tokenizer split text into words, by a regular expression, and words into bytes."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    base.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), behavior="isolated"), to_bytes])
    base.decoder = decoders.ByteLevel()


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens by id, in order.

    Raises: ValueError naming the file and its contents in place of tokens, or one of transformers before 4.34.
    """
    stored, file = settings.get("added_tokens_decoder"), folder / "tokenizer_config.json"
    if stored is None and (folder / "added_tokens.json").is_file():
        raise ValueError(f"{file} has no added_tokens_decoder; save the tokenizer with a newer version of transformers")
    try:
        tokens = {int(i): token for i, token in (stored or {}).items()}
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return {
            i: AddedToken(tokens[i]["content"], **{name: bool(tokens[i].get(name)) for name in flags})
            for i in sorted(tokens)
            if 0 <= i < 2**31
        }
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise ValueError(f"{file}: added tokens are damaged ({type(err).__name__}: {err})") from err


def _text_of(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None
