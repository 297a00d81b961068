"""Speed of decoding with weights in the pages of their file and in huge pages (Linux).

    python benchmarks/huge_pages.py --model FOLDER --output bench_results/huge-pages.json

The checkpoint is loaded twice: one copy's weights and cache stay in the pages where the system has put them
(QWEN3FAST_HUGE_PAGES=0). Both generate greedily, in turns. How a file came into memory decides the size of its
pages, and whether they lie side by side; files that were written a moment ago lie best. `huge_bytes` is what lay in
huge pages.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import tables
import torch
from comparison import finish_without_picture

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.measure import make_prompts
from qwen3fast.bench.options import counts
from qwen3fast.bench.probes import BandwidthProbe
from qwen3fast.bench.record import Case, Record
from qwen3fast.checkpoint.save import save_model
from qwen3fast.kernels.cpu.huge_pages import VARIABLE, is_enabled

PAGES = {"0": "as mapped", "1": "huge"}  # by the variable
SIZES = Path("/proc/self/smaps")


def decode(generator: Generator, context: int, steps: int, case: Case) -> Measurement:
    """Return the mean seconds of the steps after a prompt of `context` tokens, a new one in each round."""
    [prompt] = make_prompts(generator.config.vocab_size, context, 1, seed=len(case.samples.get("step_s", ())))
    result = generator.generate(prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=steps + 1))
    return {"step_s": [result.metrics.decode_s / steps]}


def huge_bytes() -> int:
    """Return the bytes of this process that lie in huge pages, of files and others."""
    fields = (line.split() for line in SIZES.read_text(encoding="ascii", errors="replace").splitlines())
    return sum(int(words[1]) * 1024 for words in fields if words[0] in ("AnonHugePages:", "FilePmdMapped:"))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:0.6b", help="a folder; other models are saved first [%(default)s]")
    parser.add_argument("--contexts", type=counts, default="32,1000", help="prompt lengths [%(default)s]")
    parser.add_argument("--rounds", type=int, default=25, help="[%(default)s]")
    parser.add_argument("--new-tokens", type=int, default=24, help="steps timed per reply [%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads [one per core]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/huge-pages.json"), help="[%(default)s]")
    return parser.parse_args()


def measure(args: argparse.Namespace, folder: Path, harness: Harness) -> None:
    """Load both copies and measure them."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ))  # as it was, afterwards
        generators, facts = {}, {}
        for value, pages in PAGES.items():
            os.environ[VARIABLE] = value
            model, length, before = load_model(folder, "cpu"), max(args.contexts) + args.new_tokens + 1, huge_bytes()
            generator = Generator(model, max_seq_len=length, prefix_reuse=False, compile=True, threads=args.threads)
            generators[pages] = stack.enter_context(generator)
            generator.warmup()
            facts[pages] = {"huge_bytes": max(0.0, float(huge_bytes() - before))}
        for context in args.contexts:
            tasks = []
            for pages, generator in generators.items():
                case = Case({"pages": pages, "context": context, "batch_size": 1}, facts[pages])
                tasks.append(Task(case, partial(decode, generator, context, args.new_tokens, case)))
            harness.measure(tasks, args.rounds, f"{context} tokens")


def main() -> int:
    """Measure, print and write. Returns: the exit status."""
    args = parse()
    if not is_enabled():
        raise SystemExit("the system gives no huge pages; see /sys/kernel/mm/transparent_hugepage/enabled")
    device = torch.device("cpu")
    run = describe_run("python benchmarks/huge_pages.py")
    record = Record("huge-pages", run, describe_environment(device), {"name": Path(args.model).name})
    probe = BandwidthProbe(device)
    harness = Harness(record, [lambda: {"bandwidth_gb_s": probe.measure()}], rng=random.Random(0))
    with tempfile.TemporaryDirectory() as temporary, interruptible(record):
        folder = Path(args.model)
        if not folder.is_dir():
            folder = Path(temporary) / "model"
            save_model(load_model(args.model, "cpu"), folder)
        measure(args, folder, harness)
    harness.finish()
    return finish_without_picture(record, args.output, tables.huge_pages_rows, left=1)


if __name__ == "__main__":
    raise SystemExit(main())
