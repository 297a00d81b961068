"""What all adapters share: how a peer is described and set up, and how its worker process is talked to.

A worker holds one loaded model. It reads a JSON object a line, {"prompt": ids, "steps": n}: compute the prompt, choose
the first token greedily, then n more, each from the one before. It answers {"prefill_s", "decode_s", "token_ids"};
prefill_s ends with the first token, decode_s covers the n steps. Times are taken inside the worker.

Adapters run in their peer's own environment, too, so this file needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
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
CHECKPOINT = "checkpoint"  # the name of weights that are the common checkpoint itself
BENCHMARKS = Path(__file__).resolve().parent.parent


class Engine(Protocol):
    """A loaded model of some peer."""

    facts: dict[str, Any]  # what the engine says of itself: instructions in use, precisions

    def generate(self, prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        """(prefill_s, decode_s, steps + 1 greedy token ids); nothing of an earlier call may be reused."""


@dataclass(frozen=True)
class Variant:
    """A way to run a peer. computes: weights, activations and kv_cache, in words, for the record.

    weights: the converted weights it uses, where they are another variant's ("" means its own). most_steps: timed in a
    reply, where each takes so long that few must do.
    """

    format: str
    name: str
    computes: dict[str, str]
    weights: str = ""
    most_steps: int | None = None

    @property
    def folder(self) -> str:
        """The name of the folder of its weights."""
        return self.weights or self.name


@dataclass(frozen=True)
class Peer:
    """An engine with an environment of its own.

    module: the adapter. requirements: what pip installs; pip_environment, pip_options: how; pip_remove: what must go
    again. packages: whose versions are recorded. devices: where it runs, for this comparison.
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

    @property
    def python(self) -> Path:
        """The interpreter of the peer's environment."""
        return CACHE / self.name / "env" / "bin" / "python"

    def model_path(self, variant: Variant) -> Path:
        """Where a variant's converted weights lie."""
        return CACHE / self.name / variant.folder

    def setup(self) -> None:
        """Make the environment, if it is not there yet (building may take minutes)."""
        done = CACHE / self.name / "env" / "installed"
        if done.is_file() and done.read_text() == repr(self.requirements):
            return
        venv.create(self.python.parent.parent, with_pip=True)
        command: list[str | Path] = [self.python, "-m", "pip", "install", *self.pip_options, *self.requirements]
        subprocess.run(command, check=True, env=os.environ | self.pip_environment)
        if self.pip_remove:
            subprocess.run([self.python, "-m", "pip", "uninstall", "--yes", *self.pip_remove], check=True)
        done.write_text(repr(self.requirements))

    def convert(self, variant: Variant, checkpoint: Path) -> None:
        """Write the variant's weights, if they are not there yet; a broken-off conversion leaves nothing behind."""
        target = self.model_path(variant)
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
            checkpoint,
            unfinished,
        ]
        subprocess.run(command, check=True, env=environment())
        unfinished.rename(target)

    def is_ready(self, variant: Variant) -> bool:
        """Whether environment and weights are there."""
        return (CACHE / self.name / "env" / "installed").is_file() and self.model_path(variant).is_dir()


def link_checkpoint(variant: str, checkpoint: Path, target: Path) -> None:
    """The conversion of peers that read the common checkpoint as it is: `target` points to its files."""
    for file in checkpoint.iterdir():
        (target / file.name).symlink_to(file.resolve())


def environment() -> dict[str, str]:
    """Of a peer's processes: adapters are found, and the folder of adapters, whose files are named as the packages they
    import, is not on the path itself."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}


class Worker:
    """A running worker process."""

    def __init__(
        self,
        name: str,
        python: Path,
        module: str,
        variant: str,
        model: Path,
        threads: int,
        max_seq_len: int,
        device: str = "cpu",
    ) -> None:
        """Start it and wait until the model is loaded. Raises: RuntimeError with the end of its log if it ends."""
        self.name = name
        self._log = CACHE / "logs" / f"{name.replace(' ', '-')}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        options = ["--threads", str(threads), "--max-seq-len", str(max_seq_len), "--device", device]
        # OpenMP's threads must agree with the engine's own option; waiting ones must sleep, not spin.
        variables = environment() | {"OMP_NUM_THREADS": str(threads)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"peers.{module}", "serve", variant, model, *options],
                env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        hello = self._answer()
        self.facts: dict[str, Any] = hello["facts"]
        self.versions: dict[str, str] = hello["versions"]

    def generate(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """One reply. Raises: RuntimeError with the end of its log if the worker ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reported with the log below
            self._process.stdin.write(json.dumps({"prompt": prompt, "steps": steps}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def cpu_s(self) -> float:
        """Processor seconds that all its threads have used (Linux)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"the worker of {self.name} ended; its log says:\n{self._log.read_text()[-2000:]}")
        return json.loads(line)


def run_adapter(
    packages: tuple[str, ...],
    load: Callable[[str, Path, int, int, str], Engine],
    convert: Callable[[str, Path, Path], None] | None = None,
) -> None:
    """An adapter's command line: `convert WEIGHTS CHECKPOINT TARGET` and `serve VARIANT MODEL`.

    load: (variant's name, model, threads, max_seq_len, device) to an engine. convert: (name of the weights, checkpoint,
    empty folder).
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
    # Native libraries print to standard output as they like: answers get a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = load(args.variant, args.model, args.threads, args.max_seq_len, args.device)
    versions = {name: version(name) for name in packages}
    print(json.dumps({"facts": engine.facts, "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prefill_s, decode_s, ids = engine.generate(request["prompt"], request["steps"])
        print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s, "token_ids": ids}), file=answers, flush=True)
