"""Speed of qwen3fast beside other engines on the same random weights in a Qwen3's shape, taking turns.

    python benchmarks/compare_peers.py --setup       # environments and converted weights, once (builds: some minutes)
    python benchmarks/compare_peers.py --output benchmarks/results/peers-0.6b.json

Every engine is a process of its own that loads its model once. All engines of a weight format stay loaded while they
take turns, one reply each, in a new random order each round; the waiting ones sleep, which is measured first. All get
the same prompts, new ones each round: no engine can reuse an earlier prompt's keys and values. Decode speed is measured
behind each of --contexts; prefill of each of --prefill is timed up to the first token. The time of a step is a reply's
mean for every engine, since not all report single steps. Before the rounds, each engine's greedy tokens are compared
with the bfloat16 model's logits: engines in bfloat16 or fp16 must agree, quantized ones may differ, by a gap that the
record keeps. With --gguf, engines read the same file, and tokens are compared with our model of it, uncompiled.

An engine that crashes or hangs is left out, and the record has the reason, as it has for engines that need another
device. Ctrl-C and SIGTERM keep the rounds so far.
"""

from __future__ import annotations

import argparse
import random
import time
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from comparison import finish
from peers.field import CHECK_PROMPT, CHECK_STEPS, Field
from peers.picture import draw
from peers.protocol import CACHE, FORMATS, GGUF
from peers.registry import PEERS, require_set_up, selected, set_up, split_by_device, tell
from tables import peers_rows

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.measure import check_tokens, make_prompts
from qwen3fast.bench.options import counts
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.table import where_measured
from qwen3fast.engine.threads import use_threads

PAUSE_S = 0.05  # before each reply and probe: threads of the work before may spin for a moment
MAX_ROUNDS, FIRST_WARM_UP_SEED = 1_000, 1_000_000_000  # the latter is beyond the seeds of all rounds
ORDER_SEED = 0


def check(args: argparse.Namespace, field: Field, record: Record) -> None:
    """Compare each engine's tokens with the bfloat16 model, and note its precisions, versions and facts."""
    plain = load_model(args.gguf or args.weights / "bf16", "cpu")
    [prompt] = make_prompts(args.vocab_size, CHECK_PROMPT, 1, seed=1)
    idle = field.idle_shares()
    for name, _, variant in selected(args.peers, field.format):
        if (worker := field.workers.get(name)) is None:
            continue
        reply = field.attempt(name, lambda: worker.generate(prompt, CHECK_STEPS))
        if reply is None:
            continue
        verdict = check_tokens(plain, [prompt], [reply["token_ids"]])
        found: dict[str, Any] = vars(verdict)
        if field.format == "bf16":
            record.checks[f"{name}, bf16"] = found | {"passed": verdict.passed}
        record.notes["engines"].append(
            {
                "engine": name, "format": field.format, "computes": variant.computes, "facts": worker.facts,
                "versions": worker.versions, "idle_processors": idle[name], "tokens": found,
            }
        )  # fmt: skip
        wrong = " WRONG" if field.format == "bf16" and not verdict.passed else ""
        tell(
            f"{field.format} {name}: {verdict.exact} of {verdict.tokens} tokens exact, worst gap "
            f"{verdict.worst_gap:.2%}{wrong}; idle: {idle[name]:.0%} of a processor"
        )


def make_task(args: argparse.Namespace, case: Case, worker: Any, steps: int, field: Field | None = None) -> Task:
    """Return a task of one reply at a case's context. Warm-up runs come from `warm_up`.

    field: its engines; once this one has failed, there is nothing to measure any more.
    """
    context, name = int(case.labels["context"]), str(case.labels["engine"])

    def run() -> Measurement | None:
        # The same prompt for all engines in a round.
        seed = first_seed(case) + len(case.samples.get("ttft_s", ()))
        if field is None:
            return _reply(args.vocab_size, worker, context, steps, seed)
        if name not in field.workers:
            return None
        return field.attempt(name, lambda: _reply(args.vocab_size, worker, context, steps, seed))

    return Task(case, run, warms_up=False)


def warm_up(args: argparse.Namespace, harness: Harness, task: Task, worker: Any, steps: int) -> None:
    """Run an engine until its speed is stable, on prompts that are not measured."""
    context, seeds = int(task.case.labels["context"]), count(FIRST_WARM_UP_SEED + first_seed(task.case))
    harness.warm_up(Task(task.case, lambda: _reply(args.vocab_size, worker, context, steps, seed=next(seeds))))


def first_seed(case: Case) -> int:
    """Return the seed of a shape's first round. With a seed in common, prompts of two shapes would begin alike.

    Engines may keep the keys and values of such a beginning.
    """
    return MAX_ROUNDS * (2 * int(case.labels["context"]) + (case.labels["what"] == "prefill"))


def _reply(vocab_size: int, worker: Any, context: int, steps: int, seed: int) -> Measurement:
    [prompt] = make_prompts(vocab_size, context, 1, seed=seed)
    time.sleep(PAUSE_S)
    reply = worker.generate(prompt, steps)
    assert len(reply["token_ids"]) == steps + 1, f"{worker.name} gave {len(reply['token_ids'])} tokens, not {steps + 1}"
    return {"ttft_s": reply["prefill_s"], "step_s": [reply["decode_s"] / steps] if steps else None}


