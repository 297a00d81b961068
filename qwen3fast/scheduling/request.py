"""Request: one prompt and the state of its reply, in token ids; and the LoRA adapter that it may run with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from qwen3fast.engine.prefill import Prefill
from qwen3fast.engine.prompt_logprobs import WantedLogprobs
from qwen3fast.engine.staging import to_device
from qwen3fast.engine.state import GREEDY, Logprobs, RowSampling
from qwen3fast.sampling.constraints import TokenConstraint


@dataclass(eq=False)
class Adapter:
    """A LoRA adapter in a slot of the engine. Requests refer to the object, not to its name, which may be reused.

    is_loaded: False once it is being unloaded: requests that are queued later are refused, earlier ones finish.
    """

    name: str
    slot: int
    is_loaded: bool = True

    def check_loaded(self) -> None:
        """Raises: RuntimeError if it is being unloaded."""
        if not self.is_loaded:
            raise RuntimeError(f"adapter {self.name!r} was unloaded before this request began")


@dataclass(eq=False)
class Request:
    """One prompt and the state of its reply. The caller sets the first group of fields; the scheduler fills the rest.

    By default, one token is chosen greedily.

    Attributes:
        stop_ids: tokens that end the request. eos_ids: the ones that the model itself ends a reply with.
        on_token: called with each token that is not a stop id; returning True ends the request (a stop string).
        constraint: restricts the next token, at every token. logits_processor: see `SamplingParams`.
        logprobs: the number of most likely tokens to record beside the chosen one; None records no log-probabilities.
        wanted_logprobs: of the prompt's tokens; None for none.
        adapter: the LoRA adapter that its tokens are computed with; None for the base model.
        continues: an earlier request that this one continues; its slot of the cache may be taken over, not copied.
        on_change: called, in the worker's thread, after each new token and at the end.
        on_leave_queue: called once, when the request leaves the queue.
        finish_reason: "stop", "length", "cancelled" or "error"; None while running. error: the exception,
            with the traceback of where it happened.
        slot: of the cache; None while waiting. launched: number of tokens that were launched, the first one included;
            tokens not collected yet are in flight.
        reused_tokens: prompt tokens whose keys and values were found in the cache.
        submitted_s, ..., finished_s: times of time.perf_counter(), in seconds.
    """

    prompt_ids: list[int]
    sampling: RowSampling = GREEDY
    max_tokens: int = 1
    stop_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], bool] = lambda token: False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: frozenset[int] | None = None
    constraint: TokenConstraint | None = None
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    logprobs: int | None = None
    wanted_logprobs: WantedLogprobs | None = None
    adapter: Adapter | None = None
    continues: Request | None = None
    on_change: Callable[[], None] = lambda: None
    on_leave_queue: Callable[[], None] = lambda: None

    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # from token `wanted_logprobs.first` on, so far
    finish_reason: str | None = None
    error: BaseException | None = None
    error_traceback: TracebackType | None = None
    slot: int | None = None
    launched: int = 0
    prefill: Prefill | None = None
    prompt_logits_1V: Tensor | None = None  # after the prompt's last token
    reused_tokens: int = 0
    is_restricted: bool = False  # the device has a mask that forbids tokens
    words_W: np.ndarray | None = None  # the last mask
    submitted_s: float = field(default_factory=time.perf_counter)
    prefill_started_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0

    def __post_init__(self) -> None:
        """Note the adapter's slot among the parameters of the row."""
        if self.adapter is not None:
            self.sampling = self.sampling._replace(adapter=self.adapter.slot)

    @property
    def processor_arguments(self) -> tuple[Any, ...]:
        """The arguments of `ProcessorState.begin` after the prompt."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return (*penalties, self.logit_bias, self.allowed_token_ids)

    @property
    def is_processed(self) -> bool:
        """True if the device changes its logits before sampling (a logits_processor runs on the host)."""
        return self.processor_arguments != (1.0, 0.0, 0.0, None, None) or self.constraint is not None

    def is_free_for(self, num_tokens: int) -> bool:
        """Return whether the next num_tokens tokens can be computed before the host has read any of them."""
        is_free = self.constraint is None or self.constraint.is_free_for(num_tokens)
        return is_free and self.logits_processor is None

    @property
    def positions(self) -> int:
        """The number of cache positions in use after the next step: the prompt's, and one per launched token."""
        return len(self.prompt_ids) + self.launched

    @property
    def most_reused(self) -> int:
        """The number of the prompt's first tokens that may be reused, if their keys and values are in the cache.

        A wanted log-probability needs the logits of the token before it, which the cache does not have.
        """
        return len(self.prompt_ids) if self.wanted_logprobs is None else self.wanted_logprobs.first - 1

    @property
    def cached_ids(self) -> list[int]:
        """The tokens whose keys and values are in its slot, from position 0."""
        if self.prefill is not None:
            return self.prompt_ids[: self.prefill.done]
        return self.prompt_ids + self.output_ids[:-1] if self.launched else []

    @property
    def proven_ids(self) -> list[int]:
        """The tokens of `cached_ids` whose keys and values are known to be finite: they led to a valid token."""
        return self.prompt_ids + self.output_ids[:-1] if self.output_ids else []

    def leave_queue(self) -> None:
        """Call `on_leave_queue`, the first time."""
        call, self.on_leave_queue = self.on_leave_queue, lambda: None
        call()

    def allowed_words(self, vocab_size: int) -> np.ndarray | None:
        """Return the mask of the next token, one bit per token (see `TokenConstraint`); None if it has not changed.

        Raises: exceptions of the constraint.
        """
        if self.constraint is None:
            return None
        was_restricted, self.is_restricted = self.is_restricted, self.constraint.is_active()
        if not was_restricted and not self.is_restricted:
            return None
        words_W = np.full(-(-vocab_size // 32), -1, dtype=np.int32)
        if self.is_restricted:
            self.constraint.fill_mask(words_W)
        self.words_W = words_W
        return words_W

    def _forbids_all(self) -> bool:
        """Return whether its mask, allowed_token_ids and logit_bias are known to leave no token."""
        left = self.allowed_token_ids
        if self.is_restricted and self.words_W is not None:
            bits = np.unpackbits(self.words_W.view(np.uint8), bitorder="little")
            masked = frozenset(np.flatnonzero(bits).tolist())
            left = masked if left is None else left & masked
        forbidden = {token for token, bias in (self.logit_bias or {}).items() if bias == -math.inf}
        return left is not None and left <= forbidden

    def process(self, logits_V: Tensor) -> Tensor:
        """Return the logits changed by logits_processor. Raises: its exceptions; ValueError for a wrong shape."""
        assert self.logits_processor is not None, "only for requests with a logits_processor"
        output_T = to_device(self.output_ids, logits_V.device)
        processed = self.logits_processor(logits_V, output_T)
        if not isinstance(processed, Tensor) or processed.shape != logits_V.shape:
            got = tuple(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
            raise ValueError(f"logits_processor must return logits of shape {tuple(logits_V.shape)}, got {got}")
        return processed

    def accept_prompt(self, logprobs: list[Logprobs]) -> None:
        """Take log-probabilities of the prompt's next tokens. Raises: FloatingPointError if one is not finite."""
        if not all(math.isfinite(at.chosen) for at in logprobs):
            raise FloatingPointError(
                "the model's logits are NaN or infinite within the prompt; the weights or the dtype are unsuitable "
                "(float16 overflows where bfloat16 does not)"
            )
        self.prompt_logprobs += logprobs

    def accept(self, token: int, logprobs: Logprobs | None = None) -> None:
        """Append a sampled token, and end the request if it is the last one."""
        try:
            self._accept(token, logprobs)
        except Exception as err:  # of the request's own callbacks; other requests go on
            self.fail(err)

    def _accept(self, token: int, logprobs: Logprobs | None) -> None:
        if not self.output_ids:
            self.first_token_s = time.perf_counter()
        if token < 0:
            if self._forbids_all():
                raise ValueError(
                    f"no token is allowed at token {len(self.output_ids)} of the reply: allowed_token_ids, logit_bias "
                    "and the schema, pattern or grammar together forbid all"
                )
            cause = "no token is allowed, or " if self.is_processed or self.logits_processor is not None else ""
            raise FloatingPointError(
                f"{cause}the model's logits are NaN or infinite at token {len(self.output_ids)} of the reply; the "
                "weights or the dtype are unsuitable (float16 overflows where bfloat16 does not)"
            )
        self.output_ids.append(token)
        if self.logprobs is not None and logprobs is not None:
            n = self.logprobs
            self.output_logprobs.append(Logprobs(logprobs.chosen, logprobs.ids[:n], logprobs.values[:n]))
        if self.constraint is not None:
            self.constraint.accept(token)
        if token in self.stop_ids or self.on_token(token):
            self.finish("stop")
        elif len(self.output_ids) >= self.max_tokens:
            self.finish("length")
        else:
            self.on_change()

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        self.error, self.error_traceback = error, error.__traceback__
        self.finish("error")

    def finish(self, reason: str) -> None:
        """End the request. reason: its finish_reason."""
        self.finish_reason = reason
        self.finished_s = time.perf_counter()
        self.on_change()
