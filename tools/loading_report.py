"""Time and memory of loading weights: shards as large as a published model's are written and loaded.

    python tools/loading_report.py --output benchmarks/results/loading-4b.json

The shards hold random numbers in a temporary folder (below --folder) that is removed at the end. Each run is a process
of its own, timed after its imports: `load_s` is the time of `load_model` (mapped weights are not read then), `seconds`
includes reading each page of the model once, as the first tokens do. Runs "to the first token" build a Generator and
compute a prompt of 32 tokens instead, with compiled code from earlier runs; when cold, the files are read meanwhile.
"int4, first load" calibrates, as `Generator.from_pretrained` does, and "int4, later load" reads what that load kept.
"warm": the files are in the page cache; "cold": they were dropped from it, where the system allows that
(`dropped_bytes` is how much). Beside them, the same cold files are read in order with plain reads: the disk's speed.

Memory is the peak over what the process held before: "own" is the process's; "mapped" are pages of the shards, which
the system may drop at any time, since they are on disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from loading_files import check_space, drop_from_cache, read_in_order, write_shards

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Measurement, Task, interruptible
from qwen3fast.bench.plot import save
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import as_text, table_rows
from qwen3fast.bench.view import picture, view_of
from qwen3fast.calibrated import CalibratedLoader
from qwen3fast.checkpoint import kept, read_ahead
from qwen3fast.checkpoint.loaders import Loader
from qwen3fast.model import Qwen3
from qwen3fast.model.config import ModelConfig

COPIES = "copies"  # the folder of calibrated copies, beside the shards


@dataclass(frozen=True)
class Load:
    """A way to load: options of `load_model`, then all pages or the first token, with or without reading ahead.

    calibrates: int4 as by `Generator.from_pretrained`, calibrated and kept: a first load (True), or a later one.
    """

    options: dict[str, Any] = field(default_factory=dict)
    to_first_token: bool = False
    reads_ahead: bool = True
    calibrates: bool | None = None

    def load(self, folder: Path) -> Qwen3:
        """Return the model of a checkpoint, on the CPU."""
        if self.calibrates is None:
            return load_model(folder, device="cpu", calibrate=False, **self.options)
        return CalibratedLoader(folder, Loader(torch.device("cpu"), quantization="int4"), calibrate=True).load()

    def prepare(self, folder: Path) -> None:
        """Delete the calibrated copies before a first load; make one before a later load."""
        if self.calibrates:
            shutil.rmtree(folder / COPIES, ignore_errors=True)
        elif self.calibrates is False and not (folder / COPIES).exists():
            self.load(folder)


CASES = {
    "bfloat16": Load(),
    "bfloat16, checked": Load({"check_weights": True}),
    "float32": Load({"dtype": "float32"}),
    "int8": Load({"quantization": "int8"}),
    "int4": Load({"quantization": "int4"}),
    "int4, first load": Load(calibrates=True),
    "int4, later load": Load(calibrates=False),
    "bfloat16 to the first token": Load(to_first_token=True),
    "bfloat16 to the first token, not read ahead": Load(to_first_token=True, reads_ahead=False),
    "int4 to the first token": Load({"quantization": "int4"}, to_first_token=True),
}
WARM_ONLY = {name for name, load in CASES.items() if load.calibrates is not None}  # the disk hardly matters
PLAIN_READS = "plain reads"
PAGE_BYTES = 4096


class MemoryPeak(threading.Thread):
    """A thread that samples this process's resident memory every 20 ms until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self.start_bytes = self.peak_bytes = resident_bytes()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._ended.wait(0.02):
            self._sample()

    def stop(self) -> dict[str, int]:
        """Return the bytes over the start, at the peak of each kind."""
        self._ended.set()
        self.join()
        self._sample()
        return {kind: self.peak_bytes[kind] - self.start_bytes[kind] for kind in self.peak_bytes}

    def _sample(self) -> None:
        now = resident_bytes()
        self.peak_bytes = {kind: max(now[kind], peak) for kind, peak in self.peak_bytes.items()}


