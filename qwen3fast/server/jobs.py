"""The requests of an input file, as jobs: JSON lines in OpenAI's batch form or plain, CSV, Parquet.

Source: OpenAI API reference, "Batch".
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from qwen3fast.server.errors import to_api_error
from qwen3fast.server.fields import IGNORED_HEADER, is_number
from qwen3fast.server.in_process import exchange
from qwen3fast.server.replies import new_id

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_CELL = 2**27  # characters of a CSV file's cell; Python's default is less than a long prompt
HASHED = "batch_req_"  # ids in OpenAI's form begin so
URLS = (CHAT, COMPLETIONS, "/v1/embeddings", "/v1/responses")


@dataclass(frozen=True)
class BatchJob:
    """A request of the input.

    line: counted from 1. id: a hash of the request, which says in the output what was answered. custom_id: may be None
    for a plain line. is_openai: in OpenAI's form.
    """

    line: int
    id: str
    custom_id: str | None
    url: str
    body: dict[str, Any]
    is_openai: bool

    @property
    def num_replies(self) -> int:
        """The number of replies that it asks for at once: prompts x n."""
        prompt, n = self.body.get("prompt"), self.body.get("n", 1)
        prompts = sum(not isinstance(item, int) for item in prompt) if isinstance(prompt, list) else 1
        return max(prompts, 1) * (int(n) if is_number(n) and n >= 1 else 1)

    def answer(self, status: int, body: dict[str, Any], ignored: str | None = None) -> dict[str, Any]:
        """Return the output line for a response. ignored: the names of ignored fields."""
        more = {"ignored_fields": ignored} if ignored else {}
        if self.is_openai:
            response = {"status_code": status, "request_id": new_id("req"), "body": body}
            return {"id": self.id, "custom_id": self.custom_id, "response": response, "error": None, **more}
        named = {"custom_id": self.custom_id} if self.custom_id is not None else {}
        given: dict[str, Any] = {name: self.body[name] for name in ("prompt", "messages") if name in self.body}
        row: dict[str, Any] = {"key": str(self.line), "id": self.id, **named, **given, **more}
        if status != 200:
            return {**row, "error": body["error"]}
        choices = body["choices"]
        # The fields of a single reply stand in the line itself.
        reply = {"choices": choices} if len(choices) > 1 else {**choices[0], "index": None}
        reply["usage"] = body["usage"]
        return row | {name: value for name, value in reply.items() if value is not None}


def is_answer(row: dict[str, Any]) -> bool:
    """Return whether an output line holds a reply, not an error."""
    return bool(row["response"]["status_code"] == 200) if "response" in row else "error" not in row


def id_of_line(row: Any) -> tuple[str, str]:
    """Return the id of the request that an output line answers, and its custom_id or line number.

    Raises: KeyError or TypeError for other lines.
    """
    if "response" in row:
        id, name = row["id"], row["custom_id"]
        is_ours = isinstance(row["response"]["status_code"], int) and str(id).startswith(HASHED)
    else:
        id, name, error = row["id"], row["key"], row.get("error")
        is_ours = isinstance(error, dict) if "error" in row else not {"text", "message", "choices"}.isdisjoint(row)
    if not (is_ours and isinstance(name, str) and isinstance(id, str)):
        raise TypeError("not an output line")
    return id, name


class Room:
    """Places in the queue for all replies of the jobs that run at once: the server would refuse more."""

    def __init__(self, places: int) -> None:
        self._places = self._free = places
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        """Wait for so many places, or for all if there are fewer, and hold them during the block."""
        count = min(count, self._places)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            self._free += count
            async with self._changed:
                self._changed.notify_all()


async def answered(app: Starlette, job: BatchJob, room: Room) -> dict[str, Any]:
    """Return the output line for a job, answered by the application of a server once there is room."""
    async with room.taken(job.num_replies):
        try:
            status, headers, content = await exchange(app, job.url, job.body)
        except Exception as err:  # Starlette raises what it has answered with status 500
            return job.answer(500, to_api_error(err).body(job.url))
    return job.answer(status, json.loads(content), headers.get(IGNORED_HEADER.lower()))


def read_jobs(path: Path) -> Iterator[BatchJob | tuple[int, str]]:
    """Yield the jobs of a file; for a bad line, its number and the error.

    Raises: FileNotFoundError; ValueError for a damaged CSV or Parquet file; ImportError for Parquet without pyarrow.
    """
    custom_ids: set[str] = set()
    times: Counter[str] = Counter()
    for line, raw in _rows(path):
        try:
            job = _job(line, raw() if callable(raw) else raw)
            if job.custom_id in custom_ids:
                raise ValueError(f"custom_id {job.custom_id!r} appears twice")
            if job.custom_id is not None:
                custom_ids.add(job.custom_id)
            times[job.id] += 1
            yield replace(job, id=f"{job.id}-{times[job.id]}") if times[job.id] > 1 else job
        except (ValueError, RecursionError) as err:
            yield line, str(err) or "nested too deeply"


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix.lower() == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as err:
            raise ImportError("Parquet files need pyarrow; run: pip install 'qwen3fast[parquet]'") from err
        line = 0
        try:
            for batch in parquet.ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    line += 1
                    yield line, partial(_parquet_row, row)
        except ArrowException as err:
            raise ValueError(f"{path} is not a Parquet file: {err}") from err
    elif path.suffix.lower() == ".csv":
        csv.field_size_limit(MAX_CELL)
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                for line, row in enumerate(csv.DictReader(file), 2):
                    yield line, partial(_csv_row, row)
        except (UnicodeDecodeError, csv.Error) as err:
            raise ValueError(f"{path} is not a CSV file in UTF-8: {err}") from err
    else:
        with path.open("rb") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, lambda text=text: json.loads(text)


def _parquet_row(row: dict[str, Any]) -> Any:
    """Return the values of a row that are not null; of types that JSON does not have, such as dates, their text."""
    given = {name: value for name, value in row.items() if value is not None}
    return json.loads(json.dumps(given, default=lambda v: v.decode() if isinstance(v, bytes) else str(v)))


def _csv_row(row: dict[Any, Any]) -> dict[str, Any]:
    """Return the values of a row's cells that are not empty. Raises: ValueError for more cells than columns."""
    if any(row.get(None, ())):  # spreadsheets write empty cells at the end of rows
        raise ValueError("has more cells than the first line; put cells that hold commas in quotation marks")
    return {name: _csv_value(name, text) for name, text in row.items() if name and text}


