"""Replies of the engine to one request: started together, streamed, and canceled when the client leaves."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from qwen3fast.results import GenerationResult, StreamChunk
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.server.fields import Fields
from qwen3fast.server.models import ServedModel, generator_of
from qwen3fast.text.chat_template import Tools
from qwen3fast.text.tokenizer import Tokenizer

Prompt = str | list[int]
END_OF_REASONING = "</think>"
# Threads of their own: schemas that take long to compile, which no thread can give up, hold up one another alone.
_COMPILERS = ThreadPoolExecutor(2, "compile-grammar")


@dataclass(frozen=True)
class Piece:
    """A new part of a reply. index: of the reply in the request. chunk: the new part."""

    index: int
    chunk: StreamChunk


def new_id(prefix: str) -> str:
    """Return an id such as "chatcmpl-0f...", which cannot be guessed."""
    return f"{prefix}-{secrets.token_hex(16)}"


def now() -> int:
    """Return the time in seconds since 1970, as OpenAI's `created` has it."""
    return int(time.time())


@asynccontextmanager
async def started(
    served: ServedModel,
    jobs: Sequence[tuple[Prompt, SamplingParams]],
    compile_timeout_s: float,
    tools: Tools | None = None,
) -> AsyncIterator[list[RequestHandle]]:
    """Start one reply per job, and cancel unfinished ones at the end of the block.

    served: the model, which may be an adapter of a Generator.
    tools: the functions that the prompts offer.
    Raises: QueueFullError if the queue has no room for all of them (none runs then); ValueError for invalid jobs.
    """
    handles: list[RequestHandle] = []
    generator = generator_of(served)
    is_wanted = True

    def start_all() -> None:  # in a thread: tokenizing and compiling schemas must not hold up other clients
        for prompt, params in jobs:
            with_adapter = replace(params, adapter=served.adapter)
            handles.append(generator.submit(prompt, with_adapter, timeout=0, tools=tools))
            if not is_wanted:  # a thread cannot be stopped, so it looks for itself
                handles[-1].cancel()
                return

    has_grammar = any(params.is_structured for _, params in jobs)
    try:
        if has_grammar:
            work = asyncio.get_running_loop().run_in_executor(_COMPILERS, start_all)
            await _in_time(work, compile_timeout_s)
        else:
            await asyncio.to_thread(start_all)
        yield handles
    finally:
        is_wanted = False
        for handle in handles:
            handle.cancel()


async def _in_time(work: Any, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(work, timeout_s)
    except asyncio.TimeoutError as err:
        raise ValueError(f"this schema, pattern or grammar takes more than {timeout_s} s to compile") from err


async def results(handles: list[RequestHandle]) -> list[GenerationResult]:
    """Wait for all replies. Raises: the error that ended one of them."""
    return list(await asyncio.gather(*(handle.aresult() for handle in handles)))


async def pieces(handles: list[RequestHandle], min_interval_s: float) -> AsyncIterator[Piece]:
    """Yield new parts of all replies, each at least `min_interval_s` apart. Raises: the error that ended a reply."""
    if len(handles) == 1:  # no tasks and no queue between the engine and its only reader
        async for chunk in handles[0].chunks(min_interval_s):
            yield Piece(0, chunk)
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(maxsize=2 * len(handles))

    async def read(index: int, handle: RequestHandle) -> None:
        try:
            async for chunk in handle.chunks(min_interval_s):
                await queue.put(Piece(index, chunk))
        except Exception as err:
            await queue.put(err)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(read(i, handle)) for i, handle in enumerate(handles)]
    try:
        running = len(tasks)
        while running:
            news = await queue.get()
            if news is None:
                running -= 1
            elif isinstance(news, Piece):
                yield news
            else:
                raise news
    finally:
        for task in tasks:
            task.cancel()


def usage(all_results: Iterable[GenerationResult], num_prompts: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return OpenAI's `usage` of finished replies; the replies to one prompt count its tokens once."""
    every = list(all_results)
    per_prompt = max(1, len(every) // max(1, num_prompts))
    firsts = every[::per_prompt]
    prompt = sum(result.metrics.prompt_tokens for result in firsts)
    completion = sum(result.metrics.new_tokens for result in every)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(result.metrics.reused_tokens for result in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(reasoning_tokens(r, tokenizer) for r in every)},
    }


def usage_so_far(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Return `usage` of a reply that is not finished."""
    total = prompt_tokens + new_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}


def read_stream_options(fields: Fields) -> tuple[bool, bool]:
    """Return `include_usage` and vLLM's `continuous_usage_stats`. Raises: ApiError (400) naming the field."""
    options = fields.object("stream_options")
    if options is None:
        return False, False
    return options.flag("include_usage"), options.flag("continuous_usage_stats")


def reasoning_tokens(result: GenerationResult, tokenizer: Tokenizer | None) -> int:
    """Return the number of reasoning tokens of a reply, the closing tag included."""
    if tokenizer is None or not result.reasoning:
        return 0
    end = tokenizer.base.token_to_id(END_OF_REASONING)
    return result.token_ids.index(end) + 1 if end in result.token_ids else len(result.token_ids)
