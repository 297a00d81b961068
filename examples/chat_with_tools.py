"""Let a model call Python functions: it asks for a call, we run it, it answers with the result.

    python examples/chat_with_tools.py --model Qwen/Qwen3-0.6B
    python examples/chat_with_tools.py     # tiny, which never learned to call tools: its call is forced by a pattern

The pattern needs `pip install 'qwen3fast[structured]'`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

from qwen3fast import Generator, SamplingParams

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two integers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]
FUNCTIONS: dict[str, Callable[..., Any]] = {"add": lambda a, b: int(a) + int(b)}
NUMBER = "(0|[1-9][0-9]{0,2})"
A_CALL = r'<tool_call>\n\{"name": "add", "arguments": \{"a": ' + NUMBER + ', "b": ' + NUMBER + r"\}\}\n</tool_call>"


def call(name: str, arguments: dict[str, Any]) -> str:
    """Return what a function gives, as text for the model. Its arguments come from a model: never trust them."""
    try:
        return json.dumps(FUNCTIONS[name](**arguments))
    except Exception as err:  # the model may correct itself
        return f"error: {err!r}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="hub id, folder, .gguf file, or tiny (shipped)")
    parser.add_argument("--question", default="What is 17 + 25?")
    args = parser.parse_args(argv)

    messages: list[dict[str, Any]] = [{"role": "user", "content": args.question}]
    params = SamplingParams(max_tokens=128, seed=0, regex=A_CALL if args.model == "tiny" else None)
    with Generator.from_pretrained(args.model, compile="auto") as generator:
        for _ in range(4):  # a model could ask for calls without end
            reply = generator.chat(messages, params, tools=TOOLS, enable_thinking=False)
            if not reply.tool_calls:
                break
            messages.append(reply.to_message())
            for c in reply.tool_calls:
                result = call(c.name, c.arguments)
                print(f"the model calls {c.name}({c.arguments}); the result is {result}")
                messages.append({"role": "tool", "content": result})
            params = SamplingParams(max_tokens=128, seed=0)
        print(f"answer: {reply.answer}")


if __name__ == "__main__":
    main()
