"""Our server beside llama.cpp's and `transformers serve`: the same weights, the same load, taking turns.

    python benchmarks/compare_servers.py --setup   # llama.cpp's server (a build), transformers' environment, weights
    python benchmarks/compare_servers.py --output benchmarks/results/servers-0.6b.json

All servers stay loaded; in each round each gets the same requests, new ones every round, in a new random order of
servers. One client asks alone, then several at once (closed loop), in a process of their own on the same machine.
Clients see words, one per token: tokens per second of all clients together, time to the first token, time per token of
a reply. Before the rounds, greedy tokens of the bfloat16 servers are compared with the reference logits. A server that
is missing, fails or is too slow is left out, and the record says why.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import finish
from peers.protocol import CACHE
from peers.registry import tell
from servers.kinds import KINDS, Kind, Settings, set_up
from servers.picture import draw
from servers.process import ServerError, ServerProcess
from servers.weights import write_folder, write_gguf_files
from tables import servers_rows

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.measure import check_tokens
from qwen3fast.bench.options import counts
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.serving import Work, make_work, run_http, tokens_of, word_tokenizer
from qwen3fast.bench.table import where_measured

FORMATS = tuple(dict.fromkeys(kind.format for kind in KINDS))
CHECK_TOKENS, ORDER_SEED = 8, 0


class Servers:
    """The running servers. One that fails is ended, and the record notes why."""

    def __init__(self, args: argparse.Namespace, record: Record, stack: ExitStack) -> None:
        """Start all servers of the options, one after the other."""
        self.running: dict[str, ServerProcess] = {}
        self._record, self._timeout_s = record, args.timeout
        settings = Settings(args.weights, args.llama_server, args.transformers_python, args.threads, max(args.clients))
        kinds = [kind for kind in KINDS if kind.format in args.formats]
        for number, kind in enumerate(kinds, 1):
            tell(f"starting {kind.full_name} ({number} of {len(kinds)})")
            if not kind.program(settings).is_file():
                self.leave_out(kind, f"{kind.program(settings)} is missing; run with --setup")
                continue
            log = CACHE / "logs" / f"server-{kind.full_name.replace(' ', '-').replace(',', '')}.log"
            try:
                server = ServerProcess(kind, settings, log)
            except (ServerError, OSError) as err:
                self.leave_out(kind, str(err))
                continue
            stack.callback(server.close)
            self.running[kind.full_name] = server
            facts = {"server": kind.name, "format": kind.format, "computes": kind.computes}
            record.notes["servers"].append(facts | {"version": kind.version(settings)})

    def run(self, kind: Kind, work: Work, texts: list[str], clients: int) -> tuple[Measurement, list[str]] | None:
        """Return what was measured and the texts of the replies; None if the server is out, or fails now."""
        server = self.running.get(kind.full_name)
        if server is None:
            return None
        prompts = {tuple(prompt): text for (prompt, _), text in zip(work, texts, strict=True)}

        def body(prompt: list[int], tokens: int) -> dict[str, Any]:
            return server.body(prompt, prompts[tuple(prompt)], tokens)

        try:
            measured, replies = run_http(server.port, work, clients, body, self._timeout_s)
        except (RuntimeError, ValueError, KeyError) as err:  # replies in another form are a failure too
            self.leave_out(kind, f"{type(err).__name__}: {err}; the end of its log:\n{server.log_end()}")
            return None
        return measured, ["".join(text for _, text in reply.events) for reply in replies]

    def leave_out(self, kind: Kind, why: str) -> None:
        """End a server, and note why."""
        if server := self.running.pop(kind.full_name, None):
            server.close()
        self._record.notes["left_out"][kind.full_name] = why
        tell(f"LEFT OUT: {kind.full_name}: {why}", sys.stderr)


def work_of(args: argparse.Namespace, tokenizer: Any, requests: int, tokens: int, seed: int) -> tuple[Work, list[str]]:
    """Return requests, and their prompts as text."""
    work = make_work(args.vocab_size, requests, args.prompt_tokens, tokens, varied=False, seed=seed)
    return work, [tokenizer.decode(prompt) for prompt, _ in work]


def check(args: argparse.Namespace, servers: Servers, tokenizer: Any, record: Record) -> None:
    """Compare the first tokens of each server with the reference logits; only bfloat16 servers must agree."""
    model = load_model(args.weights, "cpu")
    work, texts = work_of(args, tokenizer, 1, CHECK_TOKENS, seed=1)
    for kind in [server.kind for server in servers.running.values()]:
        if (found := servers.run(kind, work, texts, clients=1)) is None:
            continue
        verdict = check_tokens(model, [work[0][0]], [tokens_of(found[1][0], tokenizer)])
        record.notes["tokens"][kind.full_name] = vars(verdict)
        if kind.format == "bf16":
            record.checks[kind.full_name] = vars(verdict) | {"passed": verdict.passed}
        tell(f"{kind.full_name}: {verdict.exact} of {verdict.tokens} tokens exact, gap {verdict.worst_gap:.2%}")


def make_task(args: argparse.Namespace, servers: Servers, tokenizer: Any, kind: Kind, clients: int) -> Task:
    """Return the task of a server: one request per client, in each round other ones."""
    labels = {"server": kind.name, "format": kind.format, "clients": clients, "context": args.prompt_tokens}
    case = Case(labels, {"tokens": float(clients * args.new_tokens), "requests": float(clients)})

    def run(seed: int) -> Measurement | None:
        work, texts = work_of(args, tokenizer, clients, args.new_tokens, seed)
        found = servers.run(kind, work, texts, clients)
        return None if found is None else found[0]

    def measure() -> Measurement | None:
        return run(seed=100 * clients + 10_000 * (len(case.samples.get("seconds", ())) + 1))

    tell(f"warming up {kind.full_name}, {clients} client{'s' if clients > 1 else ''}")
    run(seed=2 + clients)
    return Task(case, measure, warms_up=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="a model with random weights [%(default)s]")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=",".join(FORMATS), help="[%(default)s]")
    parser.add_argument("--clients", type=counts, default="1,8", help="[%(default)s]")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=32, help="per reply [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each server [%(default)s]")
    parser.add_argument("--timeout", type=float, default=120, help="s of a run; a slower server is out [%(default)s]")
    parser.add_argument("--weights", type=Path, help="folder [a folder of the cache named after the model]")
    parser.add_argument("--llama-server", type=Path, default=CACHE / "llama-server" / "bin" / "llama-server")
    parser.add_argument(
        "--transformers-python", type=Path, default=CACHE / "transformers-serve" / "env" / "bin" / "python"
    )
    parser.add_argument("--setup", action="store_true", help="make what is missing; measure nothing")
    parser.add_argument("--output", type=Path, default=Path("bench_results/servers.json"), help="[%(default)s]")
    args = parser.parse_args(arguments)
    if unknown := set(args.formats) - set(FORMATS):
        parser.error(f"unknown in --formats: {', '.join(sorted(unknown))}; known: {', '.join(FORMATS)}")
    args.weights = args.weights or CACHE / "servers" / re.sub("[:/]", "-", args.model)
    return args


def measure(args: argparse.Namespace) -> Record:
    """Measure all servers that run. Returns: the record, without cases that have no sample."""
    config = load_model(args.weights, "cpu").config
    args.vocab_size = config.vocab_size
    tokenizer, device = word_tokenizer(config.vocab_size), torch.device("cpu")
    model = {"name": args.model, "parameters": config.num_parameters}
    record = Record(
        "servers", describe_run("python benchmarks/compare_servers.py"), describe_environment(device), model
    )
    record.notes = {"servers": [], "left_out": {}, "tokens": {}, "order_seed": ORDER_SEED}
    tell(where_measured(record))
    probe = BandwidthProbe(device)
    harness = Harness(record, [lambda: {"bandwidth_gb_s": probe.measure()}], rng=random.Random(ORDER_SEED))
    with interruptible(record), ExitStack() as stack:
        servers = Servers(args, record, stack)
        check(args, servers, tokenizer, record)
        for clients in args.clients:
            kinds = [server.kind for server in servers.running.values()]
            tasks = list(map(partial(make_task, args, servers, tokenizer, clients=clients), kinds))
            harness.measure(tasks, args.rounds, f"{clients} client{'s' if clients > 1 else ''}")
            # A server that failed in these rounds: its few samples are of other rounds than the others' medians.
            names = [kind.full_name for kind in kinds]
            failed = [task.case for task, name in zip(tasks, names, strict=True) if name not in servers.running]
            record.cases = [case for case in record.cases if not any(case is other for other in failed)]
    harness.finish()
    record.cases = [case for case in record.cases if case.samples]
    return record


def main() -> int:
    """Set up, or measure, print and write. Returns: the exit status."""
    args = parse()
    if args.setup:
        set_up(args.llama_server, args.transformers_python)
        write_folder(args.model, args.weights)
        write_gguf_files(args.weights, args.llama_server.with_name("llama-quantize"), tuple(args.formats))
        return 0
    if not args.weights.is_dir():
        raise SystemExit(f"{args.weights} is missing; run: python benchmarks/compare_servers.py --setup")
    record = measure(args)
    return finish(record, args.output, servers_rows, draw)


if __name__ == "__main__":
    raise SystemExit(main())
