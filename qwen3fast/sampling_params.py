"""SamplingParams: how the tokens of one request are chosen, and when it ends. Checked when built, before any work.

It holds what was asked for, as plain values; it must not know models, tokenizers or how requests run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]

# What a checkpoint's preset sets.
PRESET_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How the next tokens of one request are chosen and when it ends. A field that is None takes the checkpoint's
    preset (generation_config.json), else the value in brackets.

    Attributes:
        temperature: scores are divided by it; 0 is greedy. [0, or 1.0 where the preset says do_sample]
        top_k: keep the k most likely tokens; 0 keeps all. [0, or 50 where the preset says do_sample]
        top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all. [1.0]
        min_p: keep tokens at least min_p times as likely as the likeliest; 0 keeps all. [0.0]
        max_tokens: new tokens at most; None takes the preset's max_new_tokens, or fills the context (max_seq_len).
        stop: strings that end the text; never part of it.
        stop_token_ids: ids that end the text, beside the model's end-of-sequence ids.
        ignore_eos: go on past end-of-sequence ids.
        seed: any integer of 64 bits; None draws one.
        repetition_penalty: logits of tokens in the prompt or the reply are divided by it where positive and multiplied
            where negative; above 1 discourages them. [1.0]
        presence_penalty: subtracted from the logits of tokens that the reply holds; from -2 to 2.
        frequency_penalty: the same, once for each time that the reply holds the token; from -2 to 2.
        logit_bias: token id -> what is added to its logit; -inf forbids the token. None adds nothing.
        allowed_token_ids: the only tokens that may be chosen; None allows all.
        logprobs: report log-probabilities, of the model's own logits: 0 of the chosen token, n (at most 20) also of the
            n likeliest; None reports none.
        n: replies to each prompt, at most 128.
        logits_processor: called for each new token with the float32 logits (V,) and the reply's token ids so far,
            int64 (T,), both on the model's device; gives the new logits (V,). It must not keep or change what it is
            given.
        json_schema: the reply is JSON that follows this schema (a dict, or its JSON text).
        regex: the whole reply matches this pattern. Not together with json_schema.
        thinking_budget: tokens of thought at most, then the model must answer; None sets no limit.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Collection[int] | None = None
    logprobs: int | None = None
    n: int = 1
    logits_processor: LogitsProcessor | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        """Raises: ValueError naming the field, the value and the allowed range."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise ValueError(f"stop must be a non-empty string or several of them, got {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check("temperature", "a finite number >= 0", lambda x: 0 <= x < math.inf)
        self._check_integer("top_k", "an integer >= 0 (0 keeps all)", 0)
        self._check("top_p", "in (0, 1]", lambda x: 0 < x <= 1)
        self._check("min_p", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_integer("max_tokens", "an integer >= 1", 1)
        self._check_integer("seed", "an integer of 64 bits", -(2**63), 2**63 - 1)
        self._check("repetition_penalty", "a finite number > 0 (1 changes nothing)", lambda x: 0 < x < math.inf)
        self._check("presence_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2)
        self._check("frequency_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2)
        self._check_integer("logprobs", "an integer from 0 (the chosen token only) to 20, or None", 0, 20)
        self._check_integer("n", "an integer from 1 to 128", 1, 128)
        self._check_integer("thinking_budget", "an integer >= 0, or None", 0)
        self._check_tokens()
        self._check_constraints()

    @classmethod
    def from_generation_config(cls, preset: dict[str, Any]) -> SamplingParams:
        """Return the preset of a generation_config.json, with every field of PRESET_FIELDS set.

        A field that is absent or null has transformers' default: greedy without do_sample, otherwise temperature 1.0,
        top_k 50, top_p 1.0. max_new_tokens becomes max_tokens.
        Raises: ValueError for a value that transformers' `generate` refuses.
        """
        given = {name: value for name, value in preset.items() if value is not None}
        samples = given.get("do_sample", False)
        if not isinstance(samples, bool):
            raise ValueError(f"do_sample must be true or false, got {samples!r}")
        if samples and given.get("temperature") == 0:
            raise ValueError("temperature must be above 0 where do_sample is true; for greedy replies it must be false")
        if "max_new_tokens" in given and not (_is_number(given["max_new_tokens"]) and given["max_new_tokens"] >= 1):
            raise ValueError(f"max_new_tokens must be an integer >= 1, got {given['max_new_tokens']!r}")
        top_k, top_p = given.get("top_k", 50 if samples else 0), given.get("top_p", 1.0)
        if top_p == 0:  # to transformers: keep the most likely token alone
            top_k, top_p = 1, 1.0
        preset_params = cls(
            temperature=given.get("temperature", 1.0),
            top_k=top_k,
            top_p=top_p,
            min_p=given.get("min_p", 0.0),
            repetition_penalty=given.get("repetition_penalty", 1.0),
            max_tokens=given.get("max_new_tokens"),
        )
        return preset_params if samples else replace(preset_params, temperature=0.0)

    def with_defaults(self, default: SamplingParams) -> SamplingParams:
        """These parameters, with the preset fields that are None taken from `default`."""
        unset = [name for name in PRESET_FIELDS if getattr(self, name) is None]
        return replace(self, **{name: getattr(default, name) for name in unset})

    def _check(self, name: str, expected: str, is_valid: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if value is None and getattr(SamplingParams, name) is None:  # the default
            return
        if not _is_number(value) or not is_valid(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")

    def _check_integer(self, name: str, expected: str, low: int, high: float = math.inf) -> None:
        self._check(name, expected, lambda x: (isinstance(x, int) or x.is_integer()) and low <= x <= high)
        value = getattr(self, name)
        object.__setattr__(self, name, None if value is None else int(value))  # 20.0 is 20

    def _check_tokens(self) -> None:
        """Check what names single tokens. Whether the ids are in the vocabulary is the model's to say."""
        if self.logit_bias is not None:
            largest = torch.finfo(torch.float32).max
            if not isinstance(self.logit_bias, dict) or not all(
                _is_id(token) and _is_number(bias) and bias <= largest  # NaN is not
                for token, bias in self.logit_bias.items()
            ):
                raise ValueError(
                    "logit_bias must be a dict from token ids (integers >= 0) to numbers, finite in float32 or -inf, "
                    f"got {self.logit_bias!r}"
                )
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # what was checked stays so
        if self.allowed_token_ids is not None:
            ids = self.allowed_token_ids
            if not isinstance(ids, Collection) or isinstance(ids, str) or len(ids) == 0 or not all(map(_is_id, ids)):
                raise ValueError(f"allowed_token_ids must be integers >= 0, at least one, or None, got {ids!r}")
            object.__setattr__(self, "allowed_token_ids", tuple(ids))

    def _check_constraints(self) -> None:
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise ValueError(f"logits_processor must be callable, got {self.logits_processor!r}")
        if self.json_schema is not None and not _is_json_object(self.json_schema):
            raise ValueError(f"json_schema must be a dict or the JSON text of an object, got {self.json_schema!r}")
        if self.regex is not None and (not isinstance(self.regex, str) or not self.regex):
            raise ValueError(f"regex must be a non-empty string, got {self.regex!r}")
        if self.json_schema is not None and self.regex is not None:
            raise ValueError(
                "json_schema must be None where regex is given (at most one of them), "
                f"got json_schema={self.json_schema!r} and regex={self.regex!r}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_json_object(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return isinstance(value, dict)
