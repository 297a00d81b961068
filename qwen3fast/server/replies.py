"""Replies of the engine to one request: started together, streamed, and canceled when the client leaves."""

from __future__ import annotations

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.results import GenerationResult, StreamChunk
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.scheduling.handle import RequestHandle
from qwen3fast.server.errors import ApiError
from qwen3fast.server.fields import Fields, read_fields, refuse_or_name
from qwen3fast.server.models import ServedModel, generator_of
from qwen3fast.server.sampling import Sampling
from qwen3fast.server.state import state_of
from qwen3fast.server.stream import unless_disconnected

Prompt = str | list[int]
# Threads of their own: schemas that take long to compile, which no thread can give up, hold up one another alone.
_COMPILERS = ThreadPoolExecutor(2, "compile-grammar")


def new_id(prefix: str) -> str:
    """Return an id such as "chatcmpl-0f...", which cannot be guessed."""
    return f"{prefix}-{secrets.token_hex(16)}"


def now() -> int:
    """Return the time in seconds since 1970, as OpenAI's `created` has it."""
    return int(time.time())


@dataclass(frozen=True)
class ReplyRequest(ABC):
    """A request for replies of a Generator, as an endpoint has read it.

    prompts: the prompts, or the messages of a conversation as the chat template reads them. tools: the functions that
    they offer, as the chat template reads them. stream: send the replies as events. created: seconds since 1970.
    """

    served: ServedModel
    sampling: Sampling
    prompts: list[Any]
    tools: list[dict[str, Any]] | None = field(default=None, kw_only=True)
    stream: bool = field(default=False, kw_only=True)
    created: int = field(default_factory=now, kw_only=True)

    @property
    def num_replies(self) -> int:
        """The number of replies to all prompts; a conversation is one."""
        return self.sampling.n

    @abstractmethod
    def jobs(self) -> list[tuple[Prompt, SamplingParams]]:
        """Return prompt and parameters of each reply. Raises: ValueError for prompts that cannot be rendered."""


R = TypeVar("R", bound=ReplyRequest)


async def answer(
    request: Request,
    read: Callable[[Fields, ServedModel], R],
    to_body: Callable[[R, list[GenerationResult]], dict[str, Any]],
    events: Callable[[Request, R], AsyncGenerator[bytes, None]],
) -> Response:
    """Return the response to a request for replies: one JSON object, or a stream of events if it asks for one.

    read: the endpoint's reading of the fields, for the model that they name.
    Raises: ApiError; the error that ended a reply.
    """
    state = state_of(request)
    fields = await read_fields(request)
    wanted = read(fields, state.models.choose(fields, "generate"))
    headers = refuse_or_name(fields, state.options.strict)
    state.note(request, wanted.served, wanted.prompts)
    if wanted.stream:
        return await state.event_stream(request, events(request, wanted), headers)
    finished = await unless_disconnected(request, state.in_time(_complete(request, wanted)))
    return JSONResponse(to_body(wanted, finished), headers=headers)


async def _complete(request: Request, wanted: ReplyRequest) -> list[GenerationResult]:
    """Return all replies, once they have ended. Raises: the error that ended one of them."""
    state = state_of(request)
    async with started(wanted, state.options.compile_timeout_s) as handles:
        finished = list(await asyncio.gather(*(handle.aresult() for handle in handles)))
    if wanted.sampling.only_prompt:
        finished = [_only_prompt(result) for result in finished]
    state.count(request, wanted.served, finished)
    return finished


def _only_prompt(result: GenerationResult) -> GenerationResult:
    """Return a result without its reply: the engine makes one token at least."""
    return replace(
        result,
        text="",
        reasoning="",
        answer="",
        token_ids=[],
        tool_calls=[],
        malformed_tool_calls=[],
        logprobs=None if result.logprobs is None else [],
        finish_reason="length",
        metrics=replace(result.metrics, new_tokens=0),
    )


@asynccontextmanager
async def started(wanted: ReplyRequest, compile_timeout_s: float) -> AsyncIterator[list[RequestHandle]]:
    """Start the replies of a request, and cancel unfinished ones at the end of the block.

    Raises: QueueFullError if the queue has no room for all of them (none runs then); ApiError (400) if it never has;
    ValueError for invalid jobs.
    """
    handles: list[RequestHandle] = []
    generator = generator_of(wanted.served)
    is_wanted = True
    count, most = wanted.num_replies, generator.options.max_queue
    if count > most:
        raise ApiError(400, f"{count} replies at once (prompts x n) exceed --max-queue {most}; ask for fewer")
    # In threads: rendering, tokenizing and compiling schemas must not hold up other clients.
    jobs = await asyncio.to_thread(wanted.jobs)

    def start_all() -> None:
        for prompt, params in jobs:
            with_adapter = replace(params, adapter=wanted.served.adapter)
            handles.append(generator.submit(prompt, with_adapter, timeout=0, tools=wanted.tools))
            if not is_wanted:  # a thread cannot be stopped, so it looks for itself
                handles[-1].cancel()
                return

    try:
        try:
            if wanted.sampling.params.is_structured:
                await asyncio.to_thread(
                    generator._builder.grammar_compiler
                )  # built once, which is not the schema's time
                work = asyncio.get_running_loop().run_in_executor(_COMPILERS, start_all)
                await _in_time(work, compile_timeout_s)
            else:
                await asyncio.to_thread(start_all)
        except ValueError as err:
            if (param := wanted.sampling.field_of(err)) is None:
                raise
            raise ApiError(400, str(err), param, "invalid_value") from err
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


async def pieces(handles: list[RequestHandle], min_interval_s: float) -> AsyncIterator[tuple[int, StreamChunk]]:
    """Yield the chunks of all replies, each with the index of its reply.

    min_interval_s: between two chunks of a reply. Raises: the error that ended a reply.
    """
    if len(handles) == 1:  # no tasks and no queue between the engine and its only reader
        async for chunk in handles[0].chunks(min_interval_s):
            yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, StreamChunk] | BaseException | None] = asyncio.Queue(maxsize=2 * len(handles))

    async def read(index: int, handle: RequestHandle) -> None:
        try:
            async for chunk in handle.chunks(min_interval_s):
                await queue.put((index, chunk))
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
            elif isinstance(news, tuple):
                yield news
            else:
                raise news
    finally:
        for task in tasks:
            task.cancel()
