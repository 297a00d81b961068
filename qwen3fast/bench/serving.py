"""The work of the suite `serve`: requests, run by the engine alone or over HTTP, and what their clients saw.

Every token is a word of its own, whatever the model: each token then has text, and a client sees in an event how many
tokens it brings. A checkpoint's own tokens may end inside a character, and random weights have none.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import tokenizers

from qwen3fast.bench.harness import Measurement
from qwen3fast.generator import Generator
from qwen3fast.sampling_params import SamplingParams
from qwen3fast.text.tokenizer import Tokenizer

PATH = "/v1/completions"
CLIENT = Path(__file__).with_name("load_client.py")
SPACE, LETTERS = "Ġ", 4  # a space in the byte-level alphabet; 26**4 words are more than any vocabulary's
MAX_TTFT_S, MAX_GAP_S = 1.0, 0.1  # of a request that counts for goodput
Work = list[tuple[list[int], int]]  # prompts, and how many tokens to reply with


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer whose tokens are words of a space and four letters. It decodes; prompts are token ids."""
    vocab = {word(i): i for i in range(vocab_size)}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [])))


def word(token_id: int) -> str:
    """Return the word of a token, in the byte-level alphabet."""
    letters = []
    for _ in range(LETTERS):
        token_id, letter = divmod(token_id, 26)
        letters.append(chr(ord("a") + letter))
    return SPACE + "".join(letters)


def tokens_of(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a text of words. Raises: KeyError for a word that is none of the tokenizer's."""
    vocab = tokenizer.base.get_vocab()
    return [vocab[SPACE + word] for word in text.split()]


def make_work(vocab_size: int, count: int, prompt_tokens: int, new_tokens: int, varied: bool, seed: int = 0) -> Work:
    """Return requests of random ids. varied: replies are from half to one and a half times as long as new_tokens."""
    rng = random.Random(seed)

    def length() -> int:
        return max(2, round(new_tokens * rng.uniform(0.5, 1.5))) if varied else new_tokens

    return [([rng.randrange(vocab_size) for _ in range(prompt_tokens)], length()) for _ in range(count)]


@dataclass(frozen=True)
class Reply:
    """A reply as its client saw it: for each event, seconds since the request was sent, and the text it brought."""

    events: list[tuple[float, str]]
    tokens: int
    ended_s: float  # on the clock that all replies share

    @property
    def ttft_s(self) -> float:
        """Seconds to the first event with text."""
        return self.events[0][0]

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between events with text."""
        return [after - before for (before, _), (after, _) in pairwise(self.events)]

    @property
    def per_token_s(self) -> float:
        """Seconds per token after the first event; 0 without later tokens."""
        later = self.tokens - self.events[0][1].count(" ")
        return (self.events[-1][0] - self.events[0][0]) / later if later else 0.0

    @property
    def is_good(self) -> bool:
        """True if it kept within the limits of goodput."""
        return self.ttft_s <= MAX_TTFT_S and max(self.gaps_s, default=0.0) <= MAX_GAP_S


def run_engine(generator: Generator, work: Work) -> Measurement:
    """Run all requests at once; nobody reads their tokens before they end."""
    greedy = SamplingParams(temperature=0, ignore_eos=True)
    handles = [generator.submit(prompt, replace(greedy, max_tokens=n)) for prompt, n in work]
    results = [handle.result() for handle in handles]
    for result, (_, n) in zip(results, work, strict=True):
        assert len(result.token_ids) == n, "no token ends a reply before its length"
    begun = min(handle.request.submitted_s for handle in handles)
    return {
        "seconds": max(handle.request.finished_s for handle in handles) - begun,
        "ttfts_s": [result.metrics.time_to_first_token_s for result in results],
        "tpot_s": mean(r.metrics.decode_s / (n - 1) for r, (_, n) in zip(results, work, strict=True)),
    }


def body_of(prompt: list[int], tokens: int) -> dict[str, Any]:
    """Return the JSON body of a request of the work."""
    return {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def run_http(
    port: int,
    work: Work,
    clients: int,
    body_of: Callable[[list[int], int], dict[str, Any]] = body_of,
    timeout_s: float | None = None,
) -> tuple[Measurement, list[Reply]]:
    """Run all requests over HTTP, each client one after the other; the clients are a process of their own.

    body_of: makes a request's body of a prompt and the number of tokens of its reply.
    Raises: RuntimeError if a reply fails or is not whole, or if all take longer than timeout_s.
    """
    bodies = [body_of(prompt, n) for prompt, n in work]
    given = json.dumps({"port": port, "path": PATH, "clients": clients, "bodies": bodies})
    command = [sys.executable, str(CLIENT)]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as err:
        raise RuntimeError(f"the replies took longer than {timeout_s} s") from err
    if done.returncode:
        raise RuntimeError(f"the clients failed:\n{done.stderr[-3000:]}")
    raw = json.loads(done.stdout)
    replies = [read_reply(one, n) for one, (_, n) in zip(raw, work, strict=True)]
    seconds = max(reply.ended_s for reply in replies) - min(one["sent_s"] for one in raw)
    gaps = [gap for reply in replies for gap in reply.gaps_s]
    measured = {
        "seconds": seconds,
        "ttfts_s": [reply.ttft_s for reply in replies],
        "tpot_s": mean(reply.per_token_s for reply in replies),
        "itl_s": gaps,
        "goodput": sum(reply.is_good for reply in replies) / seconds,
    }
    return measured, replies


def read_reply(raw: dict[str, Any], tokens: int) -> Reply:
    """Return a reply of the load client. Raises: RuntimeError if it failed, or has not so many tokens."""
    events, used = [], None
    for at, data in raw["events"]:
        if data == "[DONE]":
            break
        chunk = json.loads(data)
        if "error" in chunk:
            raise RuntimeError(f"a reply failed: {chunk['error']}")
        used = (chunk.get("usage") or {}).get("completion_tokens", used)
        text = chunk["choices"][0]["text"] if chunk["choices"] else ""
        if text:
            events.append((at, text))
    words = sum(text.count(" ") for _, text in events)
    if raw["status"] != 200 or words != tokens or used not in (None, tokens):
        raise RuntimeError(f"expected status 200 and {tokens} tokens, got {raw['status']}, {words} words, usage {used}")
    return Reply(events, tokens, raw["sent_s"] + raw["seconds"])
