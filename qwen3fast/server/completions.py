"""`POST /v1/completions`: texts or token ids continued as they are. Source: OpenAI API reference, "Completions"."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen3fast.results import GenerationResult, TokenLogprobs
from qwen3fast.server.errors import ApiError
from qwen3fast.server.fields import Fields, describe, read_fields, refuse_or_name
from qwen3fast.server.models import ServedModel, tokenizer_of
from qwen3fast.server.replies import (
    Prompt,
    new_id,
    now,
    pieces,
    read_stream_options,
    results,
    started,
    usage,
    usage_so_far,
)
from qwen3fast.server.sampling import Sampling, read_sampling
from qwen3fast.server.state import state_of
from qwen3fast.server.stream import DONE, event, unless_disconnected
from qwen3fast.text.tokenizer import Tokenizer

MAX_PROMPTS = 2048
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class CompletionRequest:
    """A request for a completion.

    echo: the text begins with the prompt. include_usage: in a last event of a stream. counts_tokens: usage so far also
    in each event.
    """

    served: ServedModel
    prompts: list[Prompt]
    sampling: Sampling
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    counts_tokens: bool = False
    id: str = field(default_factory=lambda: new_id("cmpl"))
    created: int = field(default_factory=now)

    def envelope(self) -> dict[str, Any]:
        """Return the fields that every object of this completion has."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name}

    def jobs(self) -> list[Any]:
        """Return prompt and parameters of each reply; replies to the same prompt follow one another."""
        return [(prompt, params) for prompt in self.prompts for params in self.sampling.each()]

    def echoed(self, index: int) -> str:
        """Return the text before reply `index`: its prompt with echo, otherwise nothing."""
        if not self.echo:
            return ""
        prompt = self.prompts[index // self.sampling.n]
        return prompt if isinstance(prompt, str) else tokenizer_of(self.served).decode(prompt)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens stand before those of the reply's."""
        return self.sampling.params.prompt_logprobs is not None

    def first_id(self, index: int) -> int:
        """Return the first token of reply `index`'s prompt."""
        prompt = self.prompts[index // self.sampling.n]
        return prompt[0] if isinstance(prompt, list) else tokenizer_of(self.served).encode(prompt)[0]


async def completions(request: Request) -> Response:
    """Continue one or several prompts, at once or as a stream."""
    state = state_of(request)
    fields = await read_fields(request)
    wanted = read_completion(fields, state.models.choose(fields, "generate"))
    headers = refuse_or_name(fields, state.options.strict)
    state.note(request, wanted.served, wanted.prompts)
    if wanted.stream:
        return await state.event_stream(request, _events(request, wanted), headers)
    finished = await unless_disconnected(request, state.in_time(_complete(request, wanted)))
    tokenizer = wanted.served.model.tokenizer
    choices = [_choice(wanted, i, result, tokenizer) for i, result in enumerate(finished)]
    count = usage(finished, len(wanted.prompts), tokenizer)
    return JSONResponse({**wanted.envelope(), "choices": choices, "usage": count}, headers=headers)


def read_completion(fields: Fields, served: ServedModel) -> CompletionRequest:
    """Read the fields of a completion. Raises: ApiError (400) naming the field."""
    logprobs = fields.integer("logprobs", 0, 20)
    for name in ("best_of", "suffix"):
        if fields.raw(name) not in (None, 1, ""):
            raise ApiError(400, "is not supported", fields.name(name), "unsupported")
    fields.take("user")
    sampling = read_sampling(fields, ("max_completion_tokens", "max_tokens"), logprobs, DEFAULT_MAX_TOKENS)
    stream, echo = fields.flag("stream"), fields.flag("echo")
    if echo and logprobs is not None:
        sampling = replace(sampling, params=replace(sampling.params, prompt_logprobs=logprobs))
    prompts = read_prompts(fields, "prompt")
    return CompletionRequest(served, prompts, sampling, echo, stream, *read_stream_options(fields))


def read_prompts(fields: Fields, key: str) -> list[Prompt]:
    """Return the prompts of a field: a text, token ids, or a list of either. Raises: ApiError (400)."""
    value = fields.required(key, fields.raw(key))
    path = fields.name(key)
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) or _is_ids(v) for v in value):
        expected = "a string, a list of token ids, or a non-empty list of either"
        raise ApiError(400, f"must be {expected}, got {describe(value)}", path, "invalid_type")
    if len(value) > MAX_PROMPTS:
        raise ApiError(400, f"at most {MAX_PROMPTS} prompts, got {len(value)}", path, "invalid_value")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


