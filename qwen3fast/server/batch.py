"""`python -m qwen3fast batch`: a file of requests, answered together, resumed after any interruption.

Input: JSON lines in OpenAI's batch form (custom_id, method, url, body), or plain ones: {"prompt": ...} or
{"messages": ...} beside any field of /v1/completions or /v1/chat/completions. CSV and Parquet have a column for each of
these. Output: a JSON line per request, in the order in which they end, each written whole.
Source: OpenAI API reference, "Batch".
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from starlette.applications import Starlette

from qwen3fast.server.app import create_app
from qwen3fast.server.command import add_model_arguments, load_models
from qwen3fast.server.in_process import call
from qwen3fast.server.options import ServerOptions
from qwen3fast.server.replies import new_id

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT, COMPLETIONS, "/v1/embeddings", "/v1/responses")
A_DAY_S = 86_400.0


@dataclass(frozen=True)
class Job:
    """A request of the input. key: what tells it from the others in the output. line: counted from 1."""

    line: int
    key: str
    url: str
    body: dict[str, Any]
    is_openai: bool

    def answer(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        """Return the output line for a response."""
        if self.is_openai:
            response = {"status_code": status, "request_id": new_id("req"), "body": body}
            return {"id": new_id("batch_req"), "custom_id": self.key, "response": response, "error": None}
        given: dict[str, Any] = {name: self.body[name] for name in ("prompt", "messages") if name in self.body}
        if status != 200:
            return {"key": self.key, **given, "error": body["error"]}
        choice = body["choices"][0]
        reply = {"text": choice["text"]} if "text" in choice else {"message": choice["message"]}
        return {"key": self.key, **given, **reply, "finish_reason": choice["finish_reason"], "usage": body["usage"]}


class BadLineError(ValueError):
    """A line of the input that is no request."""


def read_jobs(path: Path) -> Iterator[Job | tuple[int, str]]:
    """Yield the jobs of a file, or for a bad line its number and what is wrong with it.

    Raises: FileNotFoundError; ImportError for Parquet without pyarrow.
    """
    keys: set[str] = set()
    for line, raw in _rows(path):
        try:
            job = _job(line, raw() if callable(raw) else raw)
            if job.key in keys:
                raise BadLineError(f"custom_id {job.key!r} is there twice")
            keys.add(job.key)
            yield job
        except (ValueError, RecursionError) as err:
            yield line, str(err) or "nested too deeply"


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as err:
            raise ImportError("Parquet files need pyarrow; run: pip install pyarrow") from err
        line = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                line += 1
                yield line, {name: value for name, value in row.items() if value is not None}
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                yield line, {name: _csv_value(name, text) for name, text in row.items() if name and text}
    else:
        with path.open("rb") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, lambda text=text: json.loads(text)


def _csv_value(name: str, text: str) -> Any:
    """Return a cell's value: `prompt` is text, other columns are JSON where they can be."""
    if name == "prompt":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _job(line: int, row: Any) -> Job:
    if not isinstance(row, dict):
        raise BadLineError(f"expected a JSON object, got {type(row).__name__}")
    if "custom_id" in row and "body" in row:
        key, url, body = row["custom_id"], row.get("url"), row["body"]
        if not isinstance(key, str) or not key:
            raise BadLineError("custom_id must be a non-empty string")
        if row.get("method", "POST") != "POST" or url not in URLS:
            raise BadLineError(f"method and url must be POST and one of {', '.join(URLS)}, got {url!r:.100}")
        if not isinstance(body, dict):
            raise BadLineError("body must be an object")
        return Job(line, key, url, {**body, "stream": False}, True)
    if ("prompt" in row) == ("messages" in row):
        raise BadLineError("needs either prompt or messages (or custom_id, method, url and body)")
    return Job(line, str(line), COMPLETIONS if "prompt" in row else CHAT, {**row, "stream": False}, False)


class Output:
    """The output file: lines that are there already, and new ones, each on the disk before the next begins."""

    def __init__(self, path: Path) -> None:
        """Open for appending; half a line at the end, of a run that was killed, is cut off."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done: set[str] = set()
        self._file = path.open("a+b")
        self._file.seek(0)
        good = 0
        for raw in self._file:
            try:
                row = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                row = None
            if not isinstance(row, dict):
                break
            good += len(raw)
            self.done.add(str(row.get("custom_id", row.get("key"))))
        rest = self._file.seek(0, 2) - good
        if rest and b"\n" in self._tail(good):
            raise ValueError(f"{path} holds lines that are no results; name another output file")
        self._file.truncate(good)

    def _tail(self, begin: int) -> bytes:
        self._file.seek(begin)
        return self._file.read()

    def write(self, row: dict[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


async def run_jobs(app: Starlette, jobs: list[Job], output: Output, at_once: int, bar: Any) -> int:
    """Answer all jobs, at most so many at once. Returns how many failed."""
    waiting = iter(jobs)
    failed = 0

    async def work() -> None:
        nonlocal failed
        for job in waiting:
            status, body = await call(app, job.url, job.body)
            output.write(job.answer(status, body))
            failed += status != 200
            bar.update()

    tasks = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return failed


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `batch` to a parser."""
    parser.add_argument("input", type=Path, help="requests: .jsonl, .csv or .parquet")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".jsonl; results that it holds are kept")
    add_model_arguments(parser)


def run_batch(args: argparse.Namespace) -> int:
    """Answer a file. Returns the exit status: 0, 1 if a line was bad or failed, 130 after Ctrl-C or SIGTERM.

    Raises: ValueError, FileNotFoundError, ImportError.
    """
    if not args.input.is_file():
        raise FileNotFoundError(f"{args.input} is no file")
    output = Output(args.output)
    jobs, bad = [], 0
    for found in read_jobs(args.input):
        if isinstance(found, Job):
            jobs.append(found)
        else:
            bad += 1
            print(f"{args.input}:{found[0]}: {found[1]}", file=sys.stderr)
    rest = [job for job in jobs if job.key not in output.done]
    if len(rest) < len(jobs):
        print(f"{len(jobs) - len(rest)} of {len(jobs)} results are there already", file=sys.stderr)
    failed = 0
    if rest:
        models = load_models(args)
        app = create_app(models, ServerOptions(request_timeout_s=A_DAY_S, compile_timeout_s=60))
        at_once = min(2 * args.max_batch_size, args.max_queue)  # the next ones are ready when a slot is free
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(rest), desc="batch", unit="request")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            failed = asyncio.run(run_jobs(app, rest, output, at_once, bar))
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)
            bar.close()
            output.close()
            app.state.server.models.close()
    print(f"{len(rest) - failed} answered, {failed} failed, {bad} bad lines", file=sys.stderr)
    return 1 if failed or bad else 0
