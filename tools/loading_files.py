"""Files for tools/loading_report.py: a checkpoint of a model's shape, dropped from the page cache, or read in order."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from qwen3fast.checkpoint.hf_config import CheckpointConfig
from qwen3fast.model import build_on_meta
from qwen3fast.model.config import ModelConfig

SHARD_BYTES = 4_000_000_000  # at most, as in published checkpoints
BLOCK_BYTES = 2**26


def write_shards(folder: Path, config: ModelConfig, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint of a model's shape in bfloat16: one block of random numbers again and again."""
    block = (torch.randn(BLOCK_BYTES // 2, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    values = memoryview(block.view(torch.uint8).numpy())
    shards = plan_shards(config, shard_bytes)
    weight_map = {}
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for shard in shards for entry in shard.values())
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True) as bar:
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(shard, name)
            with (folder / name).open("wb") as file:
                _write_shard(file, shard, values, bar)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CheckpointConfig(config).to_dict()))


def plan_shards(config: ModelConfig, shard_bytes: int) -> list[dict[str, Any]]:
    """Return the headers of the shards, each with the tensors that fit."""
    shards: list[dict[str, Any]] = [{}]
    used = 0
    for name, parameter in build_on_meta(config).named_parameters():
        num_bytes = parameter.numel() * 2
        if used and used + num_bytes > shard_bytes:
            shards.append({})
            used = 0
        entry = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [used, used + num_bytes]}
        shards[-1][name] = entry
        used += num_bytes
    return shards


def _write_shard(file: BinaryIO, shard: dict[str, Any], values: memoryview, bar: tqdm) -> None:
    header = json.dumps(shard).encode()
    header += b" " * (-len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header)
    left = max(entry["data_offsets"][1] for entry in shard.values())
    while left:
        left -= (done := file.write(values[: min(left, BLOCK_BYTES)]))
        bar.update(done)
    file.flush()
    os.fsync(file.fileno())


def drop_from_cache(folder: Path) -> int:
    """Ask the system to drop the files from its page cache. Returns: the bytes by which the cache shrank."""
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
    """Read all shards with plain reads. Returns: the seconds."""
    buffer = bytearray(2**24)
    started = perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return perf_counter() - started


def check_space(config: ModelConfig, cases: list[str], folder: Path) -> None:
    """Raise SystemExit if the disk or the memory is too small for the shape."""
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
