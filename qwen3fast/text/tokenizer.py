"""Text to token ids and back: encoding, decoding token by token, and the checkpoint's chat template."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BaseTokenizer

from qwen3fast.checks import checked_text
from qwen3fast.files import read_optional_json
from qwen3fast.text.chat_template import ChatTemplate, Tools, read_chat_template
from qwen3fast.text.messages import Message
from qwen3fast.text.template_budget import TemplateLimits

__all__ = ["IncrementalDecoder", "Message", "Tokenizer"]


class Tokenizer:
    """A checkpoint's tokenizer: `tokenizer.json` (byte-level BPE) and its chat template.

    Methods have the names and results of transformers' tokenizers.

    Attributes:
        base: the tokenizer of the library `tokenizers`.
        chat_template: the Jinja source, or None. template_limits: bounds on its output and time.
        special_tokens: texts of bos_token, eos_token, unk_token and pad_token, as far as the checkpoint names them.
        eos_ids: the id of eos_token, if it is a token.
    """

    def __init__(
        self,
        base: BaseTokenizer,
        chat_template: str | None = None,
        special: dict[str, str] | None = None,
        *,
        template_name: str = "chat_template",
    ) -> None:
        """Wrap a tokenizer; template_name: where the chat template came from, for errors."""
        self.base = base
        self.chat_template = chat_template
        self.template_limits = TemplateLimits()
        self.special_tokens = special or {}
        added = base.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        end = base.token_to_id(self.special_tokens.get("eos_token", ""))
        self.eos_ids = frozenset() if end is None else frozenset([end])
        self._template_name = template_name
        self._template: ChatTemplate | None = None  # the last one used

    @classmethod
    def from_folder(cls, folder: Path, base: BaseTokenizer | None = None) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja (which wins) from a checkpoint's folder.

        base: takes the place of tokenizer.json.
        Raises: FileNotFoundError without tokenizer.json; ValueError naming the file if one cannot be read.
        """
        file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if base is None and not file.is_file():
            raise FileNotFoundError(f"{file} not found; expected a checkpoint in Hugging Face layout")
        try:
            base = BaseTokenizer.from_file(str(file)) if base is None else base
        except Exception as err:  # tokenizers raises bare Exception
            raise ValueError(f"{file} is not a tokenizer: {err}; if it was downloaded, download it again") from err
        settings = read_optional_json(settings_file)
        special: dict[str, Any] = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = settings.get(name)
            special[name] = value.get("content") if isinstance(value, dict) else value
            if value and not isinstance(special[name], str):
                raise ValueError(f"{settings_file}: {name}={value!r:.200} names no token")
        template, template_file = read_chat_template(folder, settings)
        special = {name: token for name, token in special.items() if token}
        return cls(base, template, special, template_name=str(template_file))

    @property
    def vocab_size(self) -> int:
        """The number of known ids, added tokens included. The model's vocabulary may be padded beyond it."""
        return self.base.get_vocab_size()

    @cached_property
    def _longest_token(self) -> int | None:
        """The characters of the longest token; of a byte-level token, each character is a byte.

        None if a token may stand for any number of characters: added tokens that take in whitespace around them, and
        normalizers other than NFC, which may remove characters.
        """
        state = json.loads(self.base.normalizer.__getstate__()) if self.base.normalizer else {"normalizers": []}
        kinds = {part["type"] for part in state.get("normalizers", [state])}
        if not kinds <= {"NFC"} or any(x.lstrip or x.rstrip for x in self.base.get_added_tokens_decoder().values()):
            return None
        return max(map(len, self.base.get_vocab(with_added_tokens=True)), default=1)

    def max_chars(self, text: str, num_tokens: int) -> int:
        """Return how long a text like this one can be at most, in characters, if it has no more than so many tokens.

        Where there is no such limit, it is the text's own length.
        """
        if len(text) <= num_tokens:
            return num_tokens
        if self._longest_token is None:
            return len(text)
        # NFC makes one character of up to four; of ASCII it changes none.
        return num_tokens * self._longest_token * (1 if text.isascii() else 4)

    def long_end(self, text: str, num_tokens: int) -> str:
        """Return the end of a text, surely longer than so many tokens; texts with the same end are cut alike."""
        if self._longest_token is None:
            return text
        most = 2 * num_tokens * self._longest_token
        return text[-most:] if text[-most:].isascii() else text[-4 * most :]

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the token ids of a text. Special tokens written in it (such as <|im_end|>) become their ids.

        max_tokens: return the first so many; a longer text is cut before it is encoded, far enough behind them.
        Raises: ValueError for anything but text, and for text that is not valid Unicode (a lone surrogate).
        """
        try:
            if max_tokens is not None:
                text = text[: 2 * self.max_chars(text, max_tokens)]
            return self.base.encode(text, add_special_tokens=False).ids[:max_tokens]
        except (TypeError, UnicodeError):
            checked_text("text", text)
            raise

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that stands at the beginning, with the tokens that the tokenizer puts before it.

        Qwen3's puts none there; some fine-tunes' put a bos_token. A text that begins with them gets no second ones.
        Raises: ValueError as `encode`.
        """
        ids, before = self.encode(text), self._prefix_ids()
        return ids if ids[: len(before)] == before else before + ids

    def _prefix_ids(self) -> list[int]:
        """Return the ids that tokenizer.json's post-processor puts before a text."""
        encoding = self.base.encode("a")
        count = next((i for i, is_added in enumerate(encoding.special_tokens_mask) if not is_added), 0)
        ids: list[int] = encoding.ids[:count]
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 become U+FFFD; ids without a token are left out."""
        decoder = IncrementalDecoder(self, skip_special_tokens)
        return "".join([decoder.push(i) for i in token_ids] + [decoder.finish()])

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token: none for an id without a token (padding of the vocabulary)."""
        token = self.base.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token with characters outside the byte alphabet stands for itself
            return token.encode("utf-8")

    def is_special(self, token_id: int) -> bool:
        """Return whether the id is a control token, such as <|im_end|>."""
        return token_id in self._special_ids

    def apply_chat_template(
        self,
        messages: list[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool | None = None,
        enable_thinking: bool = True,
        tokenize: bool = False,
        *,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str | list[int]:
        """Render a conversation as the model was trained to read it.

        messages: dicts with "role" and "content" (text, or a list of text parts); a reply's reasoning as
        "reasoning_content" and its "tool_calls". tools: JSON schemas, or Python functions with type hints and a
        docstring. add_generation_prompt: end with the beginning of a reply; True unless continue_final_message is set.
        continue_final_message: leave the final message open, for the model to continue its content or, if this is the
        name of another field (such as "reasoning_content"), that field. chat_template: another Jinja source to use.
        variables: what else the template reads, such as documents.

        Returns: the text, or its token ids with tokenize=True.
        Raises: ValueError without a template, for malformed messages (naming the place), for keywords of
        transformers' method that are not supported, for whatever the template itself refuses, and for a template
        that exceeds `template_limits`.
        """
        source = self.chat_template if chat_template is None else chat_template
        if source is None:
            raise ValueError("this checkpoint has no chat template; use generate() with a plain prompt")
        if not isinstance(source, str):
            raise ValueError(f"chat_template must be the source of a Jinja template, got {type(source).__name__}")
        template = self._template
        if template is None or template.source != source:
            name = self._template_name if chat_template is None else "chat_template"
            template = self._template = ChatTemplate(source, name)
        text = template.render(
            messages,
            tools,
            add_generation_prompt,
            continue_final_message,
            self.template_limits,
            **{**self.special_tokens, "enable_thinking": enable_thinking, **variables},
        )
        return self.encode(checked_text(f"the output of {template.name}", text)) if tokenize else text


class IncrementalDecoder:
    """A decoder of one id at a time. Text that it holds back is only ever an unfinished UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that this id completes, possibly none."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return the text that remains at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each printable character that stands for one in a byte-level vocabulary.

    Source: the GPT-2 tokenizer: printable Latin-1 characters stand for themselves, other bytes for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
