"""Messages and tools of a request in OpenAI's form, read into the form of chat templates.

The APIs name their fields differently; what they share is here.
"""

from __future__ import annotations

import json
from typing import Any

from qwen3fast.server.fields import Fields, describe
from qwen3fast.text.tool_calls import ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the conversation as the chat template reads it. Raises: ApiError (400) naming the message and field."""
    if not fields.required("messages", fields.items("messages")):
        raise fields.error("messages", "needs at least one message", "invalid_value")
    return [_message(message) for message in fields.objects("messages")]


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.required("role", fields.text("role", choices=ROLES))
    content = fields.raw("content")
    calls = fields.objects("tool_calls")
    fields.take("tool_call_id", "refusal", "annotations")  # results stand in the order of their calls
    if content is None and not (role == "assistant" and calls):
        raise fields.error("content", "this field is required", "missing_required_parameter")
    message: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": text_of(fields, "content"),
    }
    reasoning = fields.text("reasoning_content") or fields.text("reasoning")
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def text_of(fields: Fields, key: str) -> str:
    """Return the text of a field: a string or a list of text parts, "" if it is absent. Raises: ApiError (400)."""
    content = fields.raw(key, "")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise fields.error(key, f"must be a string or a list of text parts, got {describe(content)}")
    texts = []
    for part in fields.objects(key):
        part.take("annotations", "logprobs", "prompt_cache_breakpoint")
        kind = part.required("type", part.text("type"))
        if kind not in ("text", "input_text", "output_text"):
            raise part.error("type", f"{kind!r} parts are not supported: this server's models read text")
        texts.append(part.required("text", part.text("text")))
    return "".join(texts)


def _call(fields: Fields) -> dict[str, Any]:
    fields.take("id", "type", "index")
    return read_call(fields.required("function", fields.object("function")))


def read_call(function: Fields) -> dict[str, Any]:
    """Return an earlier tool call as the chat template reads it, from an object with name and arguments.

    Raises: ApiError (400) naming the field.
    """
    name = function.required("name", function.text("name"))
    arguments = function.raw("arguments", "{}")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as err:
        raise function.error("arguments", f"must be the JSON text of an object: {err}") from err
    if not isinstance(arguments, dict):
        raise function.error("arguments", f"must be an object, got {describe(arguments)}")
    return ToolCall(name, arguments).to_message()


def read_tools(fields: Fields, is_flat: bool = False) -> tuple[list[dict[str, Any]] | None, str | None]:
    """Return the functions that the model may call, and the one that it must: None, a name, or "" for any.

    is_flat: a tool holds the fields of its function itself, as in the Responses API, not in an object `function`.
    Raises: ApiError (400) naming the field.
    """
    tools = [_tool(tool, is_flat) for tool in fields.objects("tools")] or None
    choice = fields.raw("tool_choice")
    if choice == "none":
        return None, None
    if choice is None or (choice == "auto" and (tools or is_flat)):
        return tools, None
    if choice in ("auto", "required"):
        if not tools:
            raise fields.error("tool_choice", f"{choice!r} needs tools", "invalid_value")
        return tools, ""
    function = choice if is_flat or not isinstance(choice, dict) else choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        form = "'name': ..." if is_flat else "'function': {'name': ...}"
        expected = f"'none', 'auto', 'required' or {{'type': 'function', {form}}}"
        raise fields.error("tool_choice", f"must be {expected}, got {describe(choice)}")
    check_chosen(name, tools, fields, "tool_choice")
    return tools, name


def read_max_calls(fields: Fields) -> int | None:
    """Return how many tool calls a reply may have, None for any number. Raises: ApiError (400)."""
    return None if fields.flag("parallel_tool_calls", True) else 1


def check_chosen(name: str, tools: list[dict[str, Any]] | None, fields: Fields, key: str) -> None:
    """Check that a tool that must be called is among the tools. Raises: ApiError (400) naming its field."""
    if name not in [tool["function"]["name"] for tool in tools or []]:
        raise fields.error(key, f"names {name!r}, which is not among the tools", "invalid_value")


def _tool(fields: Fields, is_flat: bool) -> dict[str, Any]:
    if fields.text("type", None if is_flat else "function") != "function":
        raise fields.error("type", "only tools of type 'function' are supported", "unsupported")
    function = fields if is_flat else fields.required("function", fields.object("function"))
    function.take("strict")  # a forced call follows its parameters strictly, others as the model writes them
    return {"type": "function", "function": read_function(function)}


def read_function(fields: Fields, parameters: str = "parameters") -> dict[str, Any]:
    """Return a function as the chat template reads it. parameters: the field of its JSON schema.

    Raises: ApiError (400) naming the field.
    """
    function: dict[str, Any] = {"name": fields.required("name", fields.text("name"))}
    optional = {"description": fields.text("description"), "parameters": fields.mapping(parameters)}
    return function | {key: value for key, value in optional.items() if value is not None}
