"""ServerState: the state that all endpoints of a server share."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request

from qwen3fast.results import GenerationResult
from qwen3fast.server.errors import ANTHROPIC_PATH, to_api_error
from qwen3fast.server.metrics import Metrics
from qwen3fast.server.models import Models, ServedModel
from qwen3fast.server.options import ServerOptions
from qwen3fast.server.store import ResponseStore
from qwen3fast.server.stream import EventStream, event

logger = logging.getLogger("qwen3fast.server")
T = TypeVar("T")


class ServerState:
    """The models, options and metrics of a server.

    Attributes:
        responses: the latest responses of `/v1/responses`.
        is_draining: new requests are refused; running ones continue to their end.
        in_flight: number of requests being answered.
        compiling: by model, how many forms are still to be compiled while it answers; without those that are done.
    """

    def __init__(self, models: Models, options: ServerOptions) -> None:
        self.models, self.options = models, options
        self.metrics = Metrics(models)
        self.responses = ResponseStore()
        self.is_draining = False
        self.in_flight = 0
        self.compiling: dict[str, int] = {}

    def in_time(self, work: Awaitable[T]) -> Awaitable[T]:
        """Wait for work within a request's time limit. Raises: TimeoutError; exceptions of the work."""
        return asyncio.wait_for(work, self.options.request_timeout_s)

    def note(self, request: Request, served: ServedModel, prompt: Any) -> None:
        """Record a request's model for the log; log its prompt if the options say so."""
        request.state.model = served.name
        if self.options.log_prompts:
            logger.info("%s prompt: %s", request.state.id, json.dumps(prompt, default=str))

    def count(self, request: Request, served: ServedModel, finished: list[GenerationResult]) -> None:
        """Count finished replies in the metrics; log them if the options say so."""
        for result in finished:
            self.metrics.observe(served.name, result)
            if self.options.log_prompts:
                logger.info("%s reply: %s", request.state.id, json.dumps(result.text))

    async def event_stream(
        self, request: Request, events: AsyncGenerator[bytes, None], headers: dict[str, str]
    ) -> EventStream:
        """Return the response that sends these events, and an error event if they end in an exception.

        Raises: exceptions before the first event, which can still become a status code.
        """
        first = await anext(events)

        async def whole() -> AsyncGenerator[bytes, None]:
            async with aclosing(events):
                yield first
                async for each in events:
                    yield each

        def error_event(err: Exception) -> bytes:
            error = to_api_error(err)
            if error.status == 500:
                logger.error("%s failed while streaming", request.state.id, exc_info=err)
            name = "error" if request.url.path == ANTHROPIC_PATH else None
            return event(error.body(request.url.path), name)

        return EventStream(whole(), self.options, error_event, headers)


def state_of(request: Request) -> ServerState:
    """Return the server's state."""
    state = request.app.state.server
    assert isinstance(state, ServerState), "create_app sets it"
    return state
