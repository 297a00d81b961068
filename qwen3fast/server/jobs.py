"""The requests of an input file, as jobs: JSON lines in OpenAI's batch form or plain, CSV, Parquet.

Source: OpenAI API reference, "Batch".
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3fast.server.replies import new_id

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MAX_CELL = 2**27  # characters of a CSV file's cell; Python's default is less than a long prompt
URLS = (CHAT, COMPLETIONS, "/v1/embeddings", "/v1/responses")


@dataclass(frozen=True)
class BatchJob:
    """A request of the input. key: identifies it in the output. line: counted from 1."""

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


def read_jobs(path: Path) -> Iterator[BatchJob | tuple[int, str]]:
    """Yield the jobs of a file; for a bad line, its number and the error.

    Raises: FileNotFoundError; ValueError for a damaged CSV file; ImportError for Parquet without pyarrow.
    """
    keys: set[str] = set()
    for line, raw in _rows(path):
        try:
            job = _job(line, raw() if callable(raw) else raw)
            if job.key in keys:
                raise ValueError(f"custom_id {job.key!r} appears twice")
            keys.add(job.key)
            yield job
        except (ValueError, RecursionError) as err:
            yield line, str(err) or "nested too deeply"


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as err:
            raise ImportError("Parquet files need pyarrow; run: pip install 'qwen3fast[parquet]'") from err
        line = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                line += 1
                yield line, {name: value for name, value in row.items() if value is not None}
    elif path.suffix == ".csv":
        csv.field_size_limit(MAX_CELL)
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                for line, row in enumerate(csv.DictReader(file), 2):
                    yield line, {name: _csv_value(name, text) for name, text in row.items() if name and text}
        except (UnicodeDecodeError, csv.Error) as err:
            raise ValueError(f"{path} is not a CSV file in UTF-8: {err}") from err
    else:
        with path.open("rb") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, lambda text=text: json.loads(text)


def _csv_value(name: str, text: str) -> Any:
    """Return a cell's value: `prompt` is text; other columns are parsed as JSON if possible."""
    if name == "prompt":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _job(line: int, row: Any) -> BatchJob:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    if "custom_id" in row and "body" in row:
        key, url, body = row["custom_id"], row.get("url"), row["body"]
        if not isinstance(key, str) or not key:
            raise ValueError("custom_id must be a non-empty string")
        if row.get("method", "POST") != "POST" or url not in URLS:
            raise ValueError(f"method and url must be POST and one of {', '.join(URLS)}, got {url!r:.100}")
        if not isinstance(body, dict):
            raise ValueError("body must be an object")
        return BatchJob(line, key, url, {**body, "stream": False}, True)
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("needs either prompt or messages (or custom_id, method, url and body)")
    return BatchJob(line, str(line), COMPLETIONS if "prompt" in row else CHAT, {**row, "stream": False}, False)
