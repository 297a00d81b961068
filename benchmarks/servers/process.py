"""A server as a process: started, waited for, and ended."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from peers.worker import how_it_ended

from servers.kinds import Kind, Settings

START_S = 600.0
LOG_CHARACTERS = 1_500


class ServerError(Exception):
    """A server that does not run."""


class ServerProcess:
    """A running server."""

    def __init__(self, kind: Kind, settings: Settings, log: Path) -> None:
        """Start it and wait until it answers `/health`. Raises: ServerError if it ends or does not answer."""
        self.kind, self.port, self._log = kind, free_port(), log
        log.parent.mkdir(parents=True, exist_ok=True)
        variables = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as file:
            command = kind.command(settings, self.port)
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables)
        self.model = kind.model or str(settings.folder)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def body(self, prompt: list[int], text: str, tokens: int) -> dict[str, Any]:
        """Return the JSON body of a request."""
        common = {"model": self.model, "max_tokens": tokens, "temperature": 0, "stream": True}
        if self.kind.sends_text:
            return {**common, "prompt": text}
        return {**common, "prompt": prompt, "ignore_eos": True, "stream_options": {"include_usage": True}}

    def log_end(self) -> str:
        """Return the end of what it has printed."""
        return self._log.read_text(errors="replace").strip()[-LOG_CHARACTERS:]

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise ServerError(f"{how_it_ended(code)}; the end of its log:\n{self.log_end()}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):  # not yet
                time.sleep(0.1)
        raise ServerError(f"no answer in {START_S:.0f} s; the end of its log:\n{self.log_end()}")


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
