"""The HTTP server: its cost beside the engine alone, and what clients see at loads up to and beyond saturation.

Closed loop: each of n clients sends its next request when its last reply has ended. The clients run in a process of
their own on the same machine, whose processors they share with the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from qwen3fast.bench.harness import Group, Measurement, Task
from qwen3fast.bench.measure import check_tokens
from qwen3fast.bench.metrics import short
from qwen3fast.bench.options import split_format
from qwen3fast.bench.record import Case, Label, Record
from qwen3fast.bench.serving import (
    MAX_GAP_S,
    MAX_TTFT_S,
    make_work,
    run_engine,
    run_http,
    tokens_of,
    word_tokenizer,
)
from qwen3fast.bench.session import CHECK_LENGTH, CHECK_TOKENS, Session
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns, medians
from qwen3fast.generator import Generator

SLOTS = 8  # of the server, as `serve` has by default
PAIRED_CLIENTS = (1, SLOTS)  # at which HTTP is compared with the engine alone
PAIRS = 3  # per repetition: the difference is small
REQUESTS = 2  # per client, under load
COMPILE = True
ENGINE, HTTP, LOAD = "engine alone", "HTTP", "load"


def run(session: Session) -> None:
    """Measure each format: engine and HTTP in turns with the same requests, then each number of clients."""
    o, vocab_size = session.options, session.config.vocab_size
    with ExitStack() as stack:
        for format in o.formats:
            generator = stack.enter_context(_generator(session, format))
            port = stack.enter_context(_serving(generator))
            if COMPILE:
                session.tell(f"compiling {session.label(format)}")
                generator.warmup()
            _check(session, format, generator, port)
            for context in o.contexts:
                _measure_pairs(session, generator, port, format, context)
                loads = [_load_task(port, session.label(format), context, n, o.new_tokens, vocab_size)
                         for n in o.batch_sizes]  # fmt: skip
                session.harness.run([Group(task.case.name, [task]) for task in loads], o.repetitions)


def _measure_pairs(session: Session, generator: Generator, port: int, format: str, context: int) -> None:
    """Measure HTTP beside the engine alone; pairs that were measured before an interruption are compared as well."""
    pairs = [_pair(session, generator, port, format, context, n) for n in PAIRED_CLIENTS]
    try:
        session.harness.run([group for group, _ in pairs], PAIRS * session.options.repetitions)
    finally:
        for _, (engine, http) in pairs:
            times = zip(http.samples.get("tpot_s", []), engine.samples.get("tpot_s", []), strict=False)
            if ratios := [over / alone for over, alone in times]:
                http.samples["http_over_engine"] = ratios


def _generator(session: Session, format: str) -> Generator:
    """Return a Generator as `serve` makes it, without the reuse of prefixes: repetitions send the same prompts."""
    o, (quantization, kv_cache_dtype) = session.options, split_format(format)
    longest = max(*o.contexts, CHECK_LENGTH) + max(2 * o.new_tokens, CHECK_TOKENS)
    return Generator(
        session.model(quantization),
        word_tokenizer(session.config.vocab_size),
        max_seq_len=longest,
        max_batch_size=SLOTS,
        kv_cache_dtype=kv_cache_dtype,
        threads=o.threads,
        prefix_reuse=False,
        compile=COMPILE,
    )


@contextmanager
def _serving(generator: Generator) -> Iterator[int]:
    """Serve a Generator, and yield the port. Raises: ImportError without the server's packages."""
    try:
        from qwen3fast.server.app import create_app
        from qwen3fast.server.command import in_background
    except ImportError as err:
        raise ImportError("the suite 'serve' needs the server; run: pip install 'qwen3fast[server]'") from err
    with in_background(create_app({"bench": generator})) as port:
        yield port


