"""Many requests at once: throughput by batch size beside transformers, and latency by offered load.

    python benchmarks/batching.py --model random:0.6b --output benchmarks/results/batching-0.6b.json

Offline: the same prompts, of many lengths, and replies of many lengths, all queued at once. qwen3fast runs them through
1, 2, 4, ... rows; transformers pads them into batches that run until the longest reply of each is done (static), or
runs them through its own continuous batching. Engines take turns. Online: requests arrive at random (Poisson), for each
number of rows at shares of the throughput found with it before; time to the first token and between tokens, as a client
sees them: from when a request was due, so waiting for a free row counts. Tokens are checked before anything is timed.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from batching_picture import draw
from huggingface_hub.utils import tqdm
from peers.shared import share_weights
from tables import OURS, offline_rows, online_rows

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task
from qwen3fast.bench.measure import check_tokens, make_prompts
from qwen3fast.bench.options import counts
from qwen3fast.bench.plot import save
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import as_text
from qwen3fast.model import Qwen3
from qwen3fast.results import StreamChunk

STATIC, CONTINUOUS = "transformers, static", "transformers, continuous"
FEWEST_REQUESTS = 4  # of an online run, however slow it is
CHECK_PROMPT, CHECK_TOKENS = 40, 12
Work = list[tuple[list[int], int]]  # prompts, and how many tokens to reply with


def make_work(vocab_size: int, count: int, prompt_tokens: int, new_tokens: int, seed: int = 0) -> Work:
    """Prompts and replies from a quarter to twice these lengths, random ids."""
    rng = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(mean * 2 ** rng.uniform(-2, 1)))

    return [
        ([rng.randrange(vocab_size) for _ in range(length(prompt_tokens))], length(new_tokens)) for _ in range(count)
    ]


def run_ours(generator: Generator, work: Work) -> float:
    """Seconds for all of it."""
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in work]
    started = time.perf_counter()
    results = generator.generate([prompt for prompt, _ in work], params)
    seconds = time.perf_counter() - started
    assert [len(r.token_ids) for r in results] == [n for _, n in work], "every reply must be whole"
    return seconds


@torch.no_grad()
def run_static(reference: transformers.Qwen3ForCausalLM, work: Work, batch_size: int) -> float:
    """Seconds for all of it in padded batches of transformers' `generate`, each as long as its longest reply."""
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
    """Seconds for all of it in transformers' continuous batching, from the first request on."""
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
        elif time.perf_counter() - last > 120:
            raise RuntimeError(f"no reply for two minutes; {len(outputs)} of {count} came")
    return outputs


def check(record: Record, name: str, model: Qwen3, generator: Generator, size: int) -> None:
    """Hold the tokens of `size` requests at once against the plain model's logits."""
    prompts = make_prompts(model.config.vocab_size, CHECK_PROMPT, size, seed=1)
    params = SamplingParams(temperature=0, max_tokens=CHECK_TOKENS, ignore_eos=True)
    verdict = check_tokens(model, prompts, [result.token_ids for result in generator.generate(prompts, params)])
    record.checks[f"{OURS}, {name}, batch {size}"] = vars(verdict) | {"passed": verdict.passed}


def offline_case(engine: str, format: str, size: int, work: Work) -> Case:
    """A case without samples."""
    facts = {"tokens": float(sum(n for _, n in work)), "requests": float(len(work))}
    return Case({"what": "offline", "engine": engine, "format": format, "batch_size": size}, facts)


