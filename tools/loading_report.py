"""How fast weights load, and what memory that takes: shards as large as a published model's are written and loaded.

    python tools/loading_report.py --output bench_results/loading.json

The shards hold random numbers and lie in a temporary folder (--folder says where), removed at the end. Each case runs
in a process of its own. Seconds are those of `load_model` (mapped weights cost no more than their names then), and of
reading each page of the model once afterwards, as the first tokens do. "warm": the files are in the page cache; "cold":
they were dropped from it (where the system lets files be dropped; `dropped_gb` says how much was). Beside them, the
same files read in order, cold, by plain reads: what the disk gives.

Memory is over what the process held before, at its peak: "anonymous" is the process's own; "file" are pages of the
mapped shards, which the system may take back at any time, as they are on disk.
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
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from qwen3fast import load_model
from qwen3fast.bench.environment import describe_environment, describe_run
from qwen3fast.bench.record import write_json
from qwen3fast.config import ModelConfig
from qwen3fast.model import build_on_meta

# What `load_model` is asked for.
CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "bfloat16, checked": {"check_weights": True},
    "float32": {"dtype": "float32"},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
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

    def stop(self) -> dict[str, float]:
        """GB over the start, at the peak of each kind."""
        self._ended.set()
        self.join()
        self._sample()
        return {kind: (self.peak_bytes[kind] - self.start_bytes[kind]) / 1e9 for kind in self.peak_bytes}

    def _sample(self) -> None:
        now = resident_bytes()
        self.peak_bytes = {kind: max(now[kind], peak) for kind, peak in self.peak_bytes.items()}


def resident_bytes() -> dict[str, int]:
    """Bytes of this process that are in memory: its own, and of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return {"anonymous": found["RssAnon"], "file": found["RssFile"]}


def load_here(folder: Path, case: str) -> dict[str, Any]:
    """Load in this process. Returns seconds and peaks of memory."""
    torch.empty(1).to(torch.bfloat16)  # what PyTorch sets up once is not the loader's
    memory = MemoryPeak()
    memory.start()
    started = time.perf_counter()
    model = load_model(folder, device="cpu", **CASES[case])
    loaded = time.perf_counter()
    for parameter in model.parameters():
        parameter.view(-1).view(torch.uint8)[::PAGE_BYTES].sum()
    ended = time.perf_counter()
    peak = memory.stop()
    return {
        "load_s": loaded - started,
        "read_s": ended - loaded,
        "result_gb": model.num_bytes() / 1e9,
        "peak_anonymous_gb": peak["anonymous"],
        "peak_file_gb": peak["file"],
    }


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
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def drop_from_cache(folder: Path) -> float:
    """Ask the system to forget the files' pages. Returns GB that its page cache lost meanwhile."""
    before = _cached_bytes()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return (before - _cached_bytes()) / 1e9


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


def run_apart(case: str, folder: Path) -> dict[str, Any]:
    """`load_here` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(load_here, (folder, case))


def measure(folder: Path, cases: list[str], rounds: int) -> list[dict[str, Any]]:
    """All cases, taking turns, first warm and then cold; the disk alone in between."""
    file_gb = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    results = []
    bar = tqdm(total=rounds * (2 * len(cases) + 1), desc="loading", unit="run")
    for _ in range(rounds):
        dropped = drop_from_cache(folder)
        seconds = read_in_order(folder)
        results.append({"case": "plain reads", "cache": "cold", "dropped_gb": dropped, "total_s": seconds})
        bar.update()
        for cache in ("warm", "cold"):
            for case in cases:
                bar.set_postfix_str(f"{case}, {cache}")
                dropped = drop_from_cache(folder) if cache == "cold" else 0.0
                sample = run_apart(case, folder)
                total = sample["load_s"] + sample["read_s"]
                results.append({"case": case, "cache": cache, "dropped_gb": dropped, "total_s": total, **sample})
                if cache == "cold":
                    read_in_order(folder)
                bar.update()
    bar.close()
    return [{**result, "gb_s": file_gb / result["total_s"]} for result in results]


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
    """Write the shards, measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="4b", help="a named shape [%(default)s]")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="[all]")
    parser.add_argument("--rounds", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the shards [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("bench_results/loading.json"), help="[%(default)s]")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("this tool reads /proc, which Linux has only")
    config = ModelConfig.named(args.model)
    check_space(config, args.cases, args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="qwen3fast-loading-") as temporary:
        folder = Path(temporary)
        write_shards(folder, config)
        results = measure(folder, args.cases, args.rounds)
    for r in results:
        line = f"{r['case']:>17} {r['cache']}: {r['total_s']:6.2f} s, {r['gb_s']:5.2f} GB/s"
        if "load_s" in r:
            line += f" ({r['load_s']:.2f} s in load_model); model {r['result_gb']:.2f} GB, "
            line += f"peak {r['peak_anonymous_gb']:.2f} GB anonymous, {r['peak_file_gb']:.2f} GB of files"
        print(line)
    record = {"suite": "loading", "run": describe_run("tools/loading_report.py"), "model": args.model}
    record |= {"environment": describe_environment(torch.device("cpu")), "results": results}
    write_json(record, args.output)


if __name__ == "__main__":
    main()