def _csv_value(name: str, text: str) -> Any:
    """Return a cell's value: `prompt` and `custom_id` are text; other columns are parsed as JSON if possible."""
    if name in ("prompt", "custom_id"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _job(line: int, row: Any) -> BatchJob:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:32]
    custom_id = row.get("custom_id")
    if custom_id is not None and "body" in row:
        url, body = row.get("url"), row["body"]
        if not isinstance(custom_id, str) or not custom_id:
            raise ValueError("custom_id must be a non-empty string")
        if row.get("method", "POST") != "POST" or url not in URLS:
            raise ValueError(f"method and url must be POST and one of {', '.join(URLS)}, got {url!r:.100}")
        if not isinstance(body, dict):
            raise ValueError("body must be an object")
        return BatchJob(line, f"{HASHED}{digest}", custom_id, url, {**body, "stream": False}, True)
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("needs either prompt or messages (or custom_id, method, url and body)")
    body = {name: value for name, value in row.items() if name != "custom_id"} | {"stream": False}
    if not isinstance(custom_id, str | int | None) or isinstance(custom_id, bool):
        raise ValueError(f"custom_id must be a string, got {custom_id!r:.100}")
    named = None if custom_id is None else str(custom_id)
    return BatchJob(line, digest, named, COMPLETIONS if "prompt" in row else CHAT, body, False)
