"""How fast weights load, and what memory that takes: shards as large as a published model's are written and loaded.

    python tools/loading_report.py --output benchmarks/results/loading-4b.json

The shards hold random numbers and lie in a temporary folder (--folder says where), removed at the end. Each run is a
process of its own, timed after its imports. Its seconds are those of `load_model` (mapped weights cost no more than
their names then), and of reading each page of the model once afterwards, as the first tokens do. "To the first token"
they are those of `load_model`, a Generator, compilation (of code that earlier runs left in Inductor's cache) and a
prompt of 32 tokens: cold, the files are read while that goes on. "warm": the files are in the page cache; "cold": they
were dropped from it (where the system lets files be dropped; `dropped_bytes` says how much was). Beside them, the same
files read in order, cold, by plain reads: what the disk gives.

Memory is over what the process held before, at its peak: "own" is the process's; "mapped" are pages of the shards,
which the system may take back at any time, as they are on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import struct
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
from huggingface_hub.utils import tqdm

from qwen3fast import Generator, SamplingParams, load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.harness import Harness, Sample, Task
from qwen3fast.bench.plot import save
from qwen3fast.bench.record import Case, Record, write_json
from qwen3fast.bench.table import as_text, table_rows
from qwen3fast.bench.view import picture, view_of
from qwen3fast.checkpoint import read_ahead
from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.model import build_on_meta
from qwen3fast.model.config import ModelConfig


@dataclass(frozen=True)
class Load:
    """What `load_model` is asked for, whether a Generator then runs to its first token, or all pages are read, and
    whether the files are read ahead meanwhile."""

    options: dict[str, Any] = field(default_factory=dict)
    to_first_token: bool = False
    reads_ahead: bool = True


CASES = {
    "bfloat16": Load(),
    "bfloat16, checked": Load({"check_weights": True}),
    "float32": Load({"dtype": "float32"}),
    "int8": Load({"quantization": "int8"}),
    "int4": Load({"quantization": "int4"}),
    "bfloat16 to the first token": Load(to_first_token=True),
    "bfloat16 to the first token, not read ahead": Load(to_first_token=True, reads_ahead=False),
    "int4 to the first token": Load({"quantization": "int4"}, to_first_token=True),
}
PLAIN_READS = "plain reads"
SHARD_BYTES = 4_000_000_000  # at most, as published
BLOCK_BYTES = 2**26
PAGE_BYTES = 4096


class MemoryPeak(threading.Thread):
    """Samples this process's resident memory, every 20 ms, until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self.start_bytes = self.peak_bytes = resident_bytes()

    def run(self) -> None:
        """The thread."""
        while not self._ended.wait(0.02):
            self._sample()

    def stop(self) -> dict[str, int]:
        """Bytes over the start, at the peak of each kind."""
        self._ended.set()
        self.join()
        self._sample()
        return {kind: self.peak_bytes[kind] - self.start_bytes[kind] for kind in self.peak_bytes}

    def _sample(self) -> None:
        now = resident_bytes()
        self.peak_bytes = {kind: max(now[kind], peak) for kind, peak in self.peak_bytes.items()}


def resident_bytes() -> dict[str, int]:
    """Bytes of this process that are in memory: its own, and of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return {"own_bytes": found["RssAnon"], "mapped_bytes": found["RssFile"]}


def load_here(folder: Path, load: Load) -> tuple[Sample, int]:
    """Load in this process. Returns seconds and peaks of memory, and the model's bytes."""
    torch.empty(1).to(torch.bfloat16)  # what PyTorch sets up once is not the loader's
    memory = MemoryPeak()
    memory.start()
    started = time.perf_counter()
    with nullcontext() if load.reads_ahead else patch.object(read_ahead, "populate"):
        model = load_model(folder, device="cpu", **load.options)
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


