"""The description and setup of a peer, and the protocol of its worker process, shared by all adapters.

A worker holds one loaded model. It reads one JSON object per line, {"prompt": ids, "steps": n}: compute the prompt,
choose the first token greedily, then n more, each from the one before. It answers {"prefill_s", "decode_s",
"token_ids"}: prefill_s ends with the first token, decode_s covers the n steps. The worker takes the times itself.

Adapters also run in their peer's own environment, so this file imports only the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

CACHE = Path.home() / ".cache" / "qwen3fast" / "peers"
FORMATS = ("bf16", "int8", "int4")
GGUF = "gguf"  # the format of engines that read the same GGUF file
CHECKPOINT = "checkpoint"  # the name of weights that are the common checkpoint itself
BENCHMARKS = Path(__file__).resolve().parent.parent


class Engine(Protocol):
    """A loaded model of a peer."""

    facts: dict[str, Any]  # instructions in use, precisions, and the like

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """Return (prefill_s, decode_s, steps + 1 greedy token ids). Nothing of an earlier call may be reused."""


@dataclass(frozen=True)
class Variant:
    """A way to run a peer.

    computes: precision of weights, activations and kv_cache, in words, for the record.
    weights: name of the variant whose converted weights it uses; "" for its own. max_steps: timed steps per reply, for
    variants whose steps take seconds.
    """

    format: str
    name: str
    computes: dict[str, str]
    weights: str = ""
    max_steps: int | None = None

    @property
    def folder(self) -> str:
        """The folder of its weights."""
        return self.weights or self.name


@dataclass(frozen=True)
class Peer:
    """An engine with an environment of its own.

    module: the adapter. requirements: for pip, with pip_environment and pip_options; pip_remove: packages to uninstall
    again. packages: whose versions are recorded. devices: on which it takes part. cpu_flag: an instruction set without
    which there is no reason to run it. cpu_level: the level that QWEN3FAST_CPU_LEVEL must pin, of a peer built for it.
    source: the weights that others are made of.
    """

    name: str
    module: str
    requirements: tuple[str, ...]
    packages: tuple[str, ...]
    variants: tuple[Variant, ...]
    pip_environment: dict[str, str] = field(default_factory=dict)
    pip_options: tuple[str, ...] = ()
    pip_remove: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    cpu_flag: str = ""
    cpu_level: str = ""
    source: str = ""

    @property
    def python(self) -> Path:
        """The interpreter of the peer's environment."""
        return CACHE / self.name / "env" / "bin" / "python"

    def model_path(self, variant: Variant, weights: Path) -> Path:
        """Return where a variant's converted weights are. weights: the folder of a model's weights, or a GGUF file."""
        return weights if variant.format == GGUF else weights / self.name / variant.folder

    def setup(self) -> None:
        """Create the environment if it is missing. Building may take minutes."""
        done = CACHE / self.name / "env" / "installed"
        if done.is_file() and done.read_text() == repr(self.requirements):
            return
        venv.create(self.python.parent.parent, with_pip=True)
        command: list[str | Path] = [self.python, "-m", "pip", "install", *self.pip_options, *self.requirements]
        subprocess.run(command, check=True, env=os.environ | self.pip_environment)
        if self.pip_remove:
            subprocess.run([self.python, "-m", "pip", "uninstall", "--yes", *self.pip_remove], check=True)
        done.write_text(repr(self.requirements))

    def convert(self, variant: Variant, weights: Path) -> None:
        """Write the variant's weights if they are missing. An interrupted conversion leaves nothing behind."""
        target = self.model_path(variant, weights)
        if target.is_dir():
            return
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        command: list[str | Path] = [
            self.python,
            "-m",
            f"peers.{self.module}",
            "convert",
            target.name,
            weights / "bf16",
            unfinished,
        ]
        subprocess.run(command, check=True, env=environment())
        unfinished.rename(target)

    def is_ready(self, variant: Variant, weights: Path) -> bool:
        """Return True if environment and weights exist."""
        return (CACHE / self.name / "env" / "installed").is_file() and self.model_path(variant, weights).exists()


def link_checkpoint(variant: str, checkpoint: Path, target: Path) -> None:
    """Link the common checkpoint into `target`, for peers that read it directly."""
    for file in checkpoint.iterdir():
        (target / file.name).symlink_to(file.resolve())


def environment() -> dict[str, str]:
    """Return the environment variables of a peer's processes.

    Adapters are importable as `peers.NAME`; their folder is not on the path, since they are named like the packages
    they import.
    """
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}


def run_adapter(
    packages: tuple[str, ...],
    load: Callable[[str, Path, int, int, str], Engine],
    convert: Callable[[str, Path, Path], None] | None = None,
) -> None:
    """Run an adapter's command line: `convert WEIGHTS CHECKPOINT TARGET` or `serve VARIANT MODEL`.

    load: takes a variant's name, model folder, threads, max_seq_len and device; returns an engine. convert: takes the
    name of the weights, the checkpoint, and an empty folder to write to.
    """
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    converting = commands.add_parser("convert")
    converting.add_argument("variant")
    converting.add_argument("checkpoint", type=Path)
    converting.add_argument("target", type=Path)
    serving = commands.add_parser("serve")
    serving.add_argument("variant")
    serving.add_argument("model", type=Path)
    serving.add_argument("--threads", type=int, required=True)
    serving.add_argument("--max-seq-len", type=int, required=True)
    serving.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.command == "convert":
        assert convert is not None, "this adapter has nothing to convert"
        convert(args.variant, args.checkpoint, args.target)
        return
    # Native libraries may print to standard output: answers get a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = load(args.variant, args.model, args.threads, args.max_seq_len, args.device)
    versions = {name: version(name) for name in packages}
    print(json.dumps({"facts": engine.facts, "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prefill_s, decode_s, ids = engine.generate(request["prompt"], request["steps"])
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s, "token_ids": ids}), file=answers, flush=True)
