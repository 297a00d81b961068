"""Speed of qwen3fast beside other engines on the same random weights in Qwen3-0.6B's shape, taking turns.

    python benchmarks/compare_peers.py --setup       # environments and converted weights, once (builds: some minutes)
    python benchmarks/compare_peers.py --output benchmarks/results/peers-0.6b.json

Every engine is a process of its own that loads its model once; all of one weight format stay loaded while they take
turns (A B C A B C ...), each for one reply, so that a noisy machine treats all alike; the waiting ones sleep, which is
measured first. All get the same prompts, new ones each round, so that no engine can reuse an earlier prompt's keys and
values. Decode speed is at a context's length; prefill is timed up to the first token. A step's time is a reply's mean
for every engine, since not all tell each step. Before the rounds, each engine's greedy tokens are held against the
bfloat16 model's logits: those in bfloat16 or fp16 must agree, the rounded ones are free to differ, by a gap that the
record keeps. Engines that need another device are left out, and the record says so. Ctrl-C keeps the rounds so far.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peers import ctranslate2, llama_cpp, onnxruntime_genai, openvino_genai, ours, sglang, transformers, vllm
from peers.checkpoint import SOURCE, write_checkpoint
from peers.picture import draw
from peers.protocol import CACHE, FORMATS, Peer, Variant, Worker
from tables import OURS, peers_rows

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task
from qwen3fast.bench.measure import check_tokens, make_prompts
from qwen3fast.bench.options import counts
from qwen3fast.bench.plot import save
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import as_text
from qwen3fast.engine.threads import use_threads

MODULES = (transformers, llama_cpp, openvino_genai, onnxruntime_genai, ctranslate2, vllm, sglang)
PEERS: dict[str, Peer] = {module.PEER.name: module.PEER for module in MODULES}
CHECK_PROMPT, CHECK_STEPS = 40, 11
IDLE_S = 1.0  # how long waiting workers are watched
PAUSE_S = 0.05  # before each reply and probe: the threads of the work before may spin for a moment
FIRST_WARM_UP_SEED = 1_000_000  # beyond the seeds of all rounds


def selected(peers: list[str], format: str) -> Iterator[tuple[str, Peer | None, Variant]]:
    """All engines of a format, ours (without a Peer) first, and what each is called."""
    for variant in ours.VARIANTS:
        if variant.format == format:
            yield OURS + (" int8 cache" if variant.name.endswith(ours.INT8_CACHE) else ""), None, variant
    for peer in (PEERS[name] for name in peers):
        for variant in peer.variants:
            if variant.format == format:
                yield f"{peer.name} {variant.name}", peer, variant


def split_by_device(peers: list[str], device: str) -> tuple[list[str], dict[str, str]]:
    """The peers that run on a device, and why each of the others is not run."""
    able = [name for name in peers if device in PEERS[name].devices]
    others = {
        name: f"not run: needs {' or '.join(PEERS[name].devices)}, this comparison is on {device}"
        for name in peers
        if name not in able
    }
    return able, others


def set_up(args: argparse.Namespace) -> None:
    """Everything that the measurement needs, as far as it is missing."""
    write_checkpoint(args.weights, tuple(args.formats))
    for peer in (PEERS[name] for name in args.peers):
        print(f"{peer.name}: environment in {peer.python.parent.parent}", flush=True)
        peer.setup()
        # Some of a peer's formats are made of its bfloat16 one.
        for variant in peer.variants:
            if variant.format in {"bf16", *args.formats}:
                print(f"{peer.name}: {variant.name}", flush=True)
                peer.convert(variant, args.weights / "bf16")


def require_set_up(args: argparse.Namespace) -> None:
    """Raises: SystemExit naming what is missing and the command that makes it."""
    missing = [
        f"{name} {format}"
        for format in args.formats
        for name, peer, variant in selected(args.peers, format)
        if not (peer.is_ready(variant) if peer else (args.weights / variant.folder / "config.json").is_file())
    ]
    if missing:
        command = f"python benchmarks/compare_peers.py --setup --peers {','.join(args.peers)}"
        raise SystemExit(f"not set up: {', '.join(missing)}; run: {command} --formats {','.join(args.formats)}")


def start_workers(args: argparse.Namespace, format: str, stack: ExitStack) -> dict[str, Worker]:
    """A worker for each engine of the format; the stack ends them."""
    max_seq_len = max(*args.contexts, args.prefill) + args.new_tokens + 1
    workers = {}
    for name, peer, variant in tqdm(list(selected(args.peers, format)), desc=f"loading {format}", unit="engine"):
        python, module = (peer.python, peer.module) if peer else (Path(sys.executable), "ours")
        model = peer.model_path(variant) if peer else args.weights / variant.folder
        worker = Worker(f"{name} {format}", python, module, variant.name, model, args.threads, max_seq_len, args.device)
        stack.callback(worker.close)
        worker.generate(make_prompts(args.vocab_size, CHECK_PROMPT, 1, seed=2)[0], 2)
        workers[name] = worker
    return workers


def idle_share(workers: dict[str, Worker]) -> dict[str, float]:
    """Processors that each waiting worker keeps busy: about 0 if its threads sleep."""
    time.sleep(0.5)
    before = {name: worker.cpu_s() for name, worker in workers.items()}
    time.sleep(IDLE_S)
    return {name: (worker.cpu_s() - before[name]) / IDLE_S for name, worker in workers.items()}


def check(args: argparse.Namespace, format: str, workers: dict[str, Worker], record: Record) -> None:
    """Hold each engine's tokens against the bfloat16 model, and note what it computes in, its versions and facts."""
    plain = load_model(args.weights / "bf16", "cpu")
    [prompt] = make_prompts(args.vocab_size, CHECK_PROMPT, 1, seed=1)
    idle = idle_share(workers)
    for name, _, variant in selected(args.peers, format):
        verdict = check_tokens(plain, [prompt], [workers[name].generate(prompt, CHECK_STEPS)["token_ids"]])
        found: dict[str, Any] = vars(verdict)
        is_wrong = format == "bf16" and not verdict.passed
        if format == "bf16":
            record.checks[f"{name}, {format}"] = found | {"passed": verdict.passed}
        record.notes["engines"].append(
            {
                "engine": name, "format": format, "computes": variant.computes, "facts": workers[name].facts,
                "versions": workers[name].versions, "idle_processors": idle[name], "tokens": found,
            }
        )  # fmt: skip
        print(
            f"{format} {name}: {verdict.exact} of {verdict.tokens} tokens exact, worst gap {verdict.worst_gap:.2%}"
            f"{' WRONG' if is_wrong else ''}; idle: {idle[name]:.0%} of a processor"
        )