def _check(session: Session, format: str, generator: Generator, port: int) -> None:
    """Compare the tokens that came over HTTP with the reference logits."""
    work = make_work(session.config.vocab_size, SLOTS, CHECK_LENGTH, CHECK_TOKENS, varied=False, seed=1)
    _, replies = run_http(port, work, SLOTS)
    assert generator.tokenizer is not None, "it has one"
    ids = [tokens_of("".join(text for _, text in reply.events), generator.tokenizer) for reply in replies]
    check = check_tokens(generator.model, [prompt for prompt, _ in work], ids)
    name = f"{HTTP}, {session.label(format)}, {SLOTS} clients"
    session.record.checks[name] = asdict(check) | {"passed": check.passed}


def _case(what: str, format: str, context: int, clients: int, tokens: int, requests: int) -> Case:
    labels: dict[str, Label] = {"what": what, "format": format, "context": context, "clients": clients}
    return Case(labels, {"tokens": float(tokens), "requests": float(requests)})


def _pair(
    session: Session, generator: Generator, port: int, format: str, context: int, clients: int
) -> tuple[Group, tuple[Case, Case]]:
    """Return a group that runs the same requests through the engine alone and over HTTP, one request per client."""
    new_tokens, label = session.options.new_tokens, session.label(format)
    work = make_work(session.config.vocab_size, clients, context, new_tokens, varied=False)
    engine, http = (_case(what, label, context, clients, clients * new_tokens, clients) for what in (ENGINE, HTTP))
    tasks = [
        Task(engine, lambda: run_engine(generator, work)),
        Task(http, lambda: run_http(port, work, clients)[0]),
    ]
    return Group(f"{clients} client{'s' if clients > 1 else ''} beside the engine alone", tasks), (engine, http)


def _load_task(port: int, format: str, context: int, clients: int, new_tokens: int, vocab_size: int) -> Task:
    work = make_work(vocab_size, REQUESTS * clients, context, new_tokens, varied=True)
    case = _case(LOAD, format, context, clients, sum(n for _, n in work), len(work))

    def measure() -> Measurement:
        return run_http(port, work, clients)[0]

    return Task(case, measure, warms_up=False)


def by_clients(record: Record, metric: str, what: str = LOAD) -> dict[str, dict[int, float]]:
    """Return format -> clients -> a metric's median, at the shortest prompt."""
    context = min(int(c.labels["context"]) for c in record.cases)
    return medians(record, metric, "clients", what=what, context=context)


def summary(record: Record) -> list[str]:
    """Return sentences on the cost of HTTP, on the highest rate, and on the highest within the limits."""
    sentences = []
    for name, line in by_clients(record, "http_over_engine", HTTP).items():
        costs = ", ".join(f"{over - 1:+.1%} at {n} client{'s' if n > 1 else ''}" for n, over in sorted(line.items()))
        sentences.append(f"{name}: time per token over HTTP against the engine alone: {costs}.")
    for name, line in by_clients(record, "requests_s").items():
        tokens, good = by_clients(record, "tok_s")[name], by_clients(record, "goodput")[name]
        most, best = max(line, key=line.__getitem__), max(good, key=good.__getitem__)
        sentences.append(
            f"{name}: at most {short(line[most])} requests/s ({short(tokens[most])} tokens/s), with {most} clients; "
            f"goodput {short(good[best])} requests/s, with {best} clients (first token within {MAX_TTFT_S:g} s, "
            f"{MAX_GAP_S * 1e3:g} ms between events)."
        )
    return sentences


SUITE = Suite(
    name="serve",
    title="The HTTP server under load",
    run=run,
    columns=Columns(
        ("format", "what", "context", "clients"),
        ("tok_s", "requests_s", "goodput", "ttft_s", "ttft_p99_s", "tpot_ms", "itl_ms", "itl_p99_ms",
         "http_over_engine"),
    ),
    defaults={
        "formats": ("int4",), "contexts": (32,), "batch_sizes": (1, 2, 4, 8, 16), "new_tokens": 64, "repetitions": 3,
    },
    quick={"batch_sizes": (1, 8), "new_tokens": 32, "repetitions": 1},
    summary=summary,
)  # fmt: skip