def run_format(args: argparse.Namespace, format: str, harness: Harness, record: Record) -> None:
    """Load, check and measure all engines of a format; fills the record as it goes."""
    max_steps = {name: variant.max_steps or args.new_tokens for name, _, variant in selected(args.peers, format)}
    with ExitStack() as stack:
        field = Field(args, format, record, stack)
        check(args, field, record)
        for what, context in shapes(args):
            tasks = []
            for name, worker in list(field.workers.items()):
                labels = {"engine": name, "format": format, "context": context, "what": what, "batch_size": 1}
                steps = min(max_steps[name], args.new_tokens) if what == "decode" else 0
                task = make_task(args, Case(labels, {"steps": float(steps)}), worker, steps, field)
                harness.progress.show(f"{format}, {what} at {context}, warm-up: {name}")
                field.attempt(name, lambda: warm_up(args, harness, task, worker, steps))  # noqa: B023
                if name in field.workers:
                    tasks.append(task)
            harness.measure(tasks, args.rounds, f"{format}, {what} at {context}")
            # An engine that failed in these rounds: its few samples are of other rounds than the others' medians.
            failed = [task.case for task in tasks if task.case.labels["engine"] not in field.workers]
            record.cases = [case for case in record.cases if not any(case is other for other in failed)]


def shapes(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the lengths that each format is measured at: decoding at each context, and each prefill."""
    return [("decode", n) for n in args.contexts] + [("prefill", n) for n in args.prefill]


def words(text: str) -> list[str]:
    """Return an option's comma-separated words without duplicates."""
    return list(dict.fromkeys(part for part in text.split(",") if part))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options; `not_run` has the peers that do not run here, with the reasons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=words, default=",".join(PEERS), help="comma-separated [%(default)s]")
    parser.add_argument("--formats", type=words, default=",".join(FORMATS), help="comma-separated [%(default)s]")
    parser.add_argument("--contexts", type=counts, default="32,1000", help="prompt lengths for decoding [%(default)s]")
    parser.add_argument("--prefill", type=counts, default="512", help="prompt lengths for prefill [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=24, help="steps timed per reply [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads of every engine [one per core]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of every engine; cuda is untested "
                        "[%(default)s]")  # fmt: skip
    parser.add_argument("--model", default="random:0.6b", help="a model with random weights [%(default)s]")
    parser.add_argument(
        "--gguf", type=Path, help="a GGUF file, for the engines that read one, instead of a random model"
    )
    parser.add_argument("--weights", type=Path, help=f"folder of its weights for all engines [in {CACHE}, by model]")
    parser.add_argument("--setup", action="store_true", help="make what is missing; measure nothing")
    parser.add_argument("--output", type=Path, default=Path("bench_results/peers.json"), help="[%(default)s]")
    args = parser.parse_args(arguments)
    for option, known in (("peers", PEERS), ("formats", FORMATS)):
        if unknown := set(getattr(args, option)) - set(known):
            parser.error(f"unknown in --{option}: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if args.rounds > MAX_ROUNDS:
        parser.error(f"--rounds {args.rounds}: at most {MAX_ROUNDS:,}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    if not args.model.startswith("random:"):
        parser.error(f"--model {args.model}: only shapes with random weights, such as random:4b, or --gguf FILE")
    args.weights = args.gguf or args.weights or CACHE / args.model.replace(":", "-")
    if args.gguf is not None:
        if not args.gguf.is_file():
            parser.error(f"--gguf: {args.gguf} is no file")
        if not any(v.format == GGUF for name in args.peers for v in PEERS[name].variants):
            parser.error(f"--gguf: none of {', '.join(args.peers)} reads such files here")
        args.model, args.formats = args.gguf.name, [GGUF]
        args.peers = [name for name in args.peers if any(v.format == GGUF for v in PEERS[name].variants)]
    args.peers, args.not_run = split_by_device(args.peers, args.device)
    return args


def measure(args: argparse.Namespace) -> Record:
    """Measure all formats. Returns: the record, without cases that have no sample."""
    config = load_model(args.gguf or args.weights / "bf16", "cpu").config
    args.vocab_size = config.vocab_size
    device = torch.device(args.device)
    notes = {"engines": [], "not_run": args.not_run, "order_seed": ORDER_SEED}
    model = {"name": args.model, "parameters": config.num_parameters}
    record = Record("peers", describe_run("python benchmarks/compare_peers.py"), describe_environment(device), model)
    record.notes = notes
    tell(where_measured(record))
    probe = BandwidthProbe(device)

    def measure_bandwidth() -> Measurement:
        time.sleep(PAUSE_S)
        return {"bandwidth_gb_s": probe.measure()}

    harness = Harness(record, [measure_bandwidth], rng=random.Random(ORDER_SEED))
    engines = sum(len(list(selected(args.peers, format))) for format in args.formats)
    harness.progress.expect(float(engines * len(shapes(args)) * args.rounds))
    with interruptible(record):
        for format in args.formats:
            run_format(args, format, harness, record)
    harness.finish()
    record.cases = [case for case in record.cases if case.samples]
    return record


def main() -> int:
    """Set up, or measure, print and write. Returns: the exit status."""
    args = parse()
    use_threads(args.threads)
    args.threads = torch.get_num_threads()
    for name, why in args.not_run.items():
        tell(f"{name}: {why}")
    if args.setup:
        return set_up(args)
    require_set_up(args)
    record = measure(args)
    return finish(record, args.output, partial(peers_rows, ratios=True), draw)


if __name__ == "__main__":
    raise SystemExit(main())
