"""Speed of qwen3fast beside other engines on the same random weights in Qwen3-0.6B's shape, taking turns.

    python benchmarks/compare_peers.py --setup       # environments and converted weights, once (builds: some minutes)
    python benchmarks/compare_peers.py --output benchmarks/results/cpu-peers.json

Every engine is a process of its own that loads its model once; all of one weight format stay loaded while they take
turns (A B C A B C ...), each for one reply, so that a noisy machine treats all alike; the waiting ones sleep, which is
measured first. All get the same prompts, new ones each round, so that no engine can reuse an earlier prompt's keys and
values. Decode speed is at a context's length; prefill is timed up to the first token. Before the rounds, each
engine's greedy tokens are held against the bfloat16 model's logits: those in bfloat16 or fp16 must agree, the
rounded ones are free to differ, by a gap that the record keeps. Writes JSON; Ctrl-C keeps the rounds so far.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from peers import llama_cpp, onnxruntime_genai, openvino_genai, ours
from peers.checkpoint import SOURCE, write_checkpoint
from peers.protocol import CACHE, FORMATS, Peer, Variant, Worker

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.measure import check_tokens, make_prompts
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import write_json
from qwen3fast.threads import use_threads

PEERS = {module.PEER.name: module.PEER for module in (llama_cpp, openvino_genai, onnxruntime_genai)}
OURS = "qwen3fast"
CHECK_PROMPT, CHECK_STEPS = 40, 11
IDLE_S = 1.0  # how long waiting workers are watched
PAUSE_S = 0.05  # before each reply: the threads of the engine before may spin for a moment after their work


@dataclass
class Case:
    """One engine at one prompt length, all rounds. steps: timed after the first token; 0 where only prefill counts."""

    engine: str
    format: str
    length: int
    steps: int
    bandwidth_gb_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The samples, and speeds from their medians."""
        speeds = {"prefill_tok_s": self.length / median(self.prefill_s)}
        if self.steps:
            speeds["decode_tok_s"] = self.steps / median(self.decode_s)
        return {**vars(self), **speeds}


def selected(peers: list[str], format: str) -> Iterator[tuple[str, Peer | None, Variant]]:
    """All engines of a format, ours (without a Peer) first, and what each is called."""
    for variant in ours.VARIANTS:
        if variant.format == format:
            yield OURS + (" int8 cache" if variant.name.endswith(ours.INT8_CACHE) else ""), None, variant
    for peer in (PEERS[name] for name in peers):
        for variant in peer.variants:
            if variant.format == format:
                yield f"{peer.name} {variant.name}", peer, variant


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
    """A warm worker for each engine of the format; the stack ends them."""
    max_seq_len = max(*args.contexts, args.prefill) + args.new_tokens + 1
    workers = {}
    for name, peer, variant in tqdm(list(selected(args.peers, format)), desc=f"loading {format}", unit="engine"):
        python, module = (peer.python, peer.module) if peer else (Path(sys.executable), "ours")
        model = peer.model_path(variant) if peer else args.weights / variant.folder
        worker = Worker(f"{name} {format}", python, module, variant.name, model, args.threads, max_seq_len)
        stack.callback(worker.close)
        for length in {*args.contexts, args.prefill}:
            worker.generate(make_prompts(args.vocab_size, length, 1, seed=length)[0], 2)
        workers[name] = worker
    return workers


def idle_share(workers: dict[str, Worker]) -> dict[str, float]:
    """Processors that each waiting worker keeps busy: about 0 if its threads sleep."""
    time.sleep(0.5)
    before = {name: worker.cpu_s() for name, worker in workers.items()}
    time.sleep(IDLE_S)
    return {name: (worker.cpu_s() - before[name]) / IDLE_S for name, worker in workers.items()}


def measure(args: argparse.Namespace, workers: dict[str, Worker], cases: list[Case], probe: BandwidthProbe) -> None:
    """All rounds of one format's cases."""
    bar = tqdm(total=args.rounds * len(cases), desc=f"measuring {cases[0].format}", unit="reply")
    for round_number in range(args.rounds):
        length = None
        for case in cases:
            if case.length != length:  # the engines' turns at one length follow one another
                length = case.length
                probe.samples.clear()
                probe.measure(3)
                [prompt] = make_prompts(args.vocab_size, length, 1, seed=1_000 * (round_number + 1) + length)
            bar.set_postfix_str(f"{case.engine}, {length} tokens")
            time.sleep(PAUSE_S)
            reply = workers[case.engine].generate(prompt, case.steps)
            assert len(reply["token_ids"]) == case.steps + 1, f"{case.engine} stopped early"
            case.bandwidth_gb_s.append(probe.gb_s)
            case.prefill_s.append(reply["prefill_s"])
            case.decode_s.append(reply["decode_s"])
            bar.update()
    bar.close()


