"""ChatSession: a conversation whose turns compute only new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from qwen3fast.generator import Generator
from qwen3fast.results import GenerationResult, StreamChunk
from qwen3fast.sampling_params import SamplingParams, takes_params
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.scheduling.prompt import Overflow
from qwen3fast.text.chat_template import Tools
from qwen3fast.text.tokenizer import Message

END_OF_TURN = "<|im_end|>"


class ChatSession:
    """A conversation with a model: `send` a message, get the reply.

    Keys and values of earlier turns stay in the Generator's cache while there is room for them. A turn reuses the
    longest prefix that it shares with them; `result.metrics` reports how many tokens were reused.

    mode "exact" renders the whole conversation with the chat template at each turn, as other engines do. Qwen3's
    template drops the reasoning of earlier turns, which changes the prompt from the last reply on: that reply must be
    computed again. mode "append" adds each new message to the token ids of the conversation, reasoning included: all
    of it is reused, the context grows faster, and the model sees its earlier reasoning.

    Attributes:
        messages: the conversation so far, replies included; a list that the caller may read.
    """

    @takes_params
    def __init__(
        self,
        generator: Generator,
        *,
        system: str | None = None,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        mode: Literal["exact", "append"] = "exact",
    ) -> None:
        """Set up a conversation; nothing is computed before the first message.

        Raises: ValueError for an unknown mode, or a Generator that cannot chat.
        """
        if mode not in ("exact", "append"):
            raise ValueError(f"mode must be 'exact' or 'append', got {mode!r}")
        if generator.tokenizer is None or generator.tokenizer.chat_template is None:
            raise ValueError("this Generator has no chat template, so it cannot chat; use generate()")
        self.messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        self._generator, self._tokenizer = generator, generator.tokenizer
        self._enable_thinking, self._tools, self._mode = enable_thinking, tools, mode
        self._last: RequestHandle | None = None  # the turn before
        self._ids: list[int] = []  # of all turns so far, as the model saw and made them

    @takes_params
    def send(
        self, content: str | Message, params: SamplingParams | None = None, *, on_overflow: Overflow = "error"
    ) -> GenerationResult:
        """Send a message and wait for the reply. A turn that fails leaves the conversation unchanged.

        content: the user's text, or a whole message, such as a tool's result. on_overflow: as in `Generator.generate`;
        "cut" removes the oldest tokens of the conversation from the prompt, not from `messages`.
        Raises: as `Generator.generate`.
        """
        *_, last = self.stream(content, params, on_overflow=on_overflow)
        assert last.result is not None, "the last chunk has it"
        return last.result

    @takes_params
    def stream(
        self, content: str | Message, params: SamplingParams | None = None, *, on_overflow: Overflow = "error"
    ) -> Iterator[StreamChunk]:
        """Send a message and yield the reply chunk by chunk. The turn is added once its reply has ended.

        Raises: as `Generator.stream`; at the call for a message that cannot be run.
        """
        message: Message = {"role": "user", "content": content} if isinstance(content, str) else content
        prompt = self._prompt(message, params, on_overflow)
        builder = self._generator._builder
        if not self._enable_thinking:
            params = builder.without_reasoning(params, prompt)
        return self._turn(message, prompt, builder.build_one(prompt, params, on_overflow, self._last, self._tools))

    def reset(self) -> None:
        """Forget everything except the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        self._last, self._ids = None, []

    def _prompt(self, message: Message, params: SamplingParams | None, on_overflow: Overflow) -> list[int]:
        conversation = [*self.messages, message]
        about = (params, self._enable_thinking)
        whole = self._generator.render(conversation, *about, self._tools, on_overflow=on_overflow)
        if self._mode == "exact" or not self._ids:
            return whole
        # What the template puts behind the last reply: the end of its turn, unless the model wrote it, and the message.
        end = self._tokenizer.encode(END_OF_TURN)
        has_ended = self._ids[-len(end) :] == end
        new = self._generator.render([message], *about, on_overflow=on_overflow)
        if whole[-len(new) :] != new:
            raise ValueError(
                "this chat template does not render a message alone as it does behind others, so mode 'append' "
                "cannot be used with it; use mode 'exact'"
            )
        return [*self._ids, *([] if has_ended else end), *self._tokenizer.encode("\n"), *new]

    def _turn(self, message: Message, prompt: list[int], handle: RequestHandle) -> Iterator[StreamChunk]:
        for chunk in self._generator._run(handle):
            if chunk.result is not None:
                self._note(message, prompt, handle, chunk.result)
            yield chunk

    def _note(self, message: Message, prompt: list[int], handle: RequestHandle, result: GenerationResult) -> None:
        self.messages += [message, result.to_message()]
        self._last, self._ids = handle, [*prompt, *result.token_ids]