def offline_tasks(
    args: argparse.Namespace, models: dict[str, Qwen3], generators: dict[tuple[str, int], Generator], record: Record
) -> list[Task]:
    """Throughput of every engine and batch size; the record's notes say why an engine is missing."""
    vocab_size = next(iter(models.values())).config.vocab_size
    work = make_work(vocab_size, args.requests, args.prompt_tokens, args.new_tokens)
    tasks = []
    for (name, size), generator in generators.items():
        case = offline_case(OURS, name, size, work)
        tasks.append(Task(case, lambda g=generator: {"seconds": run_ours(g, work)}, warms_up=False))
    if "bf16" not in models or args.no_transformers:
        return tasks
    reference, largest = share_weights(models["bf16"]), max(args.batch_sizes)
    # One by one it takes longest, and its speed does not depend on how many there are.
    few = work[: max(FEWEST_REQUESTS, len(work) // 3)]
    for size, some in ((1, few), (largest, work)):
        case = offline_case(STATIC, "bf16", size, some)
        tasks.append(Task(case, lambda w=some, n=size: {"seconds": run_static(reference, w, n)}, warms_up=False))
    try:
        run_continuous(reference, work[:2], largest)
    except Exception as err:  # whatever it is, the others are worth measuring
        record.notes["missing"] = {CONTINUOUS: f"{type(err).__name__}: {str(err)[:300]}"}
    else:
        case = offline_case(CONTINUOUS, "bf16", largest, work)
        tasks.append(Task(case, lambda: {"seconds": run_continuous(reference, work, largest)}, warms_up=False))
    return tasks


class Client:
    """Reads one reply and notes when each token came."""

    def __init__(self, handle: Iterable[StreamChunk], due_s: float) -> None:
        self.due_s = due_s
        self.times: list[float] = []
        self.thread = threading.Thread(target=self._read, args=(handle,))
        self.thread.start()

    def _read(self, handle: Iterable[StreamChunk]) -> None:
        for chunk in handle:
            self.times += [time.perf_counter()] * len(chunk.token_ids)


def arrivals(count: int, rate: float, seed: int = 2) -> list[float]:
    """Seconds from the start at which requests are due, `rate` a second on average (Poisson)."""
    rng, due, times = random.Random(seed), 0.0, []
    for _ in range(count):
        due += rng.expovariate(rate)
        times.append(due)
    return times


def run_online(generator: Any, work: Work, due: list[float]) -> Measurement:
    """Submit each request when it is due, and read all replies.

    Returns: for each request seconds from when it was due to its first token, all gaps between tokens of a reply, and
    the seconds of it all.
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


def online_work(args: argparse.Namespace, vocab_size: int, load: float, tok_s: float) -> tuple[Work, float]:
    """The requests of an online run at a share of the throughput, and how many are to come a second.

    As many as were asked for, or as come in the time that a run may take.
    """
    work = make_work(vocab_size, args.requests, args.prompt_tokens, args.new_tokens, seed=1)
    rate = load * tok_s / (sum(n for _, n in work) / len(work))
    return work[: max(FEWEST_REQUESTS, int(rate * args.most_online_s))], rate


def online_tasks(
    args: argparse.Namespace, models: dict[str, Qwen3], generators: dict[tuple[str, int], Generator], record: Record
) -> list[Task]:
    """Latency at each load of each batch size, formats taking turns."""
    tok_s = {
        (case.labels["format"], case.labels["batch_size"]): case.metrics["tok_s"].median
        for case in record.cases
        if case.labels["engine"] == OURS and "tok_s" in case.metrics
    }
    tasks = []
    for size in args.batch_sizes:
        for load in args.loads:
            for name, model in models.items():
                work, rate = online_work(args, model.config.vocab_size, load, tok_s[name, size])
                labels = {"what": "online", "engine": OURS, "format": name, "batch_size": size, "load": load}
                facts = {"tokens": sum(n for _, n in work), "requests": len(work), "offered_requests_s": rate}
                due = arrivals(len(work), rate)
                tasks.append(
                    Task(
                        Case(labels, {name: float(value) for name, value in facts.items()}),
                        lambda g=generators[name, size], w=work, d=due: run_online(g, w, d),
                        warms_up=False,
                    )
                )
    return tasks


def measure(args: argparse.Namespace, models: dict[str, Qwen3], harness: Harness, record: Record) -> None:
    """Check, then the offline rounds, then the online runs."""
    generators = {
        (name, size): Generator(model, max_seq_len=args.max_seq_len, max_batch_size=size, prefix_reuse=False)
        for name, model in models.items()
        for size in args.batch_sizes
    }
    try:
        for (name, size), generator in tqdm(generators.items(), desc="compiling"):
            generator.warmup()
            check(record, name, models[name], generator, size)
        harness.measure(offline_tasks(args, models, generators, record), args.rounds, "offline")
        harness.measure(online_tasks(args, models, generators, record), args.online_rounds, "online")
    except KeyboardInterrupt:
        record.interrupted = True
        print("interrupted: writing what was measured", file=sys.stderr)
    finally:
        for generator in generators.values():
            generator.close()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="[%(default)s]")
    parser.add_argument("--formats", default="bf16,int4", help="bf16 or a quantisation, comma-separated [%(default)s]")
    parser.add_argument("--batch-sizes", type=counts, default="1,2,4,8", help="rows of the cache [%(default)s]")
    parser.add_argument("--loads", default="0.3,0.6,0.9", help="shares of each batch size's throughput [%(default)s]")
    parser.add_argument("--requests", type=int, default=32, help="in each run [%(default)s]")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="middling length [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=32, help="middling length [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="of the offline part [%(default)s]")
    parser.add_argument("--online-rounds", type=int, default=1, help="of the online part [%(default)s]")
    parser.add_argument("--most-online-s", type=float, default=25.0, help="in which an online run's requests come, on "
                        "average: of a slow one there are fewer [%(default)s]")  # fmt: skip
    parser.add_argument("--no-transformers", action="store_true", help="qwen3fast alone")
    parser.add_argument("--output", type=Path, default=Path("bench_results/batching.json"), help="[%(default)s]")
    args = parser.parse_args(arguments)
    args.loads = [float(n) for n in args.loads.split(",")]
    if min(args.loads) <= 0 or args.requests < 1:
        parser.error("--loads and --requests must be positive")
    args.max_seq_len = max(2 * (args.prompt_tokens + args.new_tokens), CHECK_PROMPT + CHECK_TOKENS)
    return args


def main() -> int:
    """Measure, print and write. Returns the exit status."""
    args = parse()
    models = {
        name: load_model(args.model, "cpu", quantization=None if name == "bf16" else name, progress=True)
        for name in args.formats.split(",")
    }
    environment = describe_environment(torch.device("cpu")) | {"transformers": transformers.__version__}
    work = {"requests": args.requests, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    run = describe_run("python benchmarks/batching.py")
    record = Record("batching", run, environment, {"name": args.model}, notes={"work": work})
    # No probe: runs take so long that what memory did at their ends says little of them.
    harness = Harness(record)
    measure(args, models, harness, record)
    harness.finish()
    record.cases = [case for case in record.cases if case.samples]
    write_json(record.to_dict(), args.output)
    print(as_text(offline_rows(record), left=1), "", as_text(online_rows(record), left=1), sep="\n")
    print("\n".join(f"missing: {name}: {why}" for name, why in record.notes.get("missing", {}).items()))
    print("\n".join(f"noise: {reason}" for reason in record.noise), file=sys.stderr)
    if record.cases:
        save(draw(record), args.output.with_suffix(".png"))
    print(f"wrote {args.output} and {args.output.with_suffix('.png')}")
    return 130 if record.interrupted else int(not record.passed)


if __name__ == "__main__":
    raise SystemExit(main())
