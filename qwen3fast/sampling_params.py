"""SamplingParams: how the tokens of one request are chosen, and when it ends. Checked when built, before any work.

It holds what was asked for, as plain values; it must not know models, tokenizers or how requests run.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwen3fast.checks import as_integer, checked_flag, checked_text
from qwen3fast.text.plain_data import to_plain

Function = TypeVar("Function", bound=Callable[..., Any])
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]

# Fields by their names in transformers and in OpenAI's API.
OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "do_sample": "temperature",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
}
# The fields that a checkpoint's preset fills in.
PRESET_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
UNSUPPORTED_PRESET = {  # fields of generation_config.json, and the values that change nothing
    "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [], "sequence_bias": {}, "stop_strings": [],
    "no_repeat_ngram_size": 0, "min_new_tokens": 0, "min_length": 0, "num_beams": 1, "typical_p": 1,
}  # fmt: skip

MAX_TEMPERATURE = 1e6  # where all tokens are equally likely already
MIN_TOP_P = torch.finfo(torch.float32).tiny  # keeps the most likely token alone
MAX_PENALTY = 1e3  # of repetition; the smallest is its inverse
MAX_COUNT = 2**31 - 1  # of top_k, tokens and token ids
MAX_STOP_STRINGS = 1024


@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of one request: how its tokens are chosen, and when it ends.

    A field that is None takes its value from the checkpoint's preset (generation_config.json), otherwise the value in
    brackets. NumPy scalars are numbers, booleans are not.

    Attributes:
        temperature: scores are divided by it; 0 is greedy, at most 1e6. [0, or 1.0 where the preset says do_sample]
        top_k: keep the k most likely tokens; 0 keeps all. [0, or 50 where the preset says do_sample]
        top_p: keep the smallest set of tokens whose probability reaches p, above 0; 1 keeps all. [1.0]
        min_p: keep tokens at least min_p times as likely as the most likely; 0 keeps all. [0.0]
        max_tokens: new tokens at most. None takes the preset's max_new_tokens as far as it fits, else it fills the
            context (max_seq_len).
        min_tokens: the first min_tokens new tokens are no end-of-sequence ids and no stop_token_ids, and stop strings
            in their text stay there. Not with json_schema, regex or grammar.
        stop: strings that end the text; never part of it. At most 1024.
        stop_token_ids: ids that end the text, in addition to the model's end-of-sequence ids.
        ignore_eos: continue after end-of-sequence ids; without effect with json_schema, regex or grammar.
        seed: any integer of 64 bits; None draws one.
        repetition_penalty: logits of tokens in the prompt or the reply are divided by it where positive and multiplied
            where negative; above 1 discourages them. From 0.001 to 1000. [1.0]
        presence_penalty: subtracted from the logits of tokens that occur in the reply; from -2 to 2.
        frequency_penalty: subtracted once for each occurrence of the token in the reply; from -2 to 2.
        logit_bias: token id -> the number added to its logit; -inf forbids the token. None adds nothing.
        allowed_token_ids: the only tokens that may be chosen; None allows all.
        logprobs: report log-probabilities, of the model's own logits: 0 of the chosen token, n (at most 20) also of the
            n most likely; None reports none.
        prompt_logprobs: report log-probabilities of the prompt's tokens, in the same form; None reports none. Such a
            prompt is computed from its first token on, without reuse of cached keys and values.
        n: replies to each prompt, at most 128.
        logits_processor: called for each new token with the float32 logits (V,) and the reply's token ids so far,
            int64 (T,), both on the model's device; returns the new logits (V,). It must not keep or change its
            arguments.
        json_schema: the reply is JSON that follows this schema (a dict, or its JSON text).
        regex: the whole reply matches this pattern.
        grammar: the whole reply follows this grammar, in llguidance's form of Lark. At most one of json_schema, regex
            and grammar.
        thinking_budget: tokens of reasoning in the reply at most; then a sentence closes it (none at a budget of 0),
            and the model must answer. None sets no limit.
        adapter: the name of a LoRA adapter of the Generator, which the request runs with; None is the base model.

    Raises: ValueError naming the field, the value and the allowed range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = ()
    stop_token_ids: Collection[int] | None = ()
    ignore_eos: bool = False
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Collection[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    logits_processor: LogitsProcessor | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    thinking_budget: int | None = None
    grammar: str | None = None
    adapter: str | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        """Check every field, and bring numbers and collections to Python's own types."""
        self._check_number("temperature", 0, MAX_TEMPERATURE)
        self._check_integer("top_k", 0, note=" (0 keeps all)")
        self._check_number("top_p", MIN_TOP_P, 1, allowed="above 0 and up to 1")
        self._check_number("min_p", 0, 1)
        self._check_integer("max_tokens", 1)
        self._check_integer("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")
        self._check_integer("seed", -(2**63), 2**63 - 1)
        self._check_number("repetition_penalty", 1 / MAX_PENALTY, MAX_PENALTY, " (1 changes nothing)")
        self._check_number("presence_penalty", -2, 2)
        self._check_number("frequency_penalty", -2, 2)
        self._check_integer("logprobs", 0, 20, " (0: the chosen token only)")
        self._check_integer("prompt_logprobs", 0, 20, " (0: the prompt's tokens only)")
        self._check_integer("n", 1, 128)
        self._check_integer("thinking_budget", 0)
        self._check_stop()
        self._check_tokens()
        self._check_constraints()
        if self.adapter is not None and (not isinstance(self.adapter, str) or not self.adapter):
            raise ValueError(f"adapter must be the name of a loaded adapter, or None, got {self.adapter!r:.200}")

    @classmethod
    def from_generation_config(cls, preset: dict[str, Any]) -> SamplingParams:
        """Return parameters with every preset field set, from a generation_config.json, as transformers reads it.

        Without do_sample they are greedy. A value that is null or missing is transformers' default: temperature 1.0,
        top_k 50 (only with do_sample), top_p 1.0, repetition_penalty 1.0, no min_p. A top_p of 0 keeps only the most
        likely token. max_new_tokens is the default of max_tokens.

        It warns of fields that are not supported.
        Raises: ValueError for a value that no request could set, naming it.
        """
        given = [name for name, neutral in UNSUPPORTED_PRESET.items() if preset.get(name) not in (None, neutral)]
        if given:
            warnings.warn(f"{', '.join(given)} of generation_config.json: not supported, without effect", stacklevel=3)
        do_sample = preset.get("do_sample")
        if not isinstance(do_sample, bool | None):
            raise ValueError(f"do_sample must be true, false or null, got {do_sample!r}")
        if do_sample and _as_float(preset.get("temperature")) == 0:
            raise ValueError("temperature must be above 0 where do_sample is true; for greedy replies it must be false")
        try:
            max_tokens = cls(max_tokens=preset.get("max_new_tokens")).max_tokens
        except ValueError as err:
            raise ValueError(str(err).replace("max_tokens", "max_new_tokens")) from None
        defaults = {"temperature": 1.0, "top_k": 50 if do_sample else 0, "top_p": 1.0, "min_p": 0.0}
        defaults["repetition_penalty"] = 1.0
        values: dict[str, Any] = {
            name: default if preset.get(name) is None else preset[name] for name, default in defaults.items()
        }
        if _as_float(values["top_p"]) == 0:  # to transformers: keep only the most likely token
            values |= {"top_k": 1, "top_p": 1.0}
        checked = cls(max_tokens=max_tokens, **values)
        return checked if do_sample else replace(checked, temperature=0.0)

    def with_defaults(self, default: SamplingParams) -> SamplingParams:
        """Return these parameters, with the fields of PRESET_FIELDS that are None taken from `default`."""
        unset = [name for name in PRESET_FIELDS if getattr(self, name) is None]
        return replace(self, **{name: getattr(default, name) for name in unset})

    @property
    def is_structured(self) -> bool:
        """True if a schema, a pattern or a grammar shapes the reply."""
        return self.json_schema is not None or self.regex is not None or self.grammar is not None

    def _check_number(self, name: str, low: float, high: float, note: str = "", allowed: str = "") -> None:
        value = getattr(self, name)
        if value is None and getattr(SamplingParams, name) is None:  # the default
            return
        number = _as_float(value)
        if number is None or not low <= number <= high:  # NaN is not
            allowed = allowed or f"from {low:g} to {high:g}{note}"
            raise ValueError(f"{name} must be a number {allowed}, got {value!r:.200}")
        self._set(name, number)

    def _check_integer(self, name: str, low: int, high: int = MAX_COUNT, note: str = "") -> None:
        value = getattr(self, name)
        is_optional = getattr(SamplingParams, name) is None
        if value is None and is_optional:
            return
        number = integer if (integer := as_integer(value)) is not None else _as_float(value)
        if number is None or not low <= number <= high or number != int(number):
            allowed = f"an integer from {low} to {high}{note}" + (", or None" if is_optional else "")
            raise ValueError(f"{name} must be {allowed}, got {value!r:.200}")
        self._set(name, int(number))  # 20.0 is 20

    def _check_stop(self) -> None:
        """Check the fields that end a reply."""
        given = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        is_many = isinstance(given, list | tuple | set | frozenset) and len(given) <= MAX_STOP_STRINGS
        if not is_many or not all(isinstance(s, str) and s for s in given):
            raise ValueError(
                f"stop must be a non-empty string or up to {MAX_STOP_STRINGS} of them, got {self.stop!r:.200}"
            )
        self._set("stop", tuple(checked_text(f"stop[{number}]", s) for number, s in enumerate(given)))
        ids = _as_ids(() if self.stop_token_ids is None else self.stop_token_ids)
        if ids is None:
            raise ValueError(f"stop_token_ids must be integers from 0 to {MAX_COUNT}, got {self.stop_token_ids!r:.200}")
        self._set("stop_token_ids", ids)
        self._set("ignore_eos", checked_flag("ignore_eos", self.ignore_eos))

    def _check_tokens(self) -> None:
        """Check the fields that name single tokens; RequestBuilder checks that the vocabulary has them."""
        if self.logit_bias is not None:
            largest = torch.finfo(torch.float32).max
            given = self.logit_bias.items() if isinstance(self.logit_bias, dict) else [(None, None)]
            bias = {_as_id(token): _as_float(value) for token, value in given}
            if None in bias or not all(value is not None and value <= largest for value in bias.values()):  # NaN is not
                raise ValueError(
                    "logit_bias must be a dict from token ids (integers >= 0) to numbers, finite in float32 or -inf, "
                    f"got {self.logit_bias!r:.200}"
                )
            self._set("logit_bias", bias)
        if self.allowed_token_ids is not None:
            ids = _as_ids(self.allowed_token_ids)
            if not ids:
                raise ValueError(
                    "allowed_token_ids must be integers >= 0, at least one, or None, "
                    f"got {self.allowed_token_ids!r:.200}"
                )
            self._set("allowed_token_ids", ids)

    def _check_constraints(self) -> None:
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise ValueError(f"logits_processor must be callable, got {self.logits_processor!r:.200}")
        shapes = {name: x for name in ("json_schema", "regex", "grammar") if (x := getattr(self, name)) is not None}
        for name, value in shapes.items():
            if name == "json_schema" and not _is_json_object(value):
                raise ValueError(f"json_schema must be a dict or the JSON text of an object, got {value!r:.200}")
            if name != "json_schema" and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be a non-empty string, got {value!r:.200}")
            self._set(name, checked_text(name, value) if isinstance(value, str) else to_plain(value, name))
        if shapes and self.min_tokens:
            raise ValueError(f"min_tokens must be 0 with {next(iter(shapes))}, got {self.min_tokens}")
        if len(shapes) > 1:
            (first, one), (second, other), *_ = shapes.items()
            raise ValueError(
                f"{first} must be None where {second} is given (at most one of them), "
                f"got {first}={one!r:.200} and {second}={other!r:.200}"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # of a frozen dataclass


def takes_params(function: Function) -> Function:
    """Make a function's error for a keyword that is a field of SamplingParams say where the field belongs.

    The keyword may also be one of OTHER_NAMES. The function is SamplingParams itself, takes `params`, or loads or wraps
    a model, whose requests take them. There, `adapter` and `max_length` are something else.
    """
    own = inspect.signature(function).parameters
    name = function.__name__ if function.__name__ != "__init__" else function.__qualname__.split(".")[-2]
    is_request = "params" in own or name == SamplingParams.__name__
    names = {*OTHER_NAMES, *(field.name for field in fields(SamplingParams))} - {*own}
    names -= set() if is_request else {"adapter", "max_length"}
    advice = "pass {}" if is_request else "only requests of a Generator take it: generate(prompt, {})"

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        if wrong := [name for name in keywords if name in names]:
            ours = dict.fromkeys(OTHER_NAMES.get(name, name) for name in wrong)
            instead = f"SamplingParams({', '.join(f'{name}=...' for name in ours)})"
            raise TypeError(f"{name}() takes no keyword {' or '.join(wrong)}; {advice.format(instead)}")
        return function(*args, **keywords)

    return checked  # type: ignore[return-value]


SamplingParams.__init__ = takes_params(SamplingParams.__init__)  # type: ignore[method-assign]


def _as_float(value: Any) -> float | None:
    """Return a number as a float (infinite where it is too large for one); None for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # of an integer
        return math.inf


def _as_id(value: Any) -> int | None:
    number = as_integer(value)
    return number if number is not None and 0 <= number <= MAX_COUNT else None


def _as_ids(values: Any) -> tuple[int, ...] | None:
    """Return token ids of any collection; None for anything else."""
    if not isinstance(values, Collection) or isinstance(values, str | bytes) or getattr(values, "shape", (0,)) == ():
        return None
    ids = [_as_id(value) for value in values]
    return tuple(i for i in ids if i is not None) if None not in ids else None


def _is_json_object(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, dict)
