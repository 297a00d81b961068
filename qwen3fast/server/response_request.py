"""The request of `/v1/responses`: its fields, read into a conversation. Source: OpenAI API reference, "Responses"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen3fast.sampling_params import MAX_COUNT
from qwen3fast.server.chat_fields import read_call, read_max_calls, read_tools, text_of
from qwen3fast.server.conversation import Conversation
from qwen3fast.server.fields import Fields, describe
from qwen3fast.server.forced_calls import forced
from qwen3fast.server.models import ServedModel, tokenizer_of
from qwen3fast.server.replies import new_id
from qwen3fast.server.sampling import REASONING_BUDGETS, Sampling, checked_params, read_format
from qwen3fast.server.store import ResponseStore

WITHOUT_EFFECT = ("user", "service_tier", "include", "safety_identifier", "prompt_cache_key")
UNSUPPORTED = {
    "conversation": "send the messages, or previous_response_id",
    "prompt": "send its text as instructions",
    "max_tool_calls": "there are no tools that the server runs itself",
}


@dataclass(frozen=True)
class ResponseRequest(Conversation):
    """A request for a response. given: the fields of the request that the response object repeats."""

    given: dict[str, Any]
    is_stored: bool
    id: str = field(default_factory=lambda: new_id("resp"))

    def to_response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return the response object."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.served.name,
            "output": output,
            "usage": None,
            **self.given,
            **more,
        }


def read_response_request(store: ResponseStore, fields: Fields, served: ServedModel) -> ResponseRequest:
    """Read the fields of a response. Raises: ApiError (400) naming the field; 404 for an unknown earlier response."""
    tokenizer_of(served)
    tools, choice = read_tools(fields, is_flat=True)
    sampling, must_call = forced(_read_sampling(fields), tokenizer_of(served), tools, choice)
    instructions, previous = fields.text("instructions"), fields.text("previous_response_id")
    history = list(store.get(previous).messages) if previous is not None else []
    messages = [*history, *_read_input(fields)]
    fields.take(*WITHOUT_EFFECT)
    for name, instead in UNSUPPORTED.items():
        if fields.raw(name) is not None:
            raise fields.error(name, f"is not supported; {instead}", "unsupported")
    if fields.flag("background"):
        raise fields.error("background", "responses in the background are not supported", "unsupported")
    prompt = [{"role": "system", "content": instructions}, *messages] if instructions else messages
    max_calls, stream = read_max_calls(fields), fields.flag("stream")
    given = {
        "instructions": instructions,
        "max_output_tokens": sampling.params.max_tokens,
        "metadata": fields.raw("metadata", {}),
        "parallel_tool_calls": max_calls is None,
        "previous_response_id": previous,
        "reasoning": fields.raw("reasoning", {"effort": None, "summary": None}),
        "store": fields.flag("store", True),
        "temperature": sampling.params.temperature,
        "text": fields.raw("text", {"format": {"type": "text"}}),
        "tool_choice": fields.raw("tool_choice", "auto"),
        "tools": fields.raw("tools", []),
        "top_p": sampling.params.top_p,
        "truncation": fields.text("truncation", "disabled", choices=("auto", "disabled")),
    }
    more: dict[str, Any] = {"tools": tools, "max_calls": max_calls, "stream": stream}
    return ResponseRequest(served, sampling, prompt, must_call, given, bool(given["store"]), **more)


def _read_sampling(fields: Fields) -> Sampling:
    text = fields.object("text")
    reasoning = fields.object("reasoning")
    effort = reasoning.text("effort", choices=tuple(REASONING_BUDGETS)) if reasoning is not None else None
    schema = read_format(text.object("format"), is_flat=True) if text is not None else None
    params = checked_params(
        fields,
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        max_tokens=fields.integer("max_output_tokens", 1, MAX_COUNT),
        seed=fields.integer("seed"),
        json_schema=schema,
        thinking_budget=REASONING_BUDGETS[effort] if effort not in (None, "none") else None,
    )
    enable = None if effort is None else effort != "none"
    return Sampling(params, enable_thinking=enable, shaped_by="text.format.schema")


def _read_input(fields: Fields) -> list[dict[str, Any]]:
    """Return the new messages as the chat template reads them."""
    given = fields.required("input", fields.raw("input"))
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise fields.error("input", f"must be a string or a list of items, got {describe(given)}")
    found: list[dict[str, Any]] = []
    for item in fields.objects("input"):
        _add_item(item, item.text("type", "message") or "message", found)
    return found


def _add_item(item: Fields, kind: str, found: list[dict[str, Any]]) -> None:
    """Add one item of the input to the messages; reasoning and calls belong to one message of the assistant."""
    item.take("id", "status", "call_id", "summary", "encrypted_content", "phase", "caller", "namespace")
    if kind == "message":
        role = item.required("role", item.text("role", choices=("system", "developer", "user", "assistant")))
        content = _required_text(item, "content")
        if role == "assistant" and found and "content" not in found[-1]:  # after its reasoning
            found[-1]["content"] = content
        else:
            found.append({"role": "system" if role == "developer" else role, "content": content})
    elif kind == "function_call_output":
        output = _required_text(item, "output")
        found.append({"role": "tool", "content": output})
    elif kind == "function_call":
        call = read_call(item)
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        found[-1].setdefault("content", "")
        found[-1].setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        texts = [part.text("text") or "" for part in item.objects("content")]
        if any(texts):
            found.append({"role": "assistant", "reasoning_content": "".join(texts)})
    else:
        raise item.error("type", f"items of type {kind!r} are not supported", "unsupported")


def _required_text(item: Fields, key: str) -> str:
    item.required(key, item.raw(key))
    return text_of(item, key)