def write_shards(folder: Path, config: ModelConfig) -> None:
    """Write a checkpoint of a model's shape in bfloat16: a block of random numbers again and again."""
    block = (torch.randn(BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    values = memoryview(block.view(torch.uint8).numpy())
    shards: list[dict[str, Any]] = [{}]
    used = 0
    for name, parameter in build_on_meta(config).named_parameters():
        num_bytes = parameter.numel() * 2
        if used and used + num_bytes > SHARD_BYTES:
            shards.append({})
            used = 0
        entry = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [used, used + num_bytes]}
        shards[-1][name] = entry
        used += num_bytes
    weight_map = {}
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for shard in shards for entry in shard.values())
    bar = tqdm(total=total, desc="writing", unit="B", unit_scale=True)
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        header = json.dumps(shard).encode()
        header += b" " * (-len(header) % 8)
        left = max(entry["data_offsets"][1] for entry in shard.values())
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            while left:
                left -= (done := file.write(values[: min(left, BLOCK_BYTES)]))
                bar.update(done)
            os.fsync(file.fileno())
    bar.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CheckpointConfig(config).to_dict()))


def drop_from_cache(folder: Path) -> int:
    """Ask the system to forget the files' pages. Returns bytes that its page cache lost meanwhile."""
    before = _cached_bytes()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return before - _cached_bytes()


def _cached_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Cached:")) * 1024


def read_in_order(folder: Path) -> float:
    """Read all shards with plain reads. Returns seconds."""
    buffer = bytearray(2**24)
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def run_apart(folder: Path, load: Load) -> tuple[Sample, int]:
    """`load_here` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(load_here, (folder, load))


def tasks_of(folder: Path, names: list[str]) -> list[Task]:
    """Plain reads, then each case from warm files, then from cold ones."""
    file_bytes = float(sum(path.stat().st_size for path in folder.glob("*.safetensors")))

    def read_plainly() -> Sample:
        return {"dropped_bytes": drop_from_cache(folder), "seconds": read_in_order(folder)}

    def run(load: Load, case: Case, is_cold: bool) -> Sample:
        if is_cold:
            dropped = drop_from_cache(folder)
        sample, case.facts["model_bytes"] = run_apart(folder, load)
        read_in_order(folder)  # warm again, whatever was pushed out meanwhile
        return sample | {"dropped_bytes": dropped} if is_cold else sample

    tasks = [Task(Case({"cache": "cold", "case": PLAIN_READS}, {"file_bytes": file_bytes}), read_plainly, False)]
    for cache in ("warm", "cold"):
        for name in names:
            load = CASES[name]
            case = Case({"cache": cache, "case": name}, {} if load.to_first_token else {"file_bytes": file_bytes})
            tasks.append(Task(case, partial(run, load, case, cache == "cold"), False))
    return tasks


def check_space(config: ModelConfig, cases: list[str], folder: Path) -> None:
    """Raises: SystemExit if the disk or the memory is too small for the shape."""
    disk_bytes, free = config.num_parameters * 2, shutil.disk_usage(folder).free
    if free < disk_bytes * 1.1:
        raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, the shards take {disk_bytes / 1e9:.1f} GB")
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    need = config.num_parameters * (4 if "float32" in cases else 2) * 1.1
    if available < need:
        raise SystemExit(
            f"{available / 1e9:.1f} GB of memory are available, {need / 1e9:.1f} are needed; choose a smaller --model, "
            "or --cases without float32"
        )


def main() -> None:
    """Write the shards, measure, print, and write the record and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="4b", help="a named shape [%(default)s]")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="[all]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the shards [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/loading.json"), help="[%(default)s]")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("this tool reads /proc, which Linux has only")
    config = ModelConfig.named(args.model)
    check_space(config, args.cases, args.folder)
    run, environment = describe_run("python tools/loading_report.py"), describe_environment(torch.device("cpu"))
    record = Record("loading", run, environment, {"name": f"random:{args.model}", "parameters": config.num_parameters})
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="qwen3fast-loading-") as temporary:
        folder = Path(temporary)
        write_shards(folder, config)
        for name in args.cases:
            if CASES[name].to_first_token:
                run_apart(folder, CASES[name])  # fills the caches of compiled code
        harness = Harness(record)
        try:
            harness.measure(tasks_of(folder, args.cases), args.rounds, "loading")
        except KeyboardInterrupt:
            record.interrupted = True
        harness.finish()
    record.cases = [case for case in record.cases if case.samples]
    if not record.cases:
        raise SystemExit("interrupted before anything was measured")
    write_json(record.to_dict(), args.output)
    print(as_text(table_rows(record, view_of(record).columns), left=2))
    save(picture(record), args.output.with_suffix(".png"))
    print(f"wrote {args.output} and {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