def resident_bytes() -> dict[str, int]:
    """Return the resident bytes of this process: its own, and mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return {"own_bytes": found["RssAnon"], "mapped_bytes": found["RssFile"]}


def load_here(folder: Path, load: Load) -> tuple[Measurement, int]:
    """Load in this process. Returns: seconds and peaks of memory, and the model's bytes."""
    with patch.object(kept, "kept_root", lambda: folder / COPIES):
        load.prepare(folder)
        return _measure_here(folder, load)


def _measure_here(folder: Path, load: Load) -> tuple[Measurement, int]:
    torch.empty(1).to(torch.bfloat16)  # PyTorch's own setup is not the loader's
    memory = MemoryPeak()
    memory.start()
    started = time.perf_counter()
    with nullcontext() if load.reads_ahead else patch.object(read_ahead, "populate"):
        model = load.load(folder)
    loaded = time.perf_counter()
    if load.to_first_token:
        with Generator(model, max_seq_len=64) as generator:
            for _ in generator.stream(list(range(32)), SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)):
                ended = time.perf_counter()
    else:
        for parameter in model.parameters():
            parameter.view(-1).view(torch.uint8)[::PAGE_BYTES].sum()
        ended = time.perf_counter()
    return {"seconds": ended - started, "load_s": loaded - started, **memory.stop()}, model.num_bytes()


def run_apart(folder: Path, load: Load) -> tuple[Measurement, int]:
    """Run `load_here` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(load_here, (folder, load))


def tasks_of(folder: Path, names: list[str]) -> list[Task]:
    """Return tasks: plain reads, then each case with warm files, then with cold ones."""
    file_bytes = float(sum(path.stat().st_size for path in folder.glob("*.safetensors")))

    def read_plainly() -> Measurement:
        return {"dropped_bytes": drop_from_cache(folder), "seconds": read_in_order(folder)}

    def run(load: Load, case: Case, is_cold: bool) -> Measurement:
        if is_cold:
            dropped = drop_from_cache(folder)
        sample, case.facts["model_bytes"] = run_apart(folder, load)
        read_in_order(folder)  # warm again, whatever was evicted meanwhile
        return sample | {"dropped_bytes": dropped} if is_cold else sample

    tasks = [Task(Case({"cache": "cold", "case": PLAIN_READS}, {"file_bytes": file_bytes}), read_plainly, False)]
    for cache in ("warm", "cold"):
        for name in names:
            if cache == "cold" and name in WARM_ONLY:
                continue
            load = CASES[name]
            is_by_bytes = not load.to_first_token and name not in WARM_ONLY
            case = Case({"cache": cache, "case": name}, {"file_bytes": file_bytes} if is_by_bytes else {})
            tasks.append(Task(case, partial(run, load, case, cache == "cold"), False))
    return tasks


def measure(args: argparse.Namespace, config: ModelConfig) -> Record:
    """Write the shards and measure. Returns: the record, without cases that have no sample."""
    run, environment = describe_run("python tools/loading_report.py"), describe_environment(torch.device("cpu"))
    record = Record("loading", run, environment, {"name": f"random:{args.model}", "parameters": config.num_parameters})
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="qwen3fast-loading-") as temporary, interruptible(record):
        folder = Path(temporary)
        write_shards(folder, config)
        for name in args.cases:
            if CASES[name].to_first_token:
                run_apart(folder, CASES[name])  # fills the caches of compiled code
        harness = Harness(record)
        harness.measure(tasks_of(folder, args.cases), args.rounds, "loading")
        harness.finish()
    record.cases = [case for case in record.cases if case.samples]
    return record


def main() -> int:
    """Measure, print, and write the record and its picture. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="4b", help="a named shape [%(default)s]")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="[all]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the shards [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/loading.json"), help="[%(default)s]")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("this tool needs Linux: it reads /proc")
    config = ModelConfig.named(args.model)
    check_space(config, args.cases, args.folder)
    record = measure(args, config)
    if not record.cases:
        raise SystemExit("interrupted before anything was measured")
    write_json(record.to_dict(), args.output)
    print(as_text(table_rows(record, view_of(record).columns), left=2))
    save(picture(record), args.output.with_suffix(".png"))
    print(f"wrote {args.output} and {args.output.with_suffix('.png')}")
    return 130 if record.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
