"""ChatMethods: the methods of a Generator that take a conversation, which the chat template makes a prompt of."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any, overload

from qwen3fast.checks import checked_flag, checked_text
from qwen3fast.results import GenerationResult, StreamChunk
from qwen3fast.sampling_params import SamplingParams, takes_params
from qwen3fast.scheduling.builder import RequestBuilder
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.scheduling.prompt import Overflow, fitting_text, of_kind
from qwen3fast.text.chat_template import Tools
from qwen3fast.text.reasoning import BEGIN_REASONING
from qwen3fast.text.tokenizer import Message, Tokenizer


class ChatMethods:
    """Replies to conversations."""

    # Set or defined by the Generator.
    tokenizer: Tokenizer | None
    default_params: SamplingParams
    max_seq_len: int
    generate: Callable[..., Any]
    stream: Callable[..., Iterator[StreamChunk]]
    astream: Callable[..., Any]
    submit: Callable[..., RequestHandle]
    _builder: RequestBuilder

    _has_warned_greedy_reasoning = False

    @overload
    def chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = ...,
        *,
        enable_thinking: bool = ...,
        tools: Tools | None = ...,
        continue_final_message: bool | str = ...,
        on_overflow: Overflow = ...,
        progress: bool = ...,
    ) -> GenerationResult: ...

    @overload
    def chat(
        self,
        messages: list[list[Message]],
        params: SamplingParams | list[SamplingParams] | None = ...,
        *,
        enable_thinking: bool = ...,
        tools: Tools | None = ...,
        continue_final_message: bool | str = ...,
        on_overflow: Overflow = ...,
        progress: bool = ...,
    ) -> list[GenerationResult]: ...

    @takes_params
    def chat(
        self,
        messages: Any,
        params: Any = None,
        *,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
        on_overflow: Overflow = "error",
        progress: bool = False,
    ) -> GenerationResult | list[GenerationResult]:
        """Generate the reply to a conversation, or to each of several, with the chat template.

        messages: the messages of a conversation, or a list of conversations. params: one for all, or a list with one
        for each conversation.
        enable_thinking: passed to the chat template; False also closes the reasoning if the template opens it, and
        replaces the preset of Qwen3's models that reason (temperature 0.6, top_p 0.95) by the one without (0.7, 0.8).
        tools: JSON schemas, or Python functions. continue_final_message: go on with the last message, which holds the
        beginning of the reply, as in `Tokenizer.apply_chat_template`; the result holds only what was added.
        progress: as in `generate`.
        Returns: one result for one conversation, otherwise a list in their order.
        Raises: ValueError without a chat template or for malformed messages; otherwise as `generate`.
        """
        is_many = isinstance(messages, list | tuple) and bool(messages) and isinstance(messages[0], list | tuple)
        conversations = messages if is_many else [messages]
        each = list(params) if isinstance(params, list | tuple) else [params] * len(conversations)
        if len(each) != len(conversations):
            raise ValueError(
                f"got {len(each)} SamplingParams for {len(conversations)} conversations; pass one, or one for each"
            )
        prompts: list[Any] = []
        for i, conversation in enumerate(conversations):
            about = (enable_thinking, tools, continue_final_message, on_overflow)
            try:
                prompt, each[i] = self._turn(conversation, each[i], *about)
            except ValueError as err:
                if not is_many:
                    raise
                raise of_kind(err)(f"conversations[{i}]: {err}") from err
            prompts.append(prompt)
        prompt, given = (prompts, each) if is_many else (prompts[0], each[0])
        replies = self.generate(prompt, given, on_overflow=on_overflow, progress=progress, tools=tools)
        for reply in replies if is_many else [replies]:
            if reply.finish_reason == "length" and reply.reasoning and not reply.answer:
                limits = "thinking_budget limits the reasoning; max_tokens and max_seq_len limit the reply"
                warnings.warn(f"the reply ended inside its reasoning, without an answer; {limits}", stacklevel=3)
        return replies  # type: ignore[no-any-return]

    @takes_params
    def stream_chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
        on_overflow: Overflow = "error",
    ) -> Iterator[StreamChunk]:
        """Stream the reply to a conversation, with the chat template.

        Raises: ValueError at the call without a chat template or for malformed messages; otherwise as `stream`.
        """
        about = (enable_thinking, tools, continue_final_message, on_overflow)
        prompt, params = self._turn(messages, params, *about)
        return self.stream(prompt, params, on_overflow=on_overflow, tools=tools)

    @takes_params
    async def astream_chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
        on_overflow: Overflow = "error",
    ) -> AsyncIterator[StreamChunk]:
        """Stream the reply to a conversation, with the chat template, in an asyncio task.

        Raises: ValueError at the first chunk without a chat template or for malformed messages; otherwise as `astream`.
        """
        about = (enable_thinking, tools, continue_final_message, on_overflow)
        prompt, params = await asyncio.to_thread(self._turn, messages, params, *about)
        async with aclosing(self.astream(prompt, params, on_overflow=on_overflow, tools=tools)) as chunks:
            async for chunk in chunks:
                yield chunk

    @takes_params
    def submit_chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
        on_overflow: Overflow = "error",
        timeout: float | None = None,
    ) -> RequestHandle:
        """Start the reply to a conversation, with the chat template, and return at once; otherwise as `submit`."""
        about = (enable_thinking, tools, continue_final_message, on_overflow)
        prompt, params = self._turn(messages, params, *about)
        return self.submit(prompt, params, on_overflow=on_overflow, timeout=timeout, tools=tools)

    def _turn(
        self,
        messages: Any,
        params: SamplingParams | None,
        enable_thinking: bool,
        tools: Tools | None,
        continue_final_message: bool | str,
        on_overflow: Overflow,
    ) -> tuple[list[int], SamplingParams | None]:
        """Return the prompt of a conversation, and the parameters of its reply."""
        prompt = self.render(messages, params, enable_thinking, tools, continue_final_message, on_overflow)
        if not enable_thinking and not continue_final_message:
            params = self._builder.without_reasoning(params, prompt)
        return prompt, params

    def render(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        enable_thinking: bool = True,
        tools: Tools | None = None,
        continue_final_message: bool | str = False,
        on_overflow: Overflow | None = "error",
        max_seq_len: int | None = None,
    ) -> list[int]:
        """Return the prompt of a conversation as token ids, for the methods that take a prompt.

        It warns once about greedy decoding with reasoning.
        on_overflow: for a conversation that is surely longer than max_seq_len (by default the Generator's): "cut"
        leaves its end, still too long; None is "error" where "cut" is no choice.
        Raises: ValueError without a chat template, for malformed messages, or for "error".
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer, so it cannot chat")
        if not isinstance(params, SamplingParams | None):
            raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
        enable_thinking = checked_flag("enable_thinking", enable_thinking)  # templates read 0 as True
        temperature = (params or SamplingParams()).with_defaults(self.default_params).temperature
        text = self.tokenizer.apply_chat_template(
            messages, tools, enable_thinking=enable_thinking, continue_final_message=continue_final_message
        )
        text = checked_text("the output of the chat template", text)
        has_choice = "enable_thinking" in (self.tokenizer.chat_template or "")
        reasons = (enable_thinking and has_choice) or text.rstrip().endswith(BEGIN_REASONING)
        if reasons and temperature == 0 and not self._has_warned_greedy_reasoning:
            self._has_warned_greedy_reasoning = True
            advice = "set what the model's card recommends, for Qwen3 temperature 0.6, top_p 0.95, top_k 20"
            other = "; or pass enable_thinking=False (no --think)" if has_choice else ""
            warnings.warn(
                f"greedy decoding (temperature 0) with reasoning can repeat endlessly; {advice}{other}",
                stacklevel=5,  # of `chat`, past `takes_params`
            )
        return self.tokenizer.encode(fitting_text(text, self.tokenizer, max_seq_len or self.max_seq_len, on_overflow))
