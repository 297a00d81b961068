"""Text to token ids and back: encoding, incremental decoding, and the chat template."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as BaseTokenizer

from qwen3fast._json import read_json

Message = dict[str, Any]


class Tokenizer:
    """A checkpoint's tokenizer: `tokenizer.json` (byte-level BPE) and its chat template.

    Method names and results are those of transformers' tokenizers.
    """

    def __init__(self, base: BaseTokenizer, chat_template: str | None = None, special: dict[str, str] | None = None):
        self.base = base
        self.chat_template = chat_template
        self.special_tokens = special or {}
        added = base.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._compiled: jinja2.Template | None = None

    @classmethod
    def from_folder(cls, folder: Path, base: BaseTokenizer | None = None) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja (which wins) from a checkpoint's folder.

        base: takes the place of tokenizer.json.
        Raises: FileNotFoundError without tokenizer.json; ValueError naming the file if one cannot be read.
        """
        file = folder / "tokenizer.json"
        if base is None and not file.is_file():
            raise FileNotFoundError(f"{file} not found; expected a checkpoint in Hugging Face layout")
        try:
            base = BaseTokenizer.from_file(str(file)) if base is None else base
        except Exception as err:  # tokenizers raises bare Exception
            raise ValueError(f"{file} is not a tokenizer: {err}; if it was downloaded, download it again") from err
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        special = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = settings.get(name)
            special[name] = value.get("content") if isinstance(value, dict) else value
            if value and not isinstance(special[name], str):
                raise ValueError(f"{folder / 'tokenizer_config.json'}: {name}={value!r:.200} names no token")
        return cls(base, _chat_template(folder, settings), {name: token for name, token in special.items() if token})

    @property
    def vocab_size(self) -> int:
        """Number of known ids, added tokens included (the model's vocabulary may be padded beyond it)."""
        return self.base.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it (such as <|im_end|>) become their ids."""
        return self.base.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        decoder = IncrementalDecoder(self, skip_special_tokens)
        return "".join([decoder.push(i) for i in token_ids] + [decoder.finish()])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for; empty for an id without a token (padding of the vocabulary)."""
        token = self.base.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token with characters outside the byte alphabet stands for itself
            return token.encode("utf-8")

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, such as <|im_end|>."""
        return token_id in self._special_ids

    def apply_chat_template(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool = True,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """Render a conversation as the model was trained to read it.

        messages: dictionaries with "role" and "content". tools: JSON schemas of functions.
        Returns: the text, or its ids with tokenize=True.
        Raises: ValueError without a template, for malformed messages, or for what the template itself refuses.
        """
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template; use generate() with a plain prompt")
        if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            raise ValueError("messages must be a non-empty list of {'role': ..., 'content': ...} dictionaries")
        messages = [_with_reasoning_content(message) for message in messages]
        try:
            if self._compiled is None:
                self._compiled = _template_environment().from_string(self.chat_template)
            text = self._compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                **self.special_tokens,
                **variables,
            )
        except Exception as err:  # a template is a program of somebody else's and may fail in any way
            raise ValueError(f"the chat template cannot render these messages: {err}") from err
        return self.encode(text) if tokenize else text


class IncrementalDecoder:
    """Turns ids into text one at a time; text held back is only ever an unfinished UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, possibly none."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as err:
            raise ValueError(f"{file} is not text in UTF-8: {err}; download it again") from err
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be a text, got {template!r:.200}")
    return template


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary -> the byte.

    Source: the GPT-2 tokenizer: printable Latin-1 characters stand for themselves, other bytes for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _with_reasoning_content(message: Message) -> Message:
    """The message with its thought under the name that Qwen3's template reads, as transformers does."""
    for name in ("reasoning", "thinking"):
        if message.get(name) and not message.get("reasoning_content"):
            return {**message, "reasoning_content": message[name]}
    return message


def _template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 as transformers sets it up for chat templates; templates are untrusted, so they run in the sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes HTML; templates expect plain JSON.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    # Functions instead of the types, whose unbound methods would reach around the sandbox.
    environment.globals["dict"] = lambda *items, **entries: dict(*items, **entries)
    environment.globals["namespace"] = lambda *items, **entries: jinja2.utils.Namespace(*items, **entries)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
    return environment
