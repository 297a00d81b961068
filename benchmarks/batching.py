"""Many requests at once: throughput by batch size beside transformers, and latency by offered load.

    python benchmarks/batching.py --model random:0.6b --output benchmarks/results/cpu-batching.json

Offline: the same prompts, of many lengths, and replies of many lengths, all queued at once. qwen3fast runs them through
1, 2, 4, ... rows; transformers pads them into batches that run until the longest reply of each is done (static), or
runs them through its own continuous batching. Engines take turns. Online: requests arrive at random (Poisson) at
shares of the throughput found before; time to the first token and between tokens, as a client sees them.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from compare_transformers import share_weights
from huggingface_hub.utils import tqdm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qwen3fast import Generator, RequestHandle, SamplingParams, load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.record import write_json
from qwen3fast.model import Qwen3

INK, FAINT = "#1f2933", "#7b8794"
COLORS = ("#0b69a3", "#c65d21", "#5f7f3a", "#8d3f8d")
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


def offline(args: argparse.Namespace, models: dict[str, Qwen3]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Throughput of every engine and batch size, taking turns; and why an engine is missing."""
    plain = models.get("bf16")
    vocab_size = next(iter(models.values())).config.vocab_size
    work = make_work(vocab_size, args.requests, args.prompt_tokens, args.new_tokens)
    tokens = sum(n for _, n in work)
    generators = {
        (name, size): Generator(model, max_seq_len=args.max_seq_len, max_batch_size=size, prefix_reuse=False)
        for name, model in models.items()
        for size in args.batch_sizes
    }
    runs: dict[tuple[str, int], Any] = {key: lambda g=g: run_ours(g, work) for key, g in generators.items()}
    missing = {}
    if plain is not None and not args.no_transformers:
        reference, largest = share_weights(plain), max(args.batch_sizes)
        runs["transformers, static", largest] = lambda: run_static(reference, work, largest)
        runs["transformers, static", 1] = lambda: run_static(reference, work, 1)
        try:
            run_continuous(reference, work[:2], largest)
            runs["transformers, continuous", largest] = lambda: run_continuous(reference, work, largest)
        except Exception as err:
            missing["transformers, continuous"] = f"{type(err).__name__}: {str(err)[:300]}"
    for generator in tqdm(generators.values(), desc="compiling"):
        generator.warmup()
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    bar = tqdm(total=args.rounds * len(runs), desc="offline", unit="run")
    for _ in range(args.rounds):
        for key, run in runs.items():
            bar.set_postfix_str(f"{key[0]}, batch {key[1]}")
            seconds[key].append(run())
            bar.update()
    bar.close()
    for generator in generators.values():
        generator.close()
    cases = [
        {"engine": name, "batch_size": size, "seconds": s, "tokens": tokens, "tok_s": tokens / median(s)}
        for (name, size), s in seconds.items()
    ]
    return cases, missing


class Client:
    """Reads one reply and notes when each chunk came."""

    def __init__(self, handle: RequestHandle, due_s: float) -> None:
        self.due_s, self.times = due_s, []
        self.thread = threading.Thread(target=self._read, args=(handle,))
        self.thread.start()

    def _read(self, handle: RequestHandle) -> None:
        for chunk in handle:
            self.times += [time.perf_counter()] * len(chunk.token_ids)


def online(args: argparse.Namespace, name: str, model: Qwen3, tok_s: float) -> list[dict[str, Any]]:
    """Latency at each offered load, as shares of an offline throughput of `tok_s`."""
    size = max(args.batch_sizes)
    cases = []
    with Generator(model, max_seq_len=args.max_seq_len, max_batch_size=size, prefix_reuse=False) as generator:
        generator.warmup()
        for load in tqdm(args.loads, desc=f"online, {name}"):
            work = make_work(model.config.vocab_size, args.requests, args.prompt_tokens, args.new_tokens, seed=1)
            rate = load * tok_s / (sum(n for _, n in work) / len(work))  # requests a second
            rng, clients = random.Random(2), []
            started = due = time.perf_counter()
            for prompt, new in work:
                due += rng.expovariate(rate)
                time.sleep(max(0.0, due - time.perf_counter()))
                params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
                clients.append(Client(generator.submit(prompt, params), due))
            for client in clients:
                client.thread.join()
            seconds = max(client.times[-1] for client in clients) - started
            first = [client.times[0] - client.due_s for client in clients]
            between = [b - a for client in clients for a, b in zip(client.times, client.times[1:], strict=False)]
            cases.append(
                {
                    "engine": name, "batch_size": size, "load": load, "requests_s": rate,
                    "tok_s": sum(n for _, n in work) / seconds, "ttft_s": first, "itl_s": between,
                    "ttft_p50_s": median(first), "ttft_p99_s": quantiles(first, n=100)[98],
                    "itl_p50_s": median(between), "itl_p99_s": quantiles(between, n=100)[98],
                }
            )  # fmt: skip
    return cases