def make_task(args: argparse.Namespace, case: Case, worker: Any, steps: int) -> Task:
    """One reply of a case's context. Warm-up runs, before the case has a sample, come from `warm_up`."""
    context = int(case.labels["context"])

    def run() -> Measurement:
        # The same prompt for all engines in a round, and never one that an engine has seen.
        round_number = len(case.samples.get("ttft_s", ()))
        return _reply(args.vocab_size, worker, context, steps, seed=1_000 * (round_number + 1) + context)

    return Task(case, run, warms_up=False)


def warm_up(args: argparse.Namespace, harness: Harness, task: Task, worker: Any, steps: int) -> None:
    """Until an engine's speed is stable, on prompts that are not measured."""
    context, seeds = int(task.case.labels["context"]), iter(range(FIRST_WARM_UP_SEED, 2 * FIRST_WARM_UP_SEED))
    harness.warm_up(Task(task.case, lambda: _reply(args.vocab_size, worker, context, steps, seed=next(seeds))))


def _reply(vocab_size: int, worker: Any, context: int, steps: int, seed: int) -> Measurement:
    [prompt] = make_prompts(vocab_size, context, 1, seed=seed)
    time.sleep(PAUSE_S)
    reply = worker.generate(prompt, steps)
    assert len(reply["token_ids"]) == steps + 1, f"{worker.name} gave {len(reply['token_ids'])} tokens, not {steps + 1}"
    return {"ttft_s": reply["prefill_s"], "step_s": [reply["decode_s"] / steps] if steps else None}


