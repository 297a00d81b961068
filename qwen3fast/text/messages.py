"""Messages of a conversation, brought to the one form that chat templates read."""

from __future__ import annotations

from typing import Any

from qwen3fast.text.plain_data import to_plain

Message = dict[str, Any]

# Names of a message's reasoning, the first of which templates read. Order as in transformers.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def read_messages(messages: Any) -> list[Message]:
    """Return a copy of the messages for a chat template; the caller's objects are not changed.

    messages: a list of dicts, dataclasses or pydantic objects with a "role". A field that is None is left out, as in
    transformers. "content" is text or a list of text parts (`{"type": "text", "text": ...}`), which are joined; None
    becomes "". Reasoning is found under each of REASONING_FIELDS.

    Raises: ValueError naming the message for another shape, a part that is not text, or text that is not valid Unicode.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise _shape_error(messages)
    return [_read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _read_message(message: Any, place: str) -> Message:
    if message is None or isinstance(message, str | int | float | list | tuple):
        raise _shape_error(message)
    fields = to_plain(message, place)
    if not isinstance(fields, dict) or not isinstance(fields.get("role"), str):
        raise _shape_error(message)
    read = {name: value for name, value in fields.items() if value is not None}
    if "content" in read:
        read["content"] = _read_content(read["content"], f"{place}['content']")
    elif "content" in fields or read.get("tool_calls"):
        read["content"] = ""  # also what Qwen3's own template makes of null
    reasoning = next((read[name] for name in REASONING_FIELDS if name in read), None)
    return read if reasoning is None else {"thinking": reasoning, **read, "reasoning_content": reasoning}


def _read_content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{place} must be text, a list of text parts or None, got {type(content).__name__}")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            wrong = f"a part of type {kind!r}" if kind != "text" else "a text part without text"
            raise ValueError(f"{place}[{number}] is {wrong}; expected {{'type': 'text', 'text': ...}}")
        texts.append(part["text"])
    return "".join(texts)


def _shape_error(value: Any) -> ValueError:
    got = f"{value!r:.100}" if isinstance(value, list | tuple | dict) else type(value).__name__
    return ValueError(f"messages must be a non-empty list of {{'role': ..., 'content': ...}} dictionaries, got {got}")