def plot(record: dict[str, Any], path: Path) -> None:
    """Throughput by batch size; latency by load."""
    figure = Figure(figsize=(11.0, 4.8))
    left, middle, right = figure.subplots(1, 3)
    names = list(dict.fromkeys(case["engine"] for case in record["offline"]))
    for color, name in zip(COLORS, [n for n in names if "transformers" not in n], strict=False):
        cases = [case for case in record["offline"] if case["engine"] == name]
        sizes, speeds = [c["batch_size"] for c in cases], [c["tok_s"] for c in cases]
        left.plot(sizes, speeds, "o-", color=color, label=f"qwen3fast, {name}")
        online = [case for case in record["online"] if case["engine"] == name]
        loads = [100 * case["load"] for case in online]
        for axes, what in ((middle, "ttft"), (right, "itl")):
            for quantile, style in (("p50", "o-"), ("p99", "o--")):
                points = [1e3 * case[f"{what}_{quantile}_s"] for case in online]
                axes.plot(loads, points, style, color=color, label=f"{name}, {quantile}")
    for marker, name in zip("s^", [n for n in names if "transformers" in n], strict=False):
        cases = [case for case in record["offline"] if case["engine"] == name]
        left.plot([c["batch_size"] for c in cases], [c["tok_s"] for c in cases], marker, color=FAINT, label=name)
    left.set_xscale("log", base=2)
    sizes = sorted({case["batch_size"] for case in record["offline"]})
    left.set_xticks(sizes, [str(n) for n in sizes])
    for axes, title, label in (
        (left, "tokens/s, all requests", "rows of the cache (batch size)"),
        (middle, "time to first token, ms", "offered load, % of throughput"),
        (right, "time between tokens, ms", "offered load, % of throughput"),
    ):
        axes.set_title(title, loc="left", size=11, color=INK)
        axes.set_xlabel(label, color=INK)
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    left.set_ylim(0, 1.3 * max(case["tok_s"] for case in record["offline"]))
    for axes in (middle, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * 3)  # room for the legend
    environment = record["environment"]
    where = f"{record['model']}; {environment['cpu']}, {environment['threads']} threads; torch {environment['torch']}"
    figure.suptitle("Many requests at once", x=0.01, ha="left", size=14, weight="bold", color=INK)
    figure.text(0.01, 0.01, where, size=8, color=FAINT)
    figure.tight_layout(rect=(0, 0.03, 1, 0.98))
    figure.savefig(path, dpi=150, facecolor="white")


def as_text(record: dict[str, Any]) -> str:
    """Both tables."""
    lines = [f"{'engine':26}{'batch':>6}{'tok/s':>8}"]
    lines += [f"{c['engine']:26}{c['batch_size']:6}{c['tok_s']:8.1f}" for c in record["offline"]]
    lines += [f"missing: {name}: {why}" for name, why in record["missing"].items()]
    lines.append(f"{'engine':8}{'load':>6}{'req/s':>7}{'tok/s':>8}{'TTFT p50, p99':>18}{'ITL p50, p99':>18}")
    for c in record["online"]:
        first, between = (f"{c[f'{k}_p50_s'] * 1e3:.0f}, {c[f'{k}_p99_s'] * 1e3:.0f} ms" for k in ("ttft", "itl"))
        lines.append(f"{c['engine']:8}{c['load']:6.0%}{c['requests_s']:7.2f}{c['tok_s']:8.1f}{first:>18}{between:>18}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="[%(default)s]")
    parser.add_argument("--formats", default="bf16,int4", help="bf16 or a quantisation, comma-separated [%(default)s]")
    parser.add_argument("--batch-sizes", default="1,2,4,8", help="rows of the cache [%(default)s]")
    parser.add_argument("--loads", default="0.3,0.6,0.9", help="shares of the throughput, at the last batch size")
    parser.add_argument("--requests", type=int, default=32, help="in each run [%(default)s]")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="middling length [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=32, help="middling length [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="of the offline part [%(default)s]")
    parser.add_argument("--no-transformers", action="store_true", help="qwen3fast alone")
    parser.add_argument("--output", type=Path, default=Path("bench_results/cpu-batching.json"), help="[%(default)s]")
    args = parser.parse_args()
    args.batch_sizes = [int(n) for n in args.batch_sizes.split(",")]
    args.loads = [float(n) for n in args.loads.split(",")]
    args.max_seq_len = 2 * (args.prompt_tokens + args.new_tokens)
    models = {
        name: load_model(args.model, "cpu", quantization=None if name == "bf16" else name, progress=True)
        for name in args.formats.split(",")
    }
    cases, missing = offline(args, models)
    best = {case["engine"]: case["tok_s"] for case in cases if case["batch_size"] == max(args.batch_sizes)}
    record = {
        "suite": "batching",
        "run": describe_run("python benchmarks/batching.py"),
        "environment": describe_environment(torch.device("cpu")) | {"transformers": transformers.__version__},
        "model": args.model,
        "work": {"requests": args.requests, "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens},
        "offline": cases,
        "missing": missing,
        "online": [case for name, model in models.items() for case in online(args, name, model, best[name])],
    }
    print(as_text(record))
    write_json(record, args.output)
    plot(record, args.output.with_suffix(".png"))
    print(f"wrote {args.output} and {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
