"""EleutherAI's lm-evaluation-harness on a Generator (extra `eval`).

    python -m qwen3fast.lm_eval --model qwen3fast --model_args pretrained=Qwen/Qwen3-0.6B,quantization=int8 \
        --tasks hellaswag,gsm8k --batch_size 8

is the harness' own command line, with the model "qwen3fast" registered, as importing this module does.
--model_args takes the arguments of `HarnessModel`.
Source of the interface: lm_eval.api.model.TemplateLM of lm-eval 0.4.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.tqdm import tqdm

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as err:
    raise ImportError("qwen3fast.lm_eval needs lm-eval; run: pip install 'qwen3fast[eval]'") from err

from qwen3fast.checkpoint.metadata import has_tokenizer, read_config
from qwen3fast.checkpoint.source import resolve_source
from qwen3fast.generator import Generator
from qwen3fast.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

MAX_LENGTH = 4096  # tokens per request unless asked otherwise: the KV cache is allocated for it
MAX_NEW_TOKENS = 256  # the harness' default of max_gen_toks
AUTO_BATCH_SIZE = 8
AT_ONCE = 256  # requests queued together; after each lot, its results are in the harness' cache
# What tasks call the number of new tokens, the first that is given wins.
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Scored = tuple[Any, list[int], list[int]]  # the harness' key of a request, its context, and its continuation


@register_model("qwen3fast")
class HarnessModel(TemplateLM):
    """A Generator as a model of the harness."""

    def __init__(
        self,
        pretrained: str | Path,
        *,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_NEW_TOKENS,
        prefix_token_id: int | None = None,
        enable_thinking: bool = False,
        **options: Any,
    ) -> None:
        """Load a model.

        Args:
            pretrained: the checkpoint, as `Generator.from_pretrained` takes it.
            device: None chooses one. So does "cuda:0", the harness' default, where there is no GPU.
            batch_size: requests that run at once; "auto" is 8. max_batch_size: the same, if given.
            max_length: tokens of context and continuation that the model sees, at most; longer contexts lose their
                beginning. None takes 4096, or as many as the model has positions.
            max_gen_toks: new tokens, for tasks that do not say how many.
            prefix_token_id: the token that comes before texts without a context. None takes the one that the tokenizer
                puts before a text, else its bos_token, else its eos_token.
            enable_thinking: chat templates let the model reason. Stop strings then apply to the answer only.
            options: as in `Generator.from_pretrained`: dtype, quantization, kv_cache_dtype, compile and others.

        Raises: as `Generator.from_pretrained`; ValueError for a model without a tokenizer.
        """
        super().__init__()
        has_one = not str(pretrained).startswith("random:")
        if not has_one or not has_tokenizer(resolve_source(pretrained, options.get("revision"))):
            raise ValueError(f"{str(pretrained)!r} has no tokenizer, which tasks need; name a checkpoint that has one")
        slots = max_batch_size or (AUTO_BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size))
        if max_length is None:
            max_length = min(MAX_LENGTH, read_config(pretrained, options.get("revision")).longest_context - 2)
        self.max_length = int(max_length)  # in addition, a token to predict, and one to sample
        if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
            device = "auto"
        self.generator = Generator.from_pretrained(
            pretrained, device=device, max_batch_size=slots, max_seq_len=self.max_length + 2, **options
        )
        tokenizer = self.generator.tokenizer
        assert tokenizer is not None, "checkpoints have one"
        self.tokenizer = tokenizer
        self.max_gen_toks, self.enable_thinking = int(max_gen_toks), enable_thinking
        self._name, self._prefix_token_id = str(pretrained), prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        found = self._special("eos_token")
        return self.generator.config.eos_token_ids[0] if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """The token before texts without a context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        first = [*self.tokenizer.encode_prompt(""), self._special("bos_token"), self.eot_token_id]
        return next(token_id for token_id in first if token_id is not None)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness' cache of requests."""
        return self._name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text; without add_generation_prompt, its last message is left open."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=self.enable_thinking,
        )
        assert isinstance(text, str), "not tokenized"
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, after the tokens that the tokenizer puts before one (Qwen3's puts none)."""
        return self.tokenizer.encode(string) if add_special_tokens is False else self.tokenizer.encode_prompt(string)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in windows of max_length tokens."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        sizes = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        windows = [list(map(make_disjoint_window, get_rolling_token_windows(ids, **sizes))) for ids in texts]
        scored = self._loglikelihood_tokens([(None, *pair) for some in windows for pair in some], disable_tqdm)
        values = iter(scored)
        totals = [math.fsum(next(values)[0] for _ in some) for some in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding gives it.

        Requests run sorted by their contexts: what one of them shares with the next, the KV cache keeps.
        """
        # Of an empty context, the harness encodes the continuation as a text, with the same token before it.
        start = [self.prefix_token_id]
        requests = [(key, x, y[1:] if x == start == y[:1] else y) for key, x, y in requests]
        results: dict[int, tuple[float, bool]] = {i: (0.0, True) for i, r in enumerate(requests) if not r[2]}
        order = sorted((i for i in range(len(requests)) if i not in results), key=lambda i: requests[i][1:])
        with tqdm(total=len(order), desc="loglikelihood", unit="request", disable=disable_tqdm) as bar:
            for some in _lots(order):
                pairs = [self._fit(*requests[i][1:]) for i in some]
                scores = self.generator.score([p for p, _ in pairs], [c for _, c in pairs])
                for i, score in zip(some, scores, strict=True):
                    results[i] = (score.logprob, score.is_greedy)
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(some))
        return [results[i] for i in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a reply to each context, up to the first of its stop strings, which it does not hold."""
        texts: list[str] = []
        with tqdm(total=len(requests), desc="generating", unit="request", disable=disable_tqdm) as bar:
            for some in _lots(requests):
                jobs = [self._job(*request.args) for request in some]
                replies = self.generator.generate([ids for ids, _, _ in jobs], [params for _, params, _ in jobs])
                for request, (_, _, until), reply in zip(some, jobs, replies, strict=True):
                    text = reply.answer if self.enable_thinking else reply.text
                    texts.append(_cut(text, until))
                    self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                bar.update(len(some))
        return texts

    def _job(self, context: str, kwargs: dict[str, Any]) -> tuple[list[int], SamplingParams, list[str]]:
        """Return the prompt, the sampling and the stop strings of a task's request."""
        rest = dict(kwargs)
        until = rest.pop("until", None) or []
        until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        lengths = [rest.pop(name, None) for name in LENGTH_NAMES]
        wanted = next((int(length) for length in lengths if length is not None), self.max_gen_toks)
        max_tokens = max(1, min(wanted, self.max_length - 1))
        does_sample = rest.pop("do_sample", None)
        if does_sample is False or (does_sample is None and not rest.get("temperature")):
            rest["temperature"] = 0.0
        try:
            params = SamplingParams(max_tokens=max_tokens, stop=() if self.enable_thinking else until, **rest)
        except TypeError as err:  # a keyword that it does not have
            raise ValueError(f"generation_kwargs of this task cannot be followed: {err}") from err
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return self._last(ids, self.max_length - max_tokens), params, until

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return context and continuation without the beginning of the context that does not fit.

        The model sees max_length tokens: all of them but the last one, which is only predicted.
        """
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens exceeds max_length {self.max_length}; pass a larger "
                "max_length in --model_args"
            )
        return self._last(context, self.max_length + 1 - len(continuation)), continuation

    def _last(self, ids: list[int], room: int) -> list[int]:
        if len(ids) > room:
            logger.warning("a context of %d tokens loses its first %d to fit max_length", len(ids), len(ids) - room)
        return ids[-room:]

    def _special(self, name: str) -> int | None:
        token = self.tokenizer.special_tokens.get(name)
        return None if token is None else self.tokenizer.base.token_to_id(token)


def _lots(items: list[Any]) -> Iterator[list[Any]]:
    return (items[i : i + AT_ONCE] for i in range(0, len(items), AT_ONCE))


def _cut(text: str, until: list[str]) -> str:
    ends = [at for stop in until if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
