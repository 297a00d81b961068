"""Sampling fields of a request, read into `SamplingParams`: OpenAI's names, and vLLM's for its extensions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from qwen3fast.sampling_params import MAX_COUNT, SamplingParams
from qwen3fast.server.errors import ApiError
from qwen3fast.server.fields import Fields, describe, is_number

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
# vLLM's fields that are not read -> what to use instead.
_INSTEAD = {
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice"), "use structured_outputs"),
    **dict.fromkeys(("guided_grammar", "guided_structural_tag"), "use a JSON schema or a regular expression"),
    "prompt_logprobs": "/v1/completions gives them with echo and logprobs",
}
LOWEST = -9999.0  # log-probability in replies: JSON has no infinity
# How messages on the schema, pattern or grammar of a reply begin.
OF_SHAPE = ("json_schema ", "regex ", "this JSON schema ", "this regular expression ", "this grammar ", "this schema, ")
# Reasoning tokens for OpenAI's `reasoning_effort`. OpenAI states no numbers; these are ours, listed in the docs.
REASONING_BUDGETS: dict[str, int | None] = {
    "none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None,
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """The sampling of the replies to a request.

    params: for one reply. n: replies to each prompt. enable_thinking: None leaves it to the server.
    only_prompt: the request wants no token; params has one, which the engine needs. shaped_by: the path of the field
    that the schema, pattern or grammar of the replies comes from.
    """

    params: SamplingParams
    n: int = 1
    enable_thinking: bool | None = None
    only_prompt: bool = False
    shaped_by: str | None = None

    def each(self) -> list[SamplingParams]:
        """Return the parameters of each reply: reply i has seed + i, as `Generator.generate` defines n."""
        seed = self.params.seed
        if seed is None:
            return [self.params] * self.n
        return [replace(self.params, seed=(seed + i + 2**63) % 2**64 - 2**63) for i in range(self.n)]

    def field_of(self, error: ValueError) -> str | None:
        """Return the field at fault in an error of the engine; None if it is none of these parameters."""
        names = ("logit_bias", "allowed_token_ids")
        return self.shaped_by if is_of_shape(error) else next((n for n in names if str(error).startswith(n)), None)


def read_sampling(
    fields: Fields,
    max_tokens_names: tuple[str, ...],
    logprobs: int | None = None,
    default_max_tokens: int | None = None,
    least_max_tokens: int = 1,
) -> Sampling:
    """Read the sampling fields of a request.

    max_tokens_names: the fields that limit the reply's tokens, in order of precedence.
    logprobs: the number of alternatives per token (endpoints have different fields for it).
    default_max_tokens: None allows the rest of the context. least_max_tokens: 0 allows requests for no token.
    Raises: ApiError (400) naming the field.
    """
    refuse_unless(fields, bad_words=[], skip_special_tokens=True, include_stop_str_in_output=False)
    _refuse(fields, _INSTEAD)
    limits = [fields.integer(name, least_max_tokens, MAX_COUNT) for name in max_tokens_names]
    limit = next((limit for limit in limits if limit is not None), default_max_tokens)
    shaped_by, structure = _structure(fields)
    values: dict[str, Any] = {
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p"),
        "max_tokens": 1 if limit == 0 else limit,
        "min_tokens": fields.integer("min_tokens", 0, MAX_COUNT) or 0,
        "stop": _stop(fields),
        "stop_token_ids": fields.ids("stop_token_ids") or (),
        "ignore_eos": fields.flag("ignore_eos"),
        "seed": fields.integer("seed"),
        "repetition_penalty": fields.number("repetition_penalty"),
        "presence_penalty": fields.number("presence_penalty") or 0.0,
        "frequency_penalty": fields.number("frequency_penalty") or 0.0,
        "logit_bias": _logit_bias(fields),
        "allowed_token_ids": fields.ids("allowed_token_ids"),
        "logprobs": logprobs,
        **structure,
    }
    budget, enable_thinking = _reasoning(fields)
    n = fields.integer("n", 1, MAX_CHOICES) or 1
    params = checked_params(fields, shaped_by, **values, thinking_budget=budget)
    return Sampling(params, n, enable_thinking, limit == 0, shaped_by)


def refuse_unless(fields: Fields, **neutral: Any) -> None:
    """Check that fields that are not supported have the values that change nothing. Raises: ApiError (400)."""
    for name, value in neutral.items():
        given = fields.raw(name, value)
        if given != value or isinstance(given, bool) != isinstance(value, bool):  # False == 0
            raise fields.error(name, f"is not supported, other than {describe(value)}", "unsupported")


def _refuse(fields: Fields, instead: dict[str, str]) -> None:
    for name, other in instead.items():
        if fields.raw(name) is not None:
            raise fields.error(name, f"is not supported; {other}", "unsupported")


def checked_params(fields: Fields, shaped_by: str | None = None, **values: Any) -> SamplingParams:
    """Return the SamplingParams of these values. shaped_by: as in `Sampling`.

    Raises: ApiError (400) for a value out of range, naming its field if the request has one.
    """
    try:
        return SamplingParams(**values)
    except ValueError as err:
        name = next((name for name in values if str(err).startswith(name) and fields.raw(name) is not None), None)
        raise ApiError(400, str(err), shaped_by if is_of_shape(err) else name, "invalid_value") from err


def is_of_shape(error: ValueError) -> bool:
    """Return whether an error is about the schema, pattern or grammar of a reply."""
    return str(error).startswith(OF_SHAPE)


def _top_k(fields: Fields) -> int | None:
    top_k = fields.integer("top_k", -1, MAX_COUNT)
    return 0 if top_k == -1 else top_k  # vLLM writes -1 for "all"


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.raw("stop", ())
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) for s in stops):
        raise fields.error("stop", f"must be a string or a list of strings, got {describe(stop)}")
    if len(stops) > MAX_STOP_STRINGS:
        raise fields.error("stop", f"at most {MAX_STOP_STRINGS} stop strings, got {len(stops)}")
    return tuple(s for s in stops if s)


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    bias = fields.raw("logit_bias")
    if bias is None:
        return None
    is_right = isinstance(bias, dict) and all(
        key.isascii() and key.isdigit() and len(key) < 10 and is_number(value) and -100 <= value <= 100
        for key, value in bias.items()
    )
    if not is_right:
        raise fields.error("logit_bias", f"must map token ids to numbers from -100 to 100, got {describe(bias)}")
    return {int(key): float(value) for key, value in bias.items()}


def _structure(fields: Fields) -> tuple[str | None, dict[str, Any]]:
    """Return json_schema or regex, from `response_format` or vLLM's `structured_outputs`.

    The first value is the path of the field.
    """
    outputs = fields.object("structured_outputs")
    given = {} if outputs is None else {outputs.name(key): shape for key, shape in _shapes(outputs).items()}
    response_format = read_format(fields.object("response_format"))
    if response_format is not None:
        given["response_format"] = ("json_schema", response_format)
    if len(given) > 1:
        raise ApiError(400, f"only one of {', '.join(given)} can shape a reply", list(given)[1])
    return next(iter(given), None), dict(given.values())


def _shapes(outputs: Fields) -> dict[str, tuple[str, Any]]:
    """Return the constraints of `structured_outputs` by field: the name of a sampling parameter and its value."""
    _refuse(outputs, dict.fromkeys(("grammar", "structural_tag"), "use a JSON schema or a regular expression"))
    choices = outputs.items("choice", lambda item: isinstance(item, str) and item != "", "a list of non-empty strings")
    if choices == []:
        raise outputs.error("choice", "must be a list of non-empty strings")
    found = {
        "json": ("json_schema", outputs.raw("json")),
        "regex": ("regex", outputs.text("regex")),
        "choice": ("regex", choices and "|".join(map(re.escape, choices))),
        "json_object": ("json_schema", {"type": "object"} if outputs.flag("json_object") else None),
    }
    return {key: shape for key, shape in found.items() if shape[1] is not None}


def read_format(form: Fields | None, is_flat: bool = False) -> dict[str, Any] | None:
    """Return the JSON schema that a reply must follow; None for free text.

    is_flat: the object holds the schema itself, as in the Responses API, not in an object `json_schema`.
    Raises: ApiError (400) naming the field.
    """
    if form is None:
        return None
    kind = form.required("type", form.text("type", choices=("text", "json_object", "json_schema")))
    if is_flat:
        form.take("name", "description", "strict")
    if kind != "json_schema":
        return {"type": "object"} if kind == "json_object" else None
    described = form if is_flat else form.required("json_schema", form.object("json_schema"))
    described.take("name", "description", "strict")  # a schema is always followed strictly
    schema = described.mapping("schema")
    return {"type": "object"} if schema is None and not is_flat else described.required("schema", schema)


def _reasoning(fields: Fields) -> tuple[int | None, bool | None]:
    """Return the budget of reasoning tokens, and the template's `enable_thinking`."""
    budget, enable = fields.integer("thinking_budget", 0, MAX_COUNT), None
    effort = fields.text("reasoning_effort", choices=tuple(REASONING_BUDGETS))
    if effort is not None:
        enable = effort != "none"
        budget = budget if budget is not None or not enable else REASONING_BUDGETS[effort]
    template = fields.object("chat_template_kwargs")
    if template is not None:
        enable = enable if template.raw("enable_thinking") is None else template.flag("enable_thinking")
        if template.unknown():
            raise ApiError(400, "only enable_thinking is supported", template.unknown()[0], "unsupported")
    return budget, enable
