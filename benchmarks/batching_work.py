"""The work of benchmarks/batching.py: requests of many lengths, run by each engine, and clients that time replies."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
import transformers

from qwen3fast import Generator, SamplingParams
from qwen3fast.bench.harness import Measurement
from qwen3fast.results import StreamChunk

REPLY_S = 120  # seconds to wait for another reply of continuous batching
Work = list[tuple[list[int], int]]  # prompts, and how many tokens to reply with


def make_work(vocab_size: int, count: int, prompt_tokens: int, new_tokens: int, seed: int = 0) -> Work:
    """Return prompts of random ids and reply lengths, each from a quarter to twice the given length."""
    rng = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(mean * 2 ** rng.uniform(-2, 1)))

    return [
        ([rng.randrange(vocab_size) for _ in range(length(prompt_tokens))], length(new_tokens)) for _ in range(count)
    ]


def run_ours(generator: Generator, work: Work) -> float:
    """Return the seconds for all requests."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in work]
    started = time.perf_counter()
    results = generator.generate([prompt for prompt, _ in work], params)
    seconds = time.perf_counter() - started
    assert [len(r.token_ids) for r in results] == [n for _, n in work], "every reply must be whole"
    return seconds


@torch.no_grad()
def run_static(reference: transformers.Qwen3ForCausalLM, work: Work, batch_size: int) -> float:
    """Return the seconds for all requests in padded batches of transformers' `generate`."""
    reference.set_attn_implementation("sdpa")  # continuous batching changes it
    started = time.perf_counter()
    for first in range(0, len(work), batch_size):
        batch = work[first : first + batch_size]
        longest = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        new = max(n for _, n in batch)
        exactly = {"min_new_tokens": new, "max_new_tokens": new}
        reference.generate(ids, attention_mask=mask, **exactly, do_sample=False, pad_token_id=0)
    return time.perf_counter() - started


def run_continuous(reference: transformers.Qwen3ForCausalLM, work: Work, batch_size: int) -> float:
    """Return the seconds for all requests in transformers' continuous batching, from the first request on."""
    pages = transformers.ContinuousBatchingConfig(
        page_size=32, num_blocks=sum(map(len, (prompt for prompt, _ in work))), max_batch_tokens=512,
        max_requests_per_batch=batch_size,
    )  # fmt: skip
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = reference.init_continuous_batching(generation_config=config, continuous_batching_config=pages)
    manager.start()
    try:
        manager.add_request([1, 2, 3], max_new_tokens=2)
        _collect(manager, 1)
        started = time.perf_counter()
        for prompt, new in work:
            manager.add_request(prompt, max_new_tokens=new)
        outputs = _collect(manager, len(work))
        seconds = time.perf_counter() - started
    finally:
        manager.stop(block=True)
    if sorted(len(output.generated_tokens) for output in outputs) != sorted(n for _, n in work):
        raise RuntimeError("replies are shorter or longer than asked for")
    return seconds


def _collect(manager: Any, count: int) -> list[Any]:
    outputs: list[Any] = []
    last = time.perf_counter()
    while len(outputs) < count:
        output = manager.get_result(timeout=1)
        if output is not None and output.is_finished():
            outputs.append(output)
            last = time.perf_counter()
        elif time.perf_counter() - last > REPLY_S:
            raise RuntimeError(f"no reply for {REPLY_S} s; {len(outputs)} of {count} came")
    return outputs


class Client:
    """A reader of one reply that notes the time of each token."""

    def __init__(self, handle: Iterable[StreamChunk], due_s: float) -> None:
        self.due_s = due_s
        self.times: list[float] = []
        self.thread = threading.Thread(target=self._read, args=(handle,))
        self.thread.start()

    def _read(self, handle: Iterable[StreamChunk]) -> None:
        for chunk in handle:
            self.times += [time.perf_counter()] * len(chunk.token_ids)


def arrivals(count: int, rate: float, seed: int = 2) -> list[float]:
    """Return the seconds from the start at which requests are due, `rate` per second on average (Poisson)."""
    rng, due, times = random.Random(seed), 0.0, []
    for _ in range(count):
        due += rng.expovariate(rate)
        times.append(due)
    return times


def run_online(generator: Any, work: Work, due: list[float]) -> Measurement:
    """Submit each request when it is due, and read all replies.

    Returns: seconds from each request's due time to its first token, all gaps between tokens, and seconds in all.
    """
    clients = []
    started = time.perf_counter()
    for (prompt, new), after in zip(work, due, strict=True):
        time.sleep(max(0.0, started + after - time.perf_counter()))
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        clients.append(Client(generator.submit(prompt, params), started + after))
    for client in clients:
        client.thread.join()
    seconds = max(client.times[-1] for client in clients) - started
    first = [client.times[0] - client.due_s for client in clients]
    between = [b - a for client in clients for a, b in zip(client.times, client.times[1:], strict=False)]
    return {"ttfts_s": first, "itl_s": between, "seconds": seconds}
