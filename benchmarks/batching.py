"""Many requests at once: throughput by batch size beside transformers, and latency by offered load.

    python benchmarks/batching.py --model random:0.6b --output benchmarks/results/batching-0.6b.json

Offline: the same prompts and replies of many lengths are all queued at once. qwen3fast runs them in 1, 2, 4, ... slots;
transformers pads them into batches that run until the longest reply is done (static), or runs them through its own
continuous batching. Engines take turns. Online: requests arrive at random (Poisson) at shares of the throughput found
before with as many slots. Latency is what a client sees: it counts from when a request was due, and includes waiting
for a free slot. Tokens are checked before anything is timed. Ctrl-C and SIGTERM keep what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from batching_picture import draw
from batching_work import Work, arrivals, make_work, run_continuous, run_online, run_ours, run_static
from peers.shared import share_weights
from tables import OURS, offline_rows, online_rows

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.measure import check_tokens, make_prompts
from qwen3fast.bench.options import counts
from qwen3fast.bench.plot import save
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import as_text
from qwen3fast.bench.text import visible
from qwen3fast.model import Qwen3

STATIC, CONTINUOUS = "transformers, static", "transformers, continuous"
MIN_REQUESTS = 4  # of an online run, however slow it is
CHECK_PROMPT, CHECK_TOKENS = 40, 12


def check(record: Record, name: str, model: Qwen3, generator: Generator, size: int) -> None:
    """Compare the tokens of `size` requests at once with the reference logits."""
    prompts = make_prompts(model.config.vocab_size, CHECK_PROMPT, size, seed=1)
    params = SamplingParams(temperature=0, max_tokens=CHECK_TOKENS, ignore_eos=True)
    verdict = check_tokens(model, prompts, [result.token_ids for result in generator.generate(prompts, params)])
    record.checks[f"{OURS}, {name}, batch {size}"] = vars(verdict) | {"passed": verdict.passed}


def offline_case(engine: str, format: str, size: int, work: Work) -> Case:
    """Return a case without samples."""
    facts = {"tokens": float(sum(n for _, n in work)), "requests": float(len(work))}
    return Case({"what": "offline", "engine": engine, "format": format, "batch_size": size}, facts)


def offline_tasks(
    args: argparse.Namespace, models: dict[str, Qwen3], generators: dict[tuple[str, int], Generator], record: Record
) -> list[Task]:
    """Return tasks of every engine and batch size; the record's notes say why an engine is missing."""
    vocab_size = next(iter(models.values())).config.vocab_size
    work = make_work(vocab_size, args.requests, args.prompt_tokens, args.new_tokens)
    tasks = []
    for (name, size), generator in generators.items():
        case = offline_case(OURS, name, size, work)
        tasks.append(Task(case, lambda g=generator: {"seconds": run_ours(g, work)}, warms_up=False))
    if "bf16" not in models or args.no_transformers:
        return tasks
    reference, largest = share_weights(models["bf16"]), max(args.batch_sizes)
    # One by one takes longest, and its speed does not depend on the number of requests.
    few = work[: max(MIN_REQUESTS, len(work) // 3)]
    for size, some in ((1, few), (largest, work)):
        case = offline_case(STATIC, "bf16", size, some)
        tasks.append(peer_task(record, case, partial(run_static, reference, some, size)))
    case = offline_case(CONTINUOUS, "bf16", largest, work)
    warm_up = peer_task(record, case, partial(run_continuous, reference, work[:2], largest))
    if warm_up.run() is not None:
        tasks.append(peer_task(record, case, partial(run_continuous, reference, work, largest)))
    return tasks


def peer_task(record: Record, case: Case, run: Callable[[], float]) -> Task:
    """Return a task of another engine. If it fails, the record notes the reason and the others go on."""
    name, missing = str(case.labels["engine"]), record.notes.setdefault("missing", {})

    def run_once() -> Measurement | None:
        if name in missing:
            return None
        try:
            return {"seconds": run()}
        except Exception as err:  # whatever it is, the others are worth measuring
            missing[name] = f"{type(err).__name__}: {str(err)[:300]}"
            return None

    return Task(case, run_once, warms_up=False)


def online_work(args: argparse.Namespace, vocab_size: int, load: float, tok_s: float) -> tuple[Work, float]:
    """Return the requests of an online run at a share of the throughput, and how many arrive per second.

    Their number is the given one, or less where they would take longer to arrive than a run may take.
    """
    work = make_work(vocab_size, args.requests, args.prompt_tokens, args.new_tokens, seed=1)
    rate = load * tok_s / (sum(n for _, n in work) / len(work))
    return work[: max(MIN_REQUESTS, int(rate * args.max_online_s))], rate


def online_tasks(
    args: argparse.Namespace, models: dict[str, Qwen3], generators: dict[tuple[str, int], Generator], record: Record
) -> list[Task]:
    """Return tasks of each load of each batch size; formats take turns."""
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
    """Check, then measure the offline rounds and the online runs."""
    generators = {
        (name, size): Generator(model, max_seq_len=args.max_seq_len, max_batch_size=size, prefix_reuse=False)
        for name, model in models.items()
        for size in args.batch_sizes
    }
    with interruptible(record):
        for number, ((name, size), generator) in enumerate(generators.items(), 1):
            harness.progress.show(f"compiling and checking {name}, batch {size} ({number} of {len(generators)})")
            generator.warmup()
            check(record, name, models[name], generator, size)
        harness.measure(offline_tasks(args, models, generators, record), args.rounds, "offline")
        harness.measure(online_tasks(args, models, generators, record), args.online_rounds, "online")
    for generator in generators.values():
        generator.close()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="[%(default)s]")
    parser.add_argument("--formats", default="bf16,int4", help="bf16 or a quantization, comma-separated [%(default)s]")
    parser.add_argument("--batch-sizes", type=counts, default="1,2,4,8", help="slots of the cache [%(default)s]")
    parser.add_argument("--loads", default="0.3,0.6,0.9", help="shares of each batch size's throughput [%(default)s]")
    parser.add_argument("--requests", type=int, default=32, help="per run [%(default)s]")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="mean length [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=32, help="mean length [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="of the offline part [%(default)s]")
    parser.add_argument("--online-rounds", type=int, default=1, help="of the online part [%(default)s]")
    parser.add_argument("--max-online-s", type=float, default=25.0, help="in which an online run's requests arrive, on "
                        "average: a slow run has fewer [%(default)s]")  # fmt: skip
    parser.add_argument("--no-transformers", action="store_true", help="qwen3fast alone")
    parser.add_argument("--output", type=Path, default=Path("bench_results/batching.json"), help="[%(default)s]")
    args = parser.parse_args(arguments)
    args.loads = [float(n) for n in args.loads.split(",")]
    if min(args.loads) <= 0 or args.requests < 1:
        parser.error("--loads and --requests must be positive")
    args.max_seq_len = max(2 * (args.prompt_tokens + args.new_tokens), CHECK_PROMPT + CHECK_TOKENS)
    return args


def main() -> int:
    """Measure, print and write. Returns: the exit status."""
    args = parse()
    models = {
        name: load_model(
            args.model, "cpu", quantization=None if name == "bf16" else name, progress=True, calibrate=False
        )
        for name in args.formats.split(",")
    }
    environment = describe_environment(torch.device("cpu")) | {"transformers": transformers.__version__}
    work = {"requests": args.requests, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens}
    run = describe_run("python benchmarks/batching.py")
    record = Record("batching", run, environment, {"name": args.model}, notes={"work": work})
    # No probe: runs take so long that the memory's speed at their ends says little.
    harness = Harness(record)
    measure(args, models, harness, record)
    harness.finish()
    record.cases = [case for case in record.cases if case.samples]
    write_json(record.to_dict(), args.output)
    print(as_text(offline_rows(record), left=1), "", as_text(online_rows(record), left=1), sep="\n")
    print("\n".join(f"missing: {name}: {visible(why)}" for name, why in record.notes.get("missing", {}).items()))
    print("\n".join(f"noise: {reason}" for reason in record.noise), file=sys.stderr)
    if record.cases:
        save(draw(record), args.output.with_suffix(".png"))
    print(f"wrote {args.output} and {args.output.with_suffix('.png')}")
    return 130 if record.interrupted else int(not record.passed)


if __name__ == "__main__":
    raise SystemExit(main())
