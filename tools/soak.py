"""Soak test: everything at once for some minutes, each reply compared with the same request's alone.

    python tools/soak.py --minutes 3 --seed 0

Threads, asyncio tasks and chat sessions send random requests to one Generator: every sampling field, structured output,
reasoning budgets, hooks that fail, cancellation at random moments, slow readers. A second Generator, with one slot and
without the prefix cache, runs each request again, alone: the reply must be equal, a cancelled one its beginning, and a
failed one must fail with the same error. Both run in float32, where tokens are equal. If two scores tie to the last bit
and the other token was chosen, noise of 1e-4 on the reference's logits must give the same reply (counted as a tie).
Exit status: 0 if all replies were right and nothing was left behind, otherwise 1, with the faults.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from soak_requests import Outcome, attempt, is_alike, joined, nudged, random_params, random_question
from tqdm import tqdm

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
SYSTEMS = ["Be brief.", "You are a bird. Answer as birds do, and never say what you are.", None]
STUCK_S = 120  # no request takes that long
ROWS = "requests", "tokens", "cancels", "failures injected", "refused", "reused tokens", "ties", "mismatches"


class Soak:
    """The workers and their counts."""

    def __init__(self, generator: Generator, reference: Generator, end_s: float) -> None:
        self.generator, self.reference, self.end_s = generator, reference, end_s
        self.vocab_size = generator.config.vocab_size
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._counting = threading.Lock()

    def case(self, rng: random.Random) -> tuple[list[int], SamplingParams]:
        """Return a chat prompt, with or without reasoning, or a piece of one, and parameters."""
        params, messages = random_params(rng, self.vocab_size), [{"role": "user", "content": random_question(rng)}]
        if system := rng.choice(SYSTEMS):
            messages.insert(0, {"role": "system", "content": system})
        prompt = self.generator.render(messages, params, rng.random() < 0.5)
        return (prompt if rng.random() < 0.7 else prompt[3:-5]), params

    def check(self, prompt: list[int], params: SamplingParams, got: Outcome) -> None:
        """Run the request again, alone, and compare the replies."""
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
        """Return a handle. It waits for a place in the queue only after it was refused one."""
        try:
            return self.generator.submit(prompt, params, timeout=0)
        except QueueFullError:
            self.counts["refused"] += 1
            return self.generator.submit(prompt, params)

    def finish(self, handle: RequestHandle, rng: random.Random) -> GenerationResult:
        """Wait for the reply, read it slowly, or cancel it."""
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
        """Send several requests at once by submit, with n > 1, and streams that are dropped."""
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
        """Read asyncio streams in an event loop; some end early, and some tasks are cancelled."""

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
        """Hold conversations; turns that fail or are dropped must leave no trace."""
        while time.monotonic() < self.end_s:
            mode, system, thinks = rng.choice(["exact", "append"]), rng.choice(SYSTEMS), rng.random() < 0.5
            session = ChatSession(self.generator, system=system, enable_thinking=thinks, mode=mode)  # type: ignore[arg-type]
            for _ in range(rng.randint(1, 5)):
                params, turn = random_params(rng, self.vocab_size), {"role": "user", "content": random_question(rng)}
                before, prompt = list(session.messages), session._prompt(turn, params, "error")
                if len(prompt) + 40 > MAX_SEQ_LEN:
                    break
                stream = zip(range(rng.choice([2, 999, 999])), session.stream(turn, params), strict=False)
                got = attempt(lambda: joined([chunk for _, chunk in stream]))  # noqa: B023
                del stream
                self.check(prompt, params, got)
                if (isinstance(got, Exception) or got.finish_reason == "cancelled") and session.messages != before:
                    self.wrong.append(f"a turn without a reply changed the messages {before} to {session.messages}")


def what_is_left(generator: Generator) -> list[str]:
    """Return the faults once nothing should run: slots in use, waiting requests, lost places in the queue."""
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
    return [f"slots in use, waiting, places in the queue: {found}, not {right}"] if found != right else []


def rss_mb() -> float:
    """Return the resident memory of this process (on Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 1e6


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3, help="how long requests are sent (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices except timing (default: 0)")
    parser.add_argument("--model", default="tiny", help="tiny (default), a folder or a repository; it must chat")
    parser.add_argument("--max-batch-size", type=int, default=4, help="slots of the Generator (default: 4)")
    parser.add_argument("--compile", choices=["never", "auto", "always"], default="never", help="(default: never)")
    parser.add_argument("--max-growth-mb", type=float, default=64, help="memory after the first fifth (default: 64)")
    return parser.parse_args()


def run_workers(soak: Soak, seed: int, seconds: float) -> float:
    """Run all workers to their end. Returns: the resident memory in MB after the first fifth of the time."""
    begin_s, rss_before = time.monotonic(), rss_mb()
    ways = [*[soak.by_thread] * THREADS, soak.by_tasks, *[soak.by_chat] * CHATS]
    with ThreadPoolExecutor(len(ways)) as pool, tqdm(total=round(seconds), unit="s", desc="soak", mininterval=1) as bar:
        workers = [pool.submit(way, random.Random(f"{seed}.{number}")) for number, way in enumerate(ways)]
        while not all(worker.done() for worker in workers):
            time.sleep(0.2)
            elapsed = time.monotonic() - begin_s
            rss_before = rss_mb() if elapsed < seconds / 5 else rss_before
            bar.set_postfix(requests=soak.counts["requests"], mismatches=len(soak.wrong), refresh=False)
            bar.update(min(round(elapsed), bar.total) - bar.n)
    soak.wrong += [f"a worker ended with {worker.exception()!r}" for worker in workers if worker.exception()]
    return rss_before


def main() -> int:
    """Run and print a table. Returns: the exit status."""
    args = parse()
    warnings.filterwarnings("ignore", message="greedy decoding")
    options: dict[str, Any] = {"dtype": "float32", "max_seq_len": MAX_SEQ_LEN, "max_queue": MAX_QUEUE}
    options["compile"] = {"never": False, "auto": "auto", "always": True}[args.compile]
    generator = Generator.from_pretrained(args.model, max_batch_size=args.max_batch_size, **options)
    reference = Generator.from_pretrained(args.model, prefix_reuse=False, **options)
    seconds = args.minutes * 60
    # Shows where a request hangs.
    faulthandler.dump_traceback_later(seconds + STUCK_S, exit=True, file=sys.__stderr__ or sys.stderr)
    soak = Soak(generator, reference, time.monotonic() + seconds)
    rss_before = run_workers(soak, args.seed, seconds)
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
