"""`POST /v1/completions`: continuations of texts or token ids. Source: OpenAI API reference, "Completions"."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from qwen3fast.results import GenerationResult, TokenLogprobs
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.server.fields import Fields, describe
from qwen3fast.server.models import ServedModel, tokenizer_of
from qwen3fast.server.replies import Prompt, ReplyRequest, answer, new_id, pieces, started
from qwen3fast.server.sampling import LOWEST, read_sampling, refuse_unless
from qwen3fast.server.state import state_of
from qwen3fast.server.stream import DONE, event
from qwen3fast.server.usage import read_include_usage, usage
from qwen3fast.text.tokenizer import Tokenizer

MAX_PROMPTS = 2048
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class CompletionRequest(ReplyRequest):
    """A request for a completion.

    echo: the text begins with the prompt. include_usage: in a last event of a stream.
    """

    echo: bool
    include_usage: bool
    id: str = field(default_factory=lambda: new_id("cmpl"))

    def envelope(self) -> dict[str, Any]:
        """Return the fields that every object of this completion has."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name}

    @property
    def num_replies(self) -> int:
        """The number of replies to all prompts."""
        return len(self.prompts) * self.sampling.n

    def jobs(self) -> list[tuple[Prompt, SamplingParams]]:
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
        """True if log-probabilities of the prompt's tokens precede the reply's."""
        return self.echo and self.sampling.params.logprobs is not None

    def first_id(self, index: int) -> int:
        """Return the first token of reply `index`'s prompt."""
        prompt = self.prompts[index // self.sampling.n]
        return prompt[0] if isinstance(prompt, list) else tokenizer_of(self.served).encode_prompt(prompt)[0]


async def completions(request: Request) -> Response:
    """Continue one or several prompts, at once or as a stream."""
    return await answer(request, read_completion, to_completions, _events)


def read_completion(fields: Fields, served: ServedModel) -> CompletionRequest:
    """Read the fields of a completion. Raises: ApiError (400) naming the field."""
    logprobs = fields.integer("logprobs", 0, 20)
    refuse_unless(fields, best_of=1, suffix="")
    fields.take("user")
    names = ("max_completion_tokens", "max_tokens")
    sampling = read_sampling(fields, names, logprobs, DEFAULT_MAX_TOKENS, least_max_tokens=0)
    stream, echo = fields.flag("stream"), fields.flag("echo")
    if sampling.only_prompt and not echo:
        raise fields.error("max_tokens", "0 tokens need echo", "invalid_value")
    if sampling.only_prompt and stream:
        raise fields.error("stream", "is not available for 0 tokens; ask without it", "invalid_value")
    if echo and logprobs is not None:
        sampling = replace(sampling, params=replace(sampling.params, prompt_logprobs=logprobs))
    prompts = read_prompts(fields, "prompt")
    return CompletionRequest(served, sampling, prompts, echo, read_include_usage(fields), stream=stream)


def read_prompts(fields: Fields, key: str) -> list[Prompt]:
    """Return the prompts of a field: a text, token ids, or a list of either. Raises: ApiError (400)."""
    value = fields.required(key, fields.raw(key))
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) or _is_ids(v) for v in value):
        expected = "a string, a list of token ids, or a non-empty list of either"
        raise fields.error(key, f"must be {expected}, got {describe(value)}", "invalid_type")
    if len(value) > MAX_PROMPTS:
        raise fields.error(key, f"at most {MAX_PROMPTS} prompts, got {len(value)}", "invalid_value")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def to_completions(wanted: CompletionRequest, finished: list[GenerationResult]) -> dict[str, Any]:
    """Return the `text_completion` object of finished replies."""
    tokenizer = wanted.served.model.tokenizer
    choices = [_choice(wanted, i, result, tokenizer) for i, result in enumerate(finished)]
    return {**wanted.envelope(), "choices": choices, "usage": usage(finished, len(wanted.prompts), tokenizer)}


def _choice(wanted: CompletionRequest, index: int, result: GenerationResult, tokenizer: Any) -> dict[str, Any]:
    logprobs = None
    if result.logprobs is not None and tokenizer is not None:
        ats = [*(result.prompt_logprobs or ()), *result.logprobs]
        first_id = wanted.first_id(index) if wanted.scores_prompt else None
        logprobs = to_logprobs(ats, tokenizer, TextOffset(tokenizer), first_id)
    text = wanted.echoed(index) + result.text
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": result.finish_reason}


class TextOffset:
    """The number of characters before each token. A character may have several tokens, which begin where it does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._chars = tokenizer, 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def before(self, token_id: int) -> int:
        """Return the characters before the next token, which is this one."""
        raw, chars = self._tokenizer.token_bytes(token_id), self._chars
        unfinished = self._utf8.getstate()[0]
        self._chars += len(self._utf8.decode(raw))
        try:
            codecs.getincrementaldecoder("utf-8")().decode(unfinished + raw[:1] if unfinished else b"")
        except UnicodeDecodeError:  # the character before stays unfinished: it is U+FFFD
            chars += 1
        return chars


def to_logprobs(
    ats: Sequence[TokenLogprobs | None], tokenizer: Tokenizer, offset: TextOffset, first_id: int | None = None
) -> dict[str, Any]:
    """Return the `logprobs` object of the older API.

    offset: after the tokens before these. first_id: the token of an entry that is None: the prompt's
    first one, which has no log-probability (null).
    """

    def text_of(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    ids = [first_id or 0 if at is None else at.token_id for at in ats]
    return {
        "tokens": [text_of(i) for i in ids],
        "token_logprobs": [None if at is None else max(at.logprob, LOWEST) for at in ats],
        "top_logprobs": [
            None if at is None else {text_of(i): max(logprob, LOWEST) for i, logprob in at.top} for at in ats
        ],
        "text_offset": [offset.before(i) for i in ids],
    }


async def _events(request: Request, wanted: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed completion."""
    state, tokenizer = state_of(request), wanted.served.model.tokenizer
    num_replies = wanted.num_replies
    finished: dict[int, GenerationResult] = {}
    offsets = [TextOffset(tokenizer) for _ in range(num_replies) if tokenizer is not None]

    def to_event(index: int, text: str, logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        extra = {"usage": None} if wanted.include_usage else {}
        return event({**wanted.envelope(), "choices": [choice], **extra})

    async with started(wanted, state.options.compile_timeout_s) as handles:
        for i in range(num_replies if not wanted.scores_prompt else 0):
            yield to_event(i, wanted.echoed(i))
        async for i, news in pieces(handles, state.options.stream_interval_s):
            logprobs, text = None, news.text
            ats = [*(news.prompt_logprobs or ()), *(news.logprobs or ())]
            if ats and tokenizer is not None:
                first_id = wanted.first_id(i) if news.prompt_logprobs else None
                logprobs = to_logprobs(ats, tokenizer, offsets[i], first_id)
            if news.prompt_logprobs:  # the first chunk
                text = wanted.echoed(i) + text
            if news.result is not None:
                finished[i] = news.result
            if text or logprobs or news.finish_reason:
                yield to_event(i, text, logprobs, news.finish_reason)
    every = [finished[i] for i in range(num_replies)]
    state.count(request, wanted.served, every)
    if wanted.include_usage:
        count = usage(every, len(wanted.prompts), tokenizer)
        yield event({**wanted.envelope(), "choices": [], "usage": count})
    yield DONE
