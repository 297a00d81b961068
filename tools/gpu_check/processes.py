"""Child processes with a time limit: their output in a file, ended with all their own children."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
GRACE_S = 5.0  # between asking a process to end and ending it
POLL_S = 0.5
CAUSE = "CAUSE "  # begins a line in a log of tests: a test's id and the first line of its error


class StoppedError(BaseException):
    """This program was asked to end (SIGTERM)."""


def raise_on_sigterm() -> None:
    """Let SIGTERM raise StoppedError in the main thread, which saves what there is."""

    def stop(number: int, frame: object) -> None:
        raise StoppedError

    signal.signal(signal.SIGTERM, stop)


def environment_with_caches(caches: Path) -> dict[str, str]:
    """Return the environment for children: the package importable, compile caches in one folder."""
    paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def run_limited(
    command: list[str],
    log: Path,
    seconds: float,
    environment: dict[str, str],
    on_poll: Callable[[], None] = lambda: None,
) -> int | None:
    """Run a command in a process group of its own, its output going to `log` as it comes.

    on_poll: called about twice a second meanwhile. Returns: the exit status, or None if it had to be ended. If this
    process is stopped itself, the child is ended first.
    """
    deadline = time.monotonic() + seconds
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while time.monotonic() < deadline:
                try:
                    return child.wait(timeout=POLL_S)
                except subprocess.TimeoutExpired:
                    on_poll()
            return None
        finally:
            end_group(child)


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a child and the processes it started: politely, then not."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:  # nothing is left of the group
            break
        try:
            child.wait(timeout=wait_s)
        except subprocess.TimeoutExpired:
            continue


def last_line(log: Path) -> str:
    """Return the last line of a log that says something, shortened; "" if there is none."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