def run_format(args: argparse.Namespace, format: str, harness: Harness, record: Record) -> None:
    """Load, check and measure all engines of a format; fills the record as it goes."""
    most = {name: variant.most_steps or args.new_tokens for name, _, variant in selected(args.peers, format)}
    with ExitStack() as stack:
        workers = start_workers(args, format, stack)
        check(args, format, workers, record)
        for what, context in [("decode", n) for n in args.contexts] + [("prefill", args.prefill)]:
            tasks = []
            for name, worker in workers.items():
                labels = {"engine": name, "format": format, "context": context, "what": what, "batch_size": 1}
                steps = min(most[name], args.new_tokens) if what == "decode" else 0
                task = make_task(args, Case(labels, {"steps": float(steps)}), worker, steps)
                warm_up(args, harness, task, worker, steps)
                tasks.append(task)
            harness.measure(tasks, args.rounds, f"{format}, {what} at {context}")


def words(text: str) -> list[str]:
    """An option's comma-separated words, none twice."""
    return list(dict.fromkeys(part for part in text.split(",") if part))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked; `not_run` says which peers were asked for that do not run here, and why."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=words, default=",".join(PEERS), help="comma-separated [%(default)s]")
    parser.add_argument("--formats", type=words, default=",".join(FORMATS), help="comma-separated [%(default)s]")
    parser.add_argument("--contexts", type=counts, default="32,1000", help="prompt lengths of decode [%(default)s]")
    parser.add_argument("--prefill", type=int, default=512, help="prompt length of prefill [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=24, help="steps timed in each reply [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads of every engine [one a core]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of every engine; cuda has not been "
                        "tried [%(default)s]")  # fmt: skip
    parser.add_argument("--weights", type=Path, default=CACHE / "random-0.6b", help="folder [%(default)s]")
    parser.add_argument("--setup", action="store_true", help="make what is missing, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path("bench_results/peers.json"), help="[%(default)s]")
    args = parser.parse_args(arguments)
    for option, known in (("peers", PEERS), ("formats", FORMATS)):
        if unknown := set(getattr(args, option)) - set(known):
            parser.error(f"unknown in --{option}: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if args.prefill in args.contexts:
        parser.error(f"--prefill {args.prefill} is among --contexts; choose another length")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    args.peers, args.not_run = split_by_device(args.peers, args.device)
    return args


def main() -> int:
    """Set up, or measure, print and write. Returns the exit status."""
    args = parse()
    use_threads(args.threads)
    args.threads = torch.get_num_threads()
    for name, why in args.not_run.items():
        print(f"{name}: {why}")
    if args.setup:
        set_up(args)
        return 0
    require_set_up(args)
    config = load_model(args.weights / "bf16", "cpu").config
    args.vocab_size = config.vocab_size
    device = torch.device(args.device)
    model = {"name": SOURCE, "parameters": config.num_parameters}
    run = describe_run("python benchmarks/compare_peers.py")
    record = Record("peers", run, describe_environment(device), model, notes={"engines": [], "not_run": args.not_run})
    probe = BandwidthProbe(device)

    def measure_bandwidth() -> Measurement:
        time.sleep(PAUSE_S)
        return {"bandwidth_gb_s": probe.measure()}

    harness = Harness(record, [measure_bandwidth])
    try:
        for format in args.formats:
            run_format(args, format, harness, record)
    except KeyboardInterrupt:
        record.interrupted = True
        print("interrupted: writing the rounds so far", file=sys.stderr)
    harness.finish()
    record.cases = [case for case in record.cases if case.samples]
    if not record.cases:
        raise SystemExit("nothing was measured")
    write_json(record.to_dict(), args.output)
    print(as_text(peers_rows(record, ratios=True), left=2))
    print("\n".join(f"noise: {reason}" for reason in record.noise), file=sys.stderr)
    save(draw(record), args.output.with_suffix(".png"))
    print(f"wrote {args.output} and {args.output.with_suffix('.png')}")
    return 130 if record.interrupted else int(not record.passed)


if __name__ == "__main__":
    raise SystemExit(main())