def run_format(args: argparse.Namespace, format: str, record: dict[str, Any], cases: list[Case]) -> None:
    """Load, check and measure all engines of a format; fills `record` and `cases` as it goes."""
    plain = load_model(args.weights / "bf16", "cpu")
    [prompt] = make_prompts(args.vocab_size, CHECK_PROMPT, 1, seed=1)
    with ExitStack() as stack:
        workers = start_workers(args, format, stack)
        idle = idle_share(workers)
        for name, _, variant in selected(args.peers, format):
            verdict = check_tokens(plain, [prompt], [workers[name].generate(prompt, CHECK_STEPS)["token_ids"]])
            passed = verdict.passed if format == "bf16" else None
            record["engines"].append(
                {
                    "engine": name, "format": format, "computes": variant.computes, "facts": workers[name].facts,
                    "versions": workers[name].versions, "idle_processors": idle[name],
                    "check": {**vars(verdict), "passed": passed},
                }
            )  # fmt: skip
            print(
                f"{format} {name}: {verdict.exact} of {verdict.tokens} tokens exact, worst gap {verdict.worst_gap:.2%}"
                f"{' WRONG' if passed is False else ''}; idle: {idle[name]:.0%} of a processor"
            )
        del plain
        shapes = [(n, args.new_tokens) for n in args.contexts] + [(args.prefill, 0)]
        new = [Case(name, format, length, steps) for length, steps in shapes for name in workers]
        cases += new
        measure(args, workers, new, BandwidthProbe(torch.device("cpu")))


def as_table(args: argparse.Namespace, cases: list[dict[str, Any]]) -> str:
    """Medians: decode tokens/s at each context, prefill tokens/s, and in brackets ours over the engine's."""
    columns = [("decode_tok_s", n) for n in args.contexts] + [("prefill_tok_s", args.prefill)]
    head = [f"{'decode' if key == 'decode_tok_s' else 'prefill'} @{n:,}" for key, n in columns]
    speeds = {
        (c["format"], c["engine"], key, c["length"]): c[key]
        for c in cases
        for key in ("decode_tok_s" if c["steps"] else "prefill_tok_s",)
    }
    lines = [f"{'format':7}{'engine':28}" + "".join(f"{text:>20}" for text in head)]
    for format, engine in dict.fromkeys((c["format"], c["engine"]) for c in cases):
        line = f"{format:7}{engine:28}"
        for key, n in columns:
            speed, own = speeds.get((format, engine, key, n)), speeds.get((format, OURS, key, n))
            line += f"{f'{speed:.1f} ({own / speed:.2f}x)' if speed and own else '-':>20}"
        lines.append(line)
    return "\n".join(lines)


def words(text: str) -> list[str]:
    """An option's comma-separated words, none twice."""
    return list(dict.fromkeys(part for part in text.split(",") if part))


def counts(text: str) -> list[int]:
    """An option's comma-separated positive numbers. Raises: ValueError, which argparse reports."""
    numbers = [int(part) for part in words(text)]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def parse() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=words, default=",".join(PEERS), help="comma-separated [%(default)s]")
    parser.add_argument("--formats", type=words, default=",".join(FORMATS), help="comma-separated [%(default)s]")
    parser.add_argument("--contexts", type=counts, default="32,1000", help="prompt lengths of decode [%(default)s]")
    parser.add_argument("--prefill", type=int, default=512, help="prompt length of prefill [%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=24, help="steps timed in each reply [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads of every engine [one a core]")
    parser.add_argument("--weights", type=Path, default=CACHE / "random-0.6b", help="folder [%(default)s]")
    parser.add_argument("--setup", action="store_true", help="make what is missing, and measure nothing")
    parser.add_argument("--output", type=Path, default=Path("bench_results/cpu-peers.json"), help="[%(default)s]")
    args = parser.parse_args()
    for option, known in (("peers", PEERS), ("formats", FORMATS)):
        if unknown := set(getattr(args, option)) - set(known):
            parser.error(f"unknown in --{option}: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if args.prefill in args.contexts:
        parser.error(f"--prefill {args.prefill} is among --contexts; choose another length")
    return args


def main() -> None:
    """Set up, or measure, print and write."""
    args = parse()
    use_threads(args.threads)
    args.threads = torch.get_num_threads()
    if args.setup:
        set_up(args)
        return
    require_set_up(args)
    config = load_model(args.weights / "bf16", "cpu").config
    args.vocab_size = config.vocab_size
    cases: list[Case] = []
    record: dict[str, Any] = {
        "suite": "compare_peers",
        "run": describe_run("python benchmarks/compare_peers.py"),
        "environment": describe_environment(torch.device("cpu")),
        "model": SOURCE,
        "engines": [],
        "interrupted": False,
    }
    try:
        for format in args.formats:
            run_format(args, format, record, cases)
    except KeyboardInterrupt:
        record["interrupted"] = True
        print("interrupted: writing the rounds so far", file=sys.stderr)
    record["cases"] = [case.to_dict() for case in cases if case.prefill_s]
    if not record["cases"]:
        raise SystemExit("nothing was measured")
    record["bandwidth_gb_s"] = median(gb_s for case in record["cases"] for gb_s in case["bandwidth_gb_s"])
    print(as_table(args, record["cases"]))
    write_json(record, args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
