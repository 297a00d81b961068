"""A checkpoint's chat template: a conversation becomes the text that the model was trained to read. Knows no tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from qwen3fast.text.function_schema import function_schema
from qwen3fast.text.messages import REASONING_FIELDS, Message, read_messages
from qwen3fast.text.plain_data import to_plain
from qwen3fast.text.template_budget import TemplateLimitError, TemplateLimits
from qwen3fast.text.template_sandbox import TemplateEnvironment

Tools = Sequence[dict[str, Any] | Callable[..., Any]]  # JSON schemas, or functions

ROLES = ("system", "user", "assistant", "tool")  # of Qwen3's own template

# Marks where a final message that is to be continued ends. transformers' own mark: a template may strip the space.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "

# Keywords of transformers' apply_chat_template that are not supported -> the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "conversation": (),
    "sanitize_control_tokens": (False,),
    "padding": (False, "do_not_pad"),
    "truncation": (False, "do_not_truncate"),
    "max_length": (None,),
    "return_tensors": (None,),
    "return_dict": (False,),
    "return_assistant_tokens_mask": (False,),
    "tokenizer_kwargs": (None, {}),
}


class ChatTemplate:
    """A compiled Jinja template. Thread-safe.

    name: where the template came from, for errors.
    """

    def __init__(self, source: str, name: str) -> None:
        self.source, self.name = source, name
        self._environment = TemplateEnvironment()
        self._compiled: jinja2.Template | None = None

    def render(
        self,
        messages: Any,
        tools: Any = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        limits: TemplateLimits | None = None,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation; parameters as in `Tokenizer.apply_chat_template`.

        Raises: ValueError for malformed input, a message that the template leaves out because of its role, whatever the
        template refuses, and a template that exceeds its limits.
        """
        conversation = read_messages(messages)
        field, ending = None, ""
        if continue_final_message:
            if add_generation_prompt:
                raise ValueError(
                    "pass continue_final_message or add_generation_prompt: one continues a message, one begins it"
                )
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            ending = self._mark_ending(conversation[-1], field)
        given = {
            "messages": conversation,
            "tools": read_tools(tools),
            "documents": None,
            "add_generation_prompt": field is None if add_generation_prompt is None else add_generation_prompt,
            **_read_variables(variables),
        }
        limits = limits or TemplateLimits()
        text = self._run(given, limits)
        self._check_roles(given, limits, text)
        return text if field is None else self._cut_at_mark(text, field, ending)

    def _run(self, variables: dict[str, Any], limits: TemplateLimits) -> str:
        try:
            if self._compiled is None:
                self._compiled = self._environment.load(self.source, limits)
            return self._environment.render(self._compiled, limits, variables)
        except TemplateLimitError as err:
            raise ValueError(
                f"the chat template cannot render these messages: {self.name} {err}; "
                "correct the template, or raise the tokenizer's template_limits"
            ) from err
        except Exception as err:  # a template is a program of somebody else's and may fail in any way
            reason = "it is nested too deeply, or calls itself without end" if isinstance(err, RecursionError) else err
            raise ValueError(f"the chat template cannot render these messages: {reason} (in {self.name})") from err

    def _check_roles(self, variables: dict[str, Any], limits: TemplateLimits, text: str) -> None:
        """Raise ValueError for a message that is not in the text: most templates skip a role that they do not know."""
        messages = variables["messages"]
        for number, message in enumerate(messages):
            if message["role"] in ROLES or not message.get("content"):
                continue
            changed = {**message, "content": message["content"] + "!"}
            others = {**variables, "messages": [*messages[:number], changed, *messages[number + 1 :]]}
            if self._run(others, limits) == text:
                raise ValueError(
                    f"the chat template leaves out messages[{number}], whose role is {message['role']!r:.80}; use "
                    f"{', '.join(ROLES)} (in {self.name})"
                )

    def _mark_ending(self, message: Message, field: str) -> str:
        """Put the mark behind a field of the final message. Returns the field's text."""
        text = message.get(field)
        if not isinstance(text, str):
            raise ValueError(f"continue_final_message: the final message has no text in {field!r} to continue")
        # Reasoning stands under several names; the template reads one of them.
        names = [x for x in REASONING_FIELDS if message.get(x) == text] if field in REASONING_FIELDS else [field]
        if not any(name in self.source for name in names):
            raise ValueError(f"continue_final_message: this chat template does not read the field {field!r}")
        for name in names:
            message[name] = text + _MARK
        return text

    def _cut_at_mark(self, text: str, field: str, ending: str) -> str:
        at = text.rfind(_MARK.strip())
        if at < 0 or ending.strip() not in text:
            raise ValueError(
                f"continue_final_message: this chat template does not write {field!r} of the final message as it is, "
                "so it cannot be continued"
            )
        return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def read_chat_template(folder: Path, settings: dict[str, Any]) -> tuple[str | None, Path]:
    """Return a checkpoint's chat template and the file that it came from. settings: of tokenizer_config.json.

    Raises: ValueError naming the file for a template that is not text.
    """
    file, settings_file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), file
        except UnicodeDecodeError as err:
            raise ValueError(f"{file} is not text in UTF-8: {err}; download it again") from err
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if not isinstance(template, str | None):
        raise ValueError(f"{settings_file}: chat_template must be a text, got {template!r:.200}")
    return template, settings_file


def read_template(source: str | Path) -> str:
    """Return a Jinja template. source: its file, or the template itself, a str that holds a brace.

    Raises: FileNotFoundError; ValueError for a file that is not text.
    """
    if isinstance(source, str) and "{" in source:
        return source
    file = Path(source).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(source)!r:.200}; chat_template takes a file, or a Jinja template")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(f"{file} is not text in UTF-8: {err}") from err


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the JSON schemas of tools; functions are described by their signature and docstring.

    Raises: ValueError naming the tool that is neither, or a function that cannot be described.
    """
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list of JSON schemas or functions, got {type(tools).__name__}")
    schemas = []
    for number, tool in enumerate(tools):
        if inspect.isroutine(tool):
            tool = function_schema(tool)
        plain = to_plain(tool, f"tools[{number}]") if not callable(tool) else None
        if not isinstance(plain, dict):
            raise ValueError(f"tools[{number}] must be a JSON schema (a dict) or a function, got {type(tool).__name__}")
        schemas.append(plain)
    return schemas


def _read_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """Return what else a template may read, without the keywords that transformers gives another meaning."""
    for name, neutral in _UNSUPPORTED.items():
        value = variables.get(name)
        if name in variables and not any(type(value) is type(x) and value == x for x in neutral):
            raise ValueError(
                f"{name} is not supported: apply_chat_template renders one conversation, passed as messages, to text "
                "or, with tokenize=True, to a list of token ids"
            )
    return {name: to_plain(value, name) for name, value in variables.items() if name not in _UNSUPPORTED}
