"""The request of `/v1/messages`: its fields, read into a conversation. Source: Anthropic API reference, "Messages"."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qwen3fast.sampling_params import MAX_COUNT
from qwen3fast.server.chat_fields import check_chosen, read_function
from qwen3fast.server.conversation import Conversation
from qwen3fast.server.fields import Fields, describe
from qwen3fast.server.forced_calls import forced
from qwen3fast.server.models import ServedModel, tokenizer_of
from qwen3fast.server.replies import new_id
from qwen3fast.server.sampling import Sampling, checked_params
from qwen3fast.text.tool_calls import ToolCall


@dataclass(frozen=True)
class MessagesRequest(Conversation):
    """A request for a message."""

    id: str = field(default_factory=lambda: new_id("msg"))

    def render(self, **limit: Any) -> list[int]:
        """Return the prompt; a final message that cannot be continued (`</think>` within it) is a turn before."""
        try:
            return super().render(**limit)
        except ValueError as err:
            if not (self.continues and str(err).startswith("continue_final_message: ")):
                raise
            return replace(self, continues=False).render(**limit)

    def envelope(self, content: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """Return a message object without the reason of its end."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.served.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }


def read_message_request(fields: Fields, served: ServedModel) -> MessagesRequest:
    """Read the fields of Anthropic's request. Raises: ApiError (400) naming the field."""
    fields.required("max_tokens", fields.raw("max_tokens"))
    return read_conversation(fields, served)


def read_conversation(fields: Fields, served: ServedModel) -> MessagesRequest:
    """Read the fields of a request whose limit of tokens may be missing. Raises: ApiError (400) naming the field."""
    tokenizer_of(served)
    tools, choice, max_calls = _read_tools(fields)
    sampling, must_call = forced(_read_sampling(fields), tokenizer_of(served), tools, choice)
    fields.take("metadata", "service_tier")
    messages, stream = _read_messages(fields), fields.flag("stream")
    last = messages[-1]
    continues = last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last
    more: dict[str, Any] = {"tools": tools, "max_calls": max_calls, "continues": continues, "stream": stream}
    return MessagesRequest(served, sampling, messages, must_call, **more)


def _read_sampling(fields: Fields) -> Sampling:
    stops = fields.items("stop_sequences", lambda item: isinstance(item, str), "a list of strings") or []
    thinking = fields.object("thinking")
    enable, budget = False, None
    if thinking is not None:
        kind = thinking.text("type", choices=("enabled", "disabled", "adaptive"))
        budget = thinking.integer("budget_tokens", 1)
        enable = kind != "disabled"
    params = checked_params(
        fields,
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        top_k=fields.integer("top_k", 0, MAX_COUNT),
        max_tokens=fields.integer("max_tokens", 1, MAX_COUNT),
        stop=tuple(stop for stop in stops if stop),
        thinking_budget=budget if enable else None,
    )
    return Sampling(params, enable_thinking=enable)


def _read_tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, str | None, int | None]:
    """Return the functions that the model may call, the one that it must (None, a name, or "" for any), and how often.

    The last value is None for any number of calls.
    """
    tools: list[dict[str, Any]] = []
    for tool in fields.objects("tools"):
        if tool.text("type", "custom") != "custom":
            raise tool.error("type", "only custom tools are supported", "unsupported")
        tool.required("input_schema", tool.raw("input_schema"))
        tool.take("cache_control")  # the prefix cache needs no marks
        tools.append({"type": "function", "function": read_function(tool, "input_schema")})
    choice = fields.object("tool_choice")
    if choice is None:
        return tools or None, None, None
    kind = choice.required("type", choice.text("type", choices=("auto", "any", "tool", "none")))
    max_calls = 1 if choice.flag("disable_parallel_tool_use") else None
    if kind == "none":
        return None, None, None
    if not tools:
        raise fields.error("tool_choice", "needs tools", "invalid_value")
    if kind != "tool":
        return tools, "" if kind == "any" else None, max_calls
    name = choice.required("name", choice.text("name"))
    check_chosen(name, tools, choice, "name")
    return tools, name, max_calls


def _read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the conversation as the chat template reads it."""
    found: list[dict[str, Any]] = []
    system = fields.raw("system")
    if system is not None:
        found.append({"role": "system", "content": "\n".join(_texts(fields, "system"))})
    if not fields.required("messages", fields.items("messages")):
        raise fields.error("messages", "needs at least one message", "invalid_value")
    for message in fields.objects("messages"):
        role = message.required("role", message.text("role", choices=("user", "assistant")))
        content = message.required("content", message.raw("content"))
        if isinstance(content, str):
            found.append({"role": role, "content": content})
        else:
            found.extend(_assistant(message) if role == "assistant" else _user(message))
    return found


def _blocks(fields: Fields, key: str, kinds: tuple[str, ...]) -> list[Fields]:
    content = fields.raw(key)
    if not isinstance(content, list):
        raise fields.error(key, f"must be a string or a list of content blocks, got {describe(content)}")
    blocks = fields.objects(key)
    for block in blocks:
        block.take("cache_control", "citations")
        kind = block.required("type", block.text("type"))
        if kind not in kinds:
            raise block.error("type", f"{kind!r} blocks are not supported here", "unsupported")
    return blocks


def _texts(fields: Fields, key: str) -> list[str]:
    content = fields.raw(key, "")
    if isinstance(content, str):
        return [content]
    return [block.required("text", block.text("text")) for block in _blocks(fields, key, ("text",))]


def _assistant(fields: Fields) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for block in _blocks(fields, "content", ("text", "thinking", "redacted_thinking", "tool_use")):
        kind = block.text("type")
        block.take("signature", "data", "id")
        if kind == "text":
            message["content"] += block.required("text", block.text("text"))
        elif kind == "thinking":
            message["reasoning_content"] = block.required("thinking", block.text("thinking"))
        elif kind == "tool_use":
            name = block.required("name", block.text("name"))
            call = ToolCall(name, block.mapping("input") or {})
            message.setdefault("tool_calls", []).append(call.to_message())
    return [message]


def _user(fields: Fields) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for block in _blocks(fields, "content", ("text", "tool_result")):
        if block.text("type") == "tool_result":
            block.take("tool_use_id", "is_error")
            text = "\n".join(_texts(block, "content"))
            found.append({"role": "tool", "content": text})
        elif found and found[-1]["role"] == "user":
            found[-1]["content"] += block.required("text", block.text("text"))
        else:
            found.append({"role": "user", "content": block.required("text", block.text("text"))})
    return found
