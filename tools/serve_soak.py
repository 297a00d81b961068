"""Soak test of the HTTP server: random clients for some minutes, then nothing may be left behind.

    python tools/serve_soak.py --minutes 2 --seed 1

Clients ask over real sockets, streamed or not, with random sampling; some leave at a random point, some send bad or
huge requests, some never read, some come in floods. Then complete replies are compared with the replies of a second
Generator without HTTP and prefix cache: most in batches of its own making, each tenth alone, in random order until the
time for it is over (the rest counts as "unchecked"). At the end all slots are free, the server still answers, and
resident memory has not grown. The bound on the whole run is said first. Exit status: 0, or 1 with what was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import random
import sys
import time
from collections import Counter
from typing import Any

import uvicorn
from serve_soak_clients import OPTIONS, Client
from soak import rss_mb

from qwen3fast import Generator, SamplingParams
from qwen3fast.bench.progress import Progress, in_words
from qwen3fast.server.app import create_app
from qwen3fast.server.command import bind

CLIENTS, BATCH = 6, 16
ALONE = 10  # of so many replies, one is compared with its request alone
LAST_S = 60.0  # a client may need so long for its last request
START_S = 20.0  # loading and the end
LINE_EVERY_S = 5.0  # of progress, where it goes to a file
ROWS = "replies", "streams", "left", "bad", "huge", "slow", "floods", "busy", "checked", "unchecked", "wrong"
Reply = tuple[dict[str, Any], str]  # a request, and the text that came


async def load(generator: Generator, seconds: float, seed: int, progress: Progress) -> list[Client]:
    """Serve, let clients loose for some seconds, and stop. Returns: the clients."""
    app = create_app({"model": generator}, OPTIONS)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    listening = bind("127.0.0.1", 0, OPTIONS.send_timeout_s)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    clients = [Client(listening.getsockname()[1], random.Random(f"{seed} {i}")) for i in range(CLIENTS)]
    running = asyncio.gather(*(client.run(time.monotonic() + seconds) for client in clients))
    counting = asyncio.create_task(_count(clients, seconds, progress))
    await running
    counting.cancel()
    for _ in range(1000):  # requests whose clients have left end within a step
        if generator.stats.slots_in_use == generator.stats.waiting == 0:
            break
        await asyncio.sleep(0.01)
    last = Client(clients[0].port, random.Random(seed))
    await last.reply()
    if not last.replies:
        last.wrong.append("the server does not answer at the end")
    server.should_exit = True
    await serving
    listening.close()
    return [*clients, last]


async def _count(clients: list[Client], seconds: float, progress: Progress) -> None:
    """Show how many replies have come, once a second."""
    begun, told = progress.done, 0.0
    start = time.monotonic()
    while True:
        told = min(seconds, time.monotonic() - start)
        replies = sum(len(client.replies) for client in clients)
        wrong = sum(len(client.wrong) for client in clients)
        progress.show(f"clients: {replies} replies, {wrong} wrong", begun + told - progress.done)
        await asyncio.sleep(1)


def check(generator: Generator, replies: list[Reply], until: float, progress: Progress) -> tuple[int, list[str]]:
    """Compare replies with the engine's own until a moment of time.monotonic().

    Returns: how many were compared, and how some differ.
    """
    wrong: list[str] = []
    done, start, begun = 0, time.monotonic(), progress.done
    while done < len(replies) and time.monotonic() < until:
        batch = replies[done : done + BATCH]
        alone = {i for i in range(len(batch)) if (done + i) % ALONE == 0}
        together = [i for i in range(len(batch)) if i not in alone]
        texts = dict(zip(together, _texts(generator, [batch[i][0] for i in together]), strict=True))
        texts |= {i: _texts(generator, [batch[i][0]])[0] for i in alone}
        wrong += [
            f"{request}\n  got {text!r}\n  expected {texts[i]!r}"
            for i, (request, text) in enumerate(batch)
            if text != texts[i]
        ]
        done += len(batch)
        passed = min(time.monotonic() - start, until - start)
        progress.show(f"checked {done} of {len(replies)} replies, {len(wrong)} wrong", begun + passed - progress.done)
    return done, wrong


def _texts(generator: Generator, requests: list[dict[str, Any]]) -> list[str]:
    prompts = [request["prompt"] for request in requests]
    params = [SamplingParams(**{k: v for k, v in request.items() if k != "prompt"}) for request in requests]
    return [result.text for result in generator.generate(prompts, params)]


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2, help="of load [%(default)s]")
    parser.add_argument("--check-minutes", type=float, help="for comparing replies, at most [as --minutes]")
    parser.add_argument("--seed", type=int, default=0, help="of the clients' behavior [%(default)s]")
    parser.add_argument("--max-growth-mb", type=float, default=64, help="of resident memory [%(default)s]")
    args = parser.parse_args()
    args.seconds = 60 * args.minutes
    args.warm_up_s = min(10.0, args.seconds / 10)
    args.check_s = 60 * args.check_minutes if args.check_minutes is not None else max(args.seconds, 10.0)
    return args


def main() -> int:
    """Run. Returns: the exit status."""
    args = parse()
    longest = START_S + args.warm_up_s + args.seconds + args.check_s + 2 * LAST_S
    expected = args.warm_up_s + args.seconds + args.check_s
    print(f"about {in_words(expected)} at most; {in_words(longest)} if clients hang, then it is ended", file=sys.stderr)
    faulthandler.dump_traceback_later(longest, exit=True, file=sys.__stderr__ or sys.stderr)
    progress = Progress(line_every_s=LINE_EVERY_S)
    progress.expect(expected)
    progress.end = time.perf_counter() + expected
    # float32, one weight layout: a reply does not depend on which others share its step.
    options: dict[str, Any] = {"max_seq_len": 512, "dtype": "float32", "compile": False}
    with Generator.from_pretrained("tiny", max_batch_size=4, max_queue=8, **options) as generator:
        asyncio.run(load(generator, args.warm_up_s, args.seed + 1, progress))  # one-time work is done here
        before = rss_mb()
        clients = asyncio.run(load(generator, args.seconds, args.seed, progress))
        growth, stats = rss_mb() - before, generator.stats
    wrong = [text for client in clients for text in client.wrong]
    if (stats.slots_in_use, stats.waiting) != (0, 0):
        wrong.append(f"slots in use and requests waiting: {(stats.slots_in_use, stats.waiting)}, not (0, 0)")
    if growth > args.max_growth_mb:
        wrong.append(f"resident memory grew by {growth:.0f} MB, more than {args.max_growth_mb:.0f} MB")
    replies = [reply for client in clients for reply in client.replies]
    random.Random(args.seed).shuffle(replies)
    with Generator.from_pretrained("tiny", max_batch_size=BATCH, prefix_reuse=False, **options) as reference:
        checked, different = check(reference, replies, time.monotonic() + args.check_s, progress)
    progress.close()
    faulthandler.cancel_dump_traceback_later()
    wrong += different
    counts = sum((client.counts for client in clients), Counter())
    counts |= Counter({"checked": checked, "unchecked": len(replies) - checked, "wrong": len(wrong)})
    print("\n".join(f"{name:10} {counts[name]:>8}" for name in ROWS))
    print(f"slots      {stats.slots_in_use:>8} of {stats.max_batch_size} in use, {stats.waiting} requests waiting")
    print(f"memory     {growth:+8.1f} MB")
    print("\n".join(wrong[:20]), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
