"""Speed of prefill and decode while another program computes on some of the cores (Linux).

    python benchmarks/shared_cores.py --output bench_results/shared-cores.json

A model with random weights generates greedily, alone and beside programs that only compute: one that is kept on the
first core, one on any core, and one per core. `taken` is their share of the processor meanwhile. The speed that is lost
should be about that: at most 1.3 times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import tables
import torch
from comparison import finish_without_picture

from qwen3fast import Generator, SamplingParams
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.measure import make_prompts
from qwen3fast.bench.record import Case, Record
from qwen3fast.engine.threads import SparedThreads

PROMPT_TOKENS = 32  # before decoding
SETTLE_S = 0.3  # until the system has spread threads over cores
COMPUTES = "import os, sys; os.sched_setaffinity(0, eval(sys.argv[1])); print(flush=True)\nwhile True: pass"


def others_of(cpus: set[int]) -> dict[str, list[set[int]]]:
    """Return the cases: for each, the CPUs that each of the other programs may use."""
    return {"none": [], "one, on one core": [{min(cpus)}], "one": [cpus], "one per core": [cpus] * len(cpus)}


@contextmanager
def running(programs: list[set[int]]) -> Iterator[list[int]]:
    """Run programs that compute, each on some CPUs. Yields: their process ids."""
    processes = []
    try:
        for cpus in programs:
            command = [sys.executable, "-c", COMPUTES, repr(cpus)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in processes:
            assert process.stdout is not None and process.stdout.readline(), "the program must run"
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def processor_seconds(pid: int) -> float:
    """Return the time that a process has spent on a processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def generate(generator: Generator, prompt: list[int], new_tokens: int, programs: list[set[int]]) -> Measurement:
    """Return the seconds of a prompt's prefill or of the steps after it, and the other programs' share of all CPUs.

    new_tokens: steps to time; 0 means the prefill. All threads are tried first, whatever the replies before have found.
    """
    params = SamplingParams(temperature=0, max_tokens=new_tokens + 1, ignore_eos=True)
    layers = generator.debug.engine.parts.decode_layers
    if layers is not None:
        layers.spared = SparedThreads()
    with running(programs) as pids:
        time.sleep(SETTLE_S)
        used, started = sum(map(processor_seconds, pids)), time.perf_counter()
        metrics = generator.generate(prompt, params).metrics
        spent, whole = sum(map(processor_seconds, pids)) - used, time.perf_counter() - started
    seconds = metrics.decode_s if new_tokens else metrics.prefill_s
    return {"seconds": seconds, "taken": spent / whole / len(os.sched_getaffinity(0))}


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="[%(default)s]")
    parser.add_argument("--formats", default="plain,int8,int4", help="comma-separated [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=128, help="timed per reply [%(default)s]")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the timed prefill [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [one per core]")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="run the plain forms")
    parser.add_argument("--output", type=Path, default=Path("bench_results/shared-cores.json"), help="[%(default)s]")
    return parser.parse_args()


def main() -> int:
    """Measure, print and write. Returns: the exit status."""
    args = parse()
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("this program needs Linux: it keeps another one on a core")
    run, environment = describe_run("python benchmarks/shared_cores.py"), describe_environment(torch.device("cpu"))
    record = Record("shared-cores", run, environment, {"name": args.model})
    harness = Harness(record)
    with interruptible(record):
        for format in args.formats.split(","):
            quantization = None if format == "plain" else format
            options = {
                "max_seq_len": max(PROMPT_TOKENS + args.new_tokens, args.prompt_tokens) + 1,
                "prefix_reuse": False,
                "compile": args.compile,
                "threads": args.threads,
            }
            with Generator.from_pretrained(args.model, device="cpu", quantization=quantization, **options) as generator:
                generator.warmup()
                tasks = []
                for what, new_tokens in (("prefill", 0), ("decode", args.new_tokens)):
                    size = PROMPT_TOKENS if new_tokens else args.prompt_tokens
                    prompt = make_prompts(generator.config.vocab_size, size, 1)[0]
                    for others, programs in others_of(os.sched_getaffinity(0)).items():
                        labels = {"format": format, "what": what, "others": others}
                        case = Case(labels, {"tokens": new_tokens or size})
                        tasks.append(Task(case, partial(generate, generator, prompt, new_tokens, programs)))
                harness.measure(tasks, args.rounds, format)
    harness.finish()
    return finish_without_picture(record, args.output, tables.shared_cores_rows, left=3)


if __name__ == "__main__":
    raise SystemExit(main())
