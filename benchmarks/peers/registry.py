"""The peers that a comparison knows: which engines take part, and their setup."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from tables import OURS

from peers import ctranslate2, llama_cpp, onnxruntime_genai, openvino_genai, ours, sglang, transformers, vllm
from peers.checkpoint import write_checkpoint
from peers.protocol import Peer, Variant
from qwen3fast.bench.environment import cpu_flags
from qwen3fast.bench.text import visible

ALL_PEERS = (
    transformers.PEER,
    llama_cpp.PEER,
    llama_cpp.PEER_WITHOUT_AMX,
    llama_cpp.PEER_OF_AVX2,
    openvino_genai.PEER,
    onnxruntime_genai.PEER,
    ctranslate2.PEER,
    vllm.PEER,
    sglang.PEER,
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in ALL_PEERS}


def selected(peers: list[str], format: str) -> Iterator[tuple[str, Peer | None, Variant]]:
    """Yield all engines of a format with their names; ours, which has no Peer, comes first."""
    for variant in ours.VARIANTS:
        if variant.format == format:
            yield OURS + ours.LABELS.get(variant.name, ""), None, variant
    for peer in (PEERS[name] for name in peers):
        for variant in peer.variants:
            if variant.format == format:
                yield f"{peer.name} {variant.name}", peer, variant


def split_by_device(peers: list[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Return the peers that run on a device, and the reasons why the others do not."""
    reasons = {}
    for name in peers:
        peer = PEERS[name]
        if device not in peer.devices:
            reasons[name] = f"not run: needs {' or '.join(peer.devices)}, this comparison is on {device}"
        elif peer.cpu_flag and peer.cpu_flag not in cpu_flags():
            reasons[name] = f"not run: only of interest on processors with {peer.cpu_flag}"
        elif peer.cpu_level and peer.cpu_level != os.environ.get("QWEN3FAST_CPU_LEVEL"):
            reasons[name] = f"not run: only of interest with QWEN3FAST_CPU_LEVEL={peer.cpu_level}"
    return [name for name in peers if name not in reasons], reasons


def set_up(args: argparse.Namespace) -> int:
    """Make all that the measurement needs and that is missing. Returns: the exit status, 1 if a peer failed."""
    if args.gguf is None:
        write_checkpoint(args.model, args.weights)
    status = 0
    for peer in (PEERS[name] for name in args.peers):
        tell(f"{peer.name}: environment in {peer.python.parent.parent}")
        try:
            peer.setup()
            for variant in peer.variants:
                if args.gguf is None and (variant.format in args.formats or variant.name == peer.source):
                    tell(f"{peer.name}: {variant.name}")
                    peer.convert(variant, args.weights)
        except (OSError, subprocess.SubprocessError) as err:  # the others are worth setting up
            tell(f"FAILED: {peer.name}: {err}", sys.stderr)
            status = 1
    return status


def require_set_up(args: argparse.Namespace) -> None:
    """Raise SystemExit, naming what is missing and the command that makes it, unless all is set up."""
    missing = [
        f"{name} {format}"
        for format in args.formats
        for name, peer, variant in selected(args.peers, format)
        if not (
            peer.is_ready(variant, args.weights)
            if peer
            else args.gguf or (ours.model_path(variant, args.weights) / "config.json").is_file()
        )
    ]
    if missing:
        command = f"python benchmarks/compare_peers.py --setup --peers {','.join(args.peers)}"
        weights = f"--weights {shlex.quote(str(args.weights))}"
        what = f"--model {args.model} --formats {','.join(args.formats)} {weights}"
        if args.gguf is not None:
            what = f"--gguf {shlex.quote(str(args.gguf))}"
        raise SystemExit(f"not set up: {', '.join(missing)}; run: {command} {what}")


def tell(text: str, file: Any = None) -> None:
    """Print at once, also where standard output is a file."""
    print(visible(text, keep="\n"), file=file, flush=True)
