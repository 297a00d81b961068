"""The worker process of an engine, as the comparison talks to it (see protocol.py)."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

from peers import protocol

LOAD_S, REPLY_S = 1800.0, 600.0  # seconds to wait for a loaded model, and for a reply
LOG_CHARACTERS = 2000  # of a worker's log in an error


class WorkerError(RuntimeError):
    """A worker's end or silence, with the end of its log."""


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
        """Start it and wait until the model is loaded. Raises: WorkerError if it ends or does not answer."""
        self.name = name
        self._log = protocol.CACHE / "logs" / f"{name.replace(' ', '-')}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        options = ["--threads", str(threads), "--max-seq-len", str(max_seq_len), "--device", device]
        # OpenMP's threads must agree with the engine's own option; waiting ones must sleep, not spin.
        variables = protocol.environment() | {"OMP_NUM_THREADS": str(threads)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", f"peers.{module}", "serve", variant, model, *options],
                env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        hello = self._answer(LOAD_S)
        self.facts: dict[str, Any] = hello["facts"]
        self.versions: dict[str, str] = hello["versions"]

    def generate(self, prompt: list[int], steps: int) -> dict[str, Any]:
        """Return one reply. Raises: WorkerError if the worker ends or does not answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reported with the log below
            self._process.stdin.write(json.dumps({"prompt": prompt, "steps": steps}) + "\n")
            self._process.stdin.flush()
        return self._answer(REPLY_S)

    def cpu_s(self) -> float:
        """Return the processor seconds of all its threads (Linux)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, seconds: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        # There is one answer at a time, so none waits in the buffer of `stdout`.
        if not select.select([stdout], [], [], seconds)[0]:
            self._process.kill()
            raise WorkerError(f"no answer in {seconds:.0f} s{self._log_end()}")
        if not (line := stdout.readline()):
            raise WorkerError(f"{how_it_ended(self._process.wait())}{self._log_end()}")
        return json.loads(line)

    def _log_end(self) -> str:
        text = self._log.read_text(errors="replace").strip()[-LOG_CHARACTERS:]
        return f"; the end of its log:\n{text}" if text else "; its log is empty"


def how_it_ended(code: int) -> str:
    """Return the end of a process in words, from its return code."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