async def _complete(request: Request, wanted: CompletionRequest) -> list[GenerationResult]:
    state = state_of(request)
    async with started(wanted.served, wanted.jobs(), state.options.compile_timeout_s) as handles:
        finished = await results(handles)
    state.count(request, wanted.served, finished)
    return finished


def _choice(wanted: CompletionRequest, index: int, result: GenerationResult, tokenizer: Any) -> dict[str, Any]:
    logprobs = None
    if result.logprobs is not None and tokenizer is not None:
        ats = [*(result.prompt_logprobs or ()), *result.logprobs]
        logprobs = to_logprobs(ats, tokenizer, 0, wanted.first_id(index) if wanted.scores_prompt else None)
    text = wanted.echoed(index) + result.text
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": result.finish_reason}


def to_logprobs(
    ats: Sequence[TokenLogprobs | None], tokenizer: Tokenizer, offset: int, first_id: int | None = None
) -> dict[str, Any]:
    """Return the `logprobs` object of the older API.

    offset: characters of the text before these tokens. first_id: the token of an entry that is None: the prompt's
    first one, which has no log-probability (null).
    """

    def text_of(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    tokens = [text_of(first_id or 0) if at is None else text_of(at.token_id) for at in ats]
    offsets = [offset + sum(len(token) for token in tokens[:i]) for i in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [None if at is None else max(at.logprob, -9999.0) for at in ats],
        "top_logprobs": [
            None if at is None else {text_of(i): max(logprob, -9999.0) for i, logprob in at.top} for at in ats
        ],
        "text_offset": offsets,
    }


async def _events(request: Request, wanted: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed completion."""
    state, tokenizer = state_of(request), wanted.served.model.tokenizer
    num_replies = len(wanted.prompts) * wanted.sampling.n
    finished: dict[int, GenerationResult] = {}
    offsets = [0] * num_replies

    new_tokens = [0] * num_replies

    def chunk(index: int, text: str, logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        extra: dict[str, Any] = {"usage": None} if wanted.include_usage else {}
        if wanted.counts_tokens:
            extra = {"usage": usage_so_far(len(handles[index].request.prompt_ids), new_tokens[index])}
        return event({**wanted.envelope(), "choices": [choice], **extra})

    async with started(wanted.served, wanted.jobs(), state.options.compile_timeout_s) as handles:
        for i in range(num_replies if not wanted.scores_prompt else 0):
            yield chunk(i, wanted.echoed(i))
        async for piece in pieces(handles, state.options.stream_interval_s):
            i, news = piece.index, piece.chunk
            new_tokens[i] += len(news.token_ids)
            logprobs, text = None, news.text
            ats = [*(news.prompt_logprobs or ()), *(news.logprobs or ())]
            if ats and tokenizer is not None:
                first_id = wanted.first_id(i) if news.prompt_logprobs else None
                logprobs = to_logprobs(ats, tokenizer, offsets[i], first_id)
                offsets[i] += sum(len(token) for token in logprobs["tokens"])
            if news.prompt_logprobs:  # the first chunk
                text = wanted.echoed(i) + text
            if news.result is not None:
                finished[i] = news.result
            if text or logprobs or news.finish_reason:
                yield chunk(i, text, logprobs, news.finish_reason)
    every = [finished[i] for i in range(num_replies)]
    state.count(request, wanted.served, every)
    if wanted.include_usage:
        count = usage(every, len(wanted.prompts), tokenizer)
        yield event({**wanted.envelope(), "choices": [], "usage": count})
    yield DONE
