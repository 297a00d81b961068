"""Results of requests in the form that applications get: texts, log-probabilities and times."""

from __future__ import annotations

from qwen3fast.engine.state import Logprobs
from qwen3fast.results import GenerationResult, RequestMetrics, TokenLogprobs
from qwen3fast.scheduling.request import Request
from qwen3fast.text.stream import TextStream
from qwen3fast.text.tool_calls import CallFormat, parse_tool_calls


def result_of(request: Request, stream: TextStream, call_format: CallFormat) -> GenerationResult:
    """Return the result of a request that has ended without an error. stream: its text."""
    first_s = request.first_token_s or request.finished_s  # cancelled before there was one
    prefill_started_s = request.prefill_started_s or request.finished_s
    metrics = RequestMetrics(
        prompt_tokens=len(request.prompt_ids),
        new_tokens=len(request.output_ids),
        queue_s=prefill_started_s - request.submitted_s,
        time_to_first_token_s=first_s - request.submitted_s,
        prefill_s=first_s - prefill_started_s,
        decode_s=request.finished_s - first_s,
        reused_tokens=request.reused_tokens,
    )
    parsed = parse_tool_calls(stream.answer, call_format)
    last = request.output_ids[-1] if request.output_ids and request.finish_reason == "stop" else None
    stop_id = last if last in request.stop_ids - request.eos_ids else None
    return GenerationResult(
        stream.text,
        list(request.output_ids),
        str(request.finish_reason),
        metrics,
        stream.reasoning,
        parsed.content,
        parsed.tool_calls,
        parsed.malformed,
        logprobs_of(request, 0, len(request.output_ids)),
        prompt_logprobs_of(request),
        stop_reason=stream.stop_string if stream.stop_string is not None else stop_id,
    )


def logprobs_of(request: Request, begin: int, end: int) -> list[TokenLogprobs] | None:
    """Return the log-probabilities of the reply's tokens begin..end - 1, if they were asked for."""
    if request.logprobs is None:
        return None
    return _token_logprobs(request.output_ids[begin:end], request.output_logprobs[begin:end])


def prompt_logprobs_of(request: Request) -> list[TokenLogprobs | None] | None:
    """Return an entry per token of the prompt, if they were asked for; None where there is no log-probability."""
    if request.wanted_logprobs is None:
        return None
    first, known = request.wanted_logprobs.first, request.prompt_logprobs
    end = first + len(known)  # of a prompt that was cancelled, before its end
    found = _token_logprobs(request.prompt_ids[first:end], known)
    return [*[None] * min(first, len(request.prompt_ids)), *found, *[None] * (len(request.prompt_ids) - end)]


def _token_logprobs(token_ids: list[int], logprobs: list[Logprobs]) -> list[TokenLogprobs]:
    pairs = zip(token_ids, logprobs, strict=True)
    return [TokenLogprobs(token, at.chosen, list(zip(at.ids, at.values, strict=True))) for token, at in pairs]
