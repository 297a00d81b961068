"""Soak test: everything at once for some minutes, each reply compared with that of the same request alone.

    python tools/soak.py --minutes 3 --seed 0

Threads, asyncio tasks and chat sessions send random requests to one Generator: every sampling field, structured output,
thinking budgets, hooks that fail, cancels at random moments, slow readers. A second Generator, with one row and without
prefix reuse, runs each request again, alone: a reply must be equal, a cancelled one its beginning, a failed one fail
alike. Both run in float32, so that tokens are equal; where two scores tie to the last bits and the other token was
chosen, noise of 1e-4 on the reference's logits must give the very same reply (counted as a tie).
Exit status: 0 if all replies were right and nothing was left behind, otherwise 1, with what was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import random
import resource
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_tasks
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from qwen3fast import (
    ChatSession,
    GenerationResult,
    Generator,
    QueueFullError,
    RequestHandle,
    SamplingParams,
    StreamChunk,
)

MAX_SEQ_LEN, MAX_QUEUE = 1024, 2
THREADS, TASKS, CHATS = 3, 4, 2
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}}, "required": ["n"]}
SYSTEMS = ["Be brief.", "You are a bird. Answer as birds do, and never say what you are.", None]
STUCK_S = 120  # no request takes that long
ROWS = "requests", "tokens", "cancels", "failures injected", "refused", "reused tokens", "ties", "mismatches"
Hook = Callable[[Tensor, Tensor], Tensor]
Outcome = GenerationResult | Exception


def random_hook(rng: random.Random) -> Hook:
    """A logits_processor that does something wrong at one token, or makes what was said likelier."""
    at, kind = rng.randrange(9), rng.choice(["raise", "shape", "nan", "well"])

    def hook(logits: Tensor, output: Tensor) -> Tensor:
        if kind == "well" or len(output) != at:
            return logits.index_add(0, output, torch.ones(len(output)))
        if kind == "raise":
            raise KeyError(f"injected at token {at}")
        return logits[:7] if kind == "shape" else logits * float("nan")

    return hook


def random_params(rng: random.Random, vocab_size: int) -> SamplingParams:
    """Each field now and then; always with a seed, so that the reply can be had again."""
    fields: dict[str, Any] = {
        "seed": rng.getrandbits(40), "max_tokens": rng.randint(1, 40), "temperature": rng.choice([0, 0.6, 1.0, 3.0]),
        "top_k": rng.choice([0, 5, 20]), "top_p": rng.choice([0.8, 1.0]), "min_p": rng.choice([0.0, 0.05]),
    }  # fmt: skip
    ids = rng.sample(range(vocab_size), 400)
    extras: dict[str, Any] = {
        "repetition_penalty": rng.choice([0.9, 1.2]), "presence_penalty": 1.5, "frequency_penalty": rng.uniform(-1, 1),
        "logit_bias": {token: rng.uniform(-5, 5) for token in ids[:9]} | {ids[9]: -float("inf")},
        "allowed_token_ids": ids, "logprobs": rng.randint(0, 20), "stop": rng.choice(["e", ("the ", " a"), "\n\n"]),
        "stop_token_ids": ids[:60], "ignore_eos": True, "thinking_budget": rng.randrange(8),
        "logits_processor": random_hook(rng), "json_schema": SCHEMA,
    }  # fmt: skip
    fields |= {name: value for name, value in extras.items() if rng.random() < 0.12}
    if rng.random() < 0.12 and "json_schema" not in fields:
        fields["regex"] = r"(yes|no)(, [a-z]{2,6}){1,4}\."
    return SamplingParams(**fields)


def random_question(rng: random.Random) -> str:
    """Something that tiny knows about, some of it long, some asked before."""
    makers = [tiny_tasks.addition, tiny_tasks.copying, tiny_tasks.talk, lambda rng: tiny_tasks.lookup(rng, 250)]
    rng = random.Random(rng.randrange(5)) if rng.random() < 0.3 else rng
    return str(rng.choice(makers)(rng).messages[0][1])


def attempt(call: Callable[..., GenerationResult], *arguments: Any) -> Outcome:
    """What comes of a request, errors included."""
    try:
        return call(*arguments)
    except Exception as err:
        return err


def joined(chunks: list[StreamChunk]) -> GenerationResult:
    """What a stream has given: its result, but text and tokens are those of the chunks; cancelled if it broke off."""
    text, ids = "".join(chunk.text for chunk in chunks), [i for chunk in chunks for i in chunk.token_ids]
    whole = chunks[-1].result if chunks else None
    return replace(whole or GenerationResult("", [], "cancelled", None), text=text, token_ids=ids)  # type: ignore[arg-type]


def is_alike(got: Outcome, expected: Outcome) -> bool:
    """Whether a reply is the expected one, or the beginning of it if it was cancelled."""
    if isinstance(got, Exception):
        return type(got) is type(expected) and str(got) == str(expected)
    if isinstance(expected, Exception):
        return got.finish_reason == "cancelled"  # before it failed
    if got.finish_reason == "cancelled":
        is_beginning = got.token_ids == expected.token_ids[: len(got.token_ids)]
        return is_beginning and expected.text.startswith(got.text.rstrip("�"))  # half a character may be the last
    bare = [replace(r, metrics=None, logprobs=None, samples=[]) for r in (got, expected)]  # type: ignore[arg-type]
    if bare[0] != bare[1] or not all(map(is_alike, got.samples, expected.samples)):
        return False
    both = zip(got.logprobs or (), expected.logprobs or (), strict=True)
    return all(mine.token_id == other.token_id and abs(mine.logprob - other.logprob) < 1e-3 for mine, other in both)


def nudged(params: SamplingParams, seed: int) -> SamplingParams:
    """The same, with noise on the logits that decides nothing but ties."""
    given = params.logits_processor or (lambda logits, output: logits)

    def hook(logits: Tensor, output: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(1000 * seed + len(output))
        return given(logits + 1e-4 * torch.randn(logits.shape, generator=rng), output)

    return replace(params, logits_processor=hook)


class Soak:
    """The workers, and what they have counted."""

    def __init__(self, generator: Generator, reference: Generator, end_s: float) -> None:
        self.generator, self.reference, self.end_s = generator, reference, end_s
        self.vocab_size = generator.config.vocab_size
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._counting = threading.Lock()

    def case(self, rng: random.Random) -> tuple[list[int], SamplingParams]:
        """A chat prompt, with or without thinking, or plain text; and parameters."""
        params, messages = random_params(rng, self.vocab_size), [{"role": "user", "content": random_question(rng)}]
        if system := rng.choice(SYSTEMS):
            messages.insert(0, {"role": "system", "content": system})
        prompt = self.generator.render(messages, params, rng.random() < 0.5)
        return (prompt if rng.random() < 0.7 else prompt[3:-5]), params

    def check(self, prompt: list[int], params: SamplingParams, got: Outcome) -> None:
        """Run the request again, alone, and compare."""
        run = self.reference.generate
        expected = attempt(run, prompt, params)
        is_right = is_alike(got, expected)
        is_tie = not is_right and any(is_alike(got, attempt(run, prompt, nudged(params, seed))) for seed in range(8))
        replies = [] if isinstance(got, Exception) else got.samples or [got]
        with self._counting:
            self.counts["ties"] += is_tie
            if not is_right and not is_tie:
                self.wrong.append(f"prompt {prompt}, {params}\n  got      {got!r}\n  expected {expected!r}")
            self.counts["requests"] += len(replies) or 1
            self.counts["failures injected"] += not replies
            self.counts["tokens"] += sum(len(reply.token_ids) for reply in replies)
            self.counts["cancels"] += sum(reply.finish_reason == "cancelled" for reply in replies)

    def submit(self, prompt: list[int], params: SamplingParams) -> RequestHandle:
        """A handle; it waits for a place only after it was refused one."""
        try:
            return self.generator.submit(prompt, params, timeout=0)
        except QueueFullError:
            self.counts["refused"] += 1
            return self.generator.submit(prompt, params)

    def finish(self, handle: RequestHandle, rng: random.Random) -> GenerationResult:
        """Wait, read slowly, or cancel."""
        way = rng.choice(["wait", "read", "cancel"])
        if way == "cancel":
            time.sleep(rng.choice([0, rng.random() * 0.1]))
            handle.cancel()
        if way != "read":
            return handle.result()
        chunks = []
        for chunk in handle:
            chunks.append(chunk)
            time.sleep(rng.choice([0, 0, 0.02]))
        return joined(chunks)

    def by_thread(self, rng: random.Random) -> None:
        """Several requests at once by submit; n > 1; streams that are dropped."""
        while time.monotonic() < self.end_s:
            cases = [self.case(rng) for _ in range(rng.randint(1, 5))]
            handles = [self.submit(*case) for case in cases]
            for case, got in zip(cases, [attempt(self.finish, handle, rng) for handle in handles], strict=True):
                self.check(*case, got)
            prompt, params = self.case(rng)
            params = replace(params, n=rng.randint(2, 4))
            self.check(prompt, params, attempt(self.generator.generate, prompt, params))
            case = self.case(rng)
            stream = zip(range(rng.randint(1, 9)), self.generator.stream(*case), strict=False)
            self.check(*case, attempt(lambda: joined([chunk for _, chunk in stream])))  # noqa: B023
            del stream

    def by_tasks(self, rng: random.Random) -> None:
        """Streams of asyncio, in an event loop of their own; some are left early, and some tasks are cancelled."""

        async def read(case: tuple[list[int], SamplingParams], chunks: list[StreamChunk], most: int) -> None:
            async with aclosing(self.generator.astream(*case)) as stream:  # type: ignore[type-var]
                async for chunk in stream:
                    chunks.append(chunk)
                    if len(chunks) == most:
                        return

        async def work(rng: random.Random) -> None:
            while time.monotonic() < self.end_s:
                case = self.case(rng)
                chunks: list[StreamChunk] = []
                reading = asyncio.create_task(read(case, chunks, rng.choice([3, 999])))
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.random() * 0.2)
                    reading.cancel()
                [error] = await asyncio.gather(reading, return_exceptions=True)
                await asyncio.to_thread(self.check, *case, error if isinstance(error, Exception) else joined(chunks))

        async def run() -> None:
            await asyncio.gather(*[work(random.Random(rng.random())) for _ in range(TASKS)])

        asyncio.run(run())

    def by_chat(self, rng: random.Random) -> None:
        """Conversations; turns that fail or are dropped must leave no trace."""
        while time.monotonic() < self.end_s:
            mode, system, thinks = rng.choice(["exact", "append"]), rng.choice(SYSTEMS), rng.random() < 0.5
            session = ChatSession(self.generator, system=system, enable_thinking=thinks, mode=mode)  # type: ignore[arg-type]
            for _ in range(rng.randint(1, 5)):
                params, turn = random_params(rng, self.vocab_size), {"role": "user", "content": random_question(rng)}
                before, prompt = list(session.messages), session._prompt(turn, params)
                if len(prompt) + 40 > MAX_SEQ_LEN:
                    break
                stream = zip(range(rng.choice([2, 999, 999])), session.stream(turn, params), strict=False)
                got = attempt(lambda: joined([chunk for _, chunk in stream]))  # noqa: B023
                del stream
                self.check(prompt, params, got)
                if (isinstance(got, Exception) or got.finish_reason == "cancelled") and session.messages != before:
                    self.wrong.append(f"a turn that came to nothing has made of {before}: {session.messages}")


def what_is_left(generator: Generator) -> list[str]:
    """What is wrong once nothing should run any longer: rows in use, requests waiting, places to wait lost."""
    stats, long = generator.stats, SamplingParams(temperature=0, ignore_eos=True, max_tokens=MAX_SEQ_LEN - 1)
    handles = [generator.submit([1], long) for _ in range(stats.max_batch_size)]
    while generator.stats.slots_in_use < stats.max_batch_size:
        time.sleep(0.001)
    with suppress(QueueFullError):
        while len(handles) <= stats.max_batch_size + MAX_QUEUE:
            handles.append(generator.submit([1], long, timeout=0))
    for handle in handles:
        handle.cancel()
    found, right = (stats.slots_in_use, stats.waiting, len(handles) - stats.max_batch_size), (0, 0, MAX_QUEUE)
    return [f"rows in use, waiting, places to wait: {found}, not {right}"] if found != right else []


def rss_mb() -> float:
    """Resident memory of this process (on Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 1e6


def main() -> int:
    """Run, print a table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="how long requests are sent (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices, but for their timing (default: 0)")
    parser.add_argument("--model", default="tiny", help="tiny (default), a folder or a repository; it must chat")
    parser.add_argument("--max-batch-size", type=int, default=4, help="rows of the Generator (default: 4)")
    parser.add_argument("--compile", choices=["never", "auto", "always"], default="never", help="(default: never)")
    parser.add_argument("--max-growth-mb", type=float, default=64, help="memory after the first fifth (default: 64)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="greedy decoding")
    options: dict[str, Any] = {"dtype": "float32", "max_seq_len": MAX_SEQ_LEN, "max_queue": MAX_QUEUE}
    options["compile"] = {"never": False, "auto": "auto", "always": True}[args.compile]
    generator = Generator.from_pretrained(args.model, max_batch_size=args.max_batch_size, **options)
    reference = Generator.from_pretrained(args.model, prefix_reuse=False, **options)
    begin_s, seconds, rss_before = time.monotonic(), args.minutes * 60, rss_mb()
    faulthandler.dump_traceback_later(
        seconds + STUCK_S, exit=True, file=sys.__stderr__ or sys.stderr
    )  # where a request never ends
    soak = Soak(generator, reference, begin_s + seconds)
    ways = [*[soak.by_thread] * THREADS, soak.by_tasks, *[soak.by_chat] * CHATS]
    with ThreadPoolExecutor(len(ways)) as pool, tqdm(total=round(seconds), unit="s", desc="soak", mininterval=1) as bar:
        workers = [pool.submit(way, random.Random(f"{args.seed}.{number}")) for number, way in enumerate(ways)]
        while not all(worker.done() for worker in workers):
            time.sleep(0.2)
            elapsed = time.monotonic() - begin_s
            rss_before = rss_mb() if elapsed < seconds / 5 else rss_before
            bar.set_postfix(requests=soak.counts["requests"], mismatches=len(soak.wrong), refresh=False)
            bar.update(min(round(elapsed), bar.total) - bar.n)
    soak.wrong += [f"a worker ended with {worker.exception()!r}" for worker in workers if worker.exception()]
    soak.wrong += what_is_left(generator)
    last = SamplingParams(temperature=0, max_tokens=20)
    soak.check([5, 6], last, attempt(generator.generate, [5, 6], last))
    gc.collect()
    if (growth := rss_mb() - rss_before) > args.max_growth_mb:
        soak.wrong.append(f"resident memory grew by {growth:.0f} MB, more than {args.max_growth_mb:.0f} MB")
    soak.counts.update({"reused tokens": generator.stats.reused_tokens, "mismatches": len(soak.wrong)})
    faulthandler.cancel_dump_traceback_later()
    print(*[f"{name:18}{soak.counts[name]:8}" for name in ROWS], sep="\n")
    print(f"{'RSS':18}{rss_mb():8.0f} MB, {growth:+.0f} MB after the first fifth", *soak.wrong[:5], sep="\n")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
