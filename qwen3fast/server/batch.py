"""`python -m qwen3fast batch`: a file of requests, answered together, resumed after any interruption.

Input: JSON lines in OpenAI's batch form (custom_id, method, url, body), or plain ones: {"prompt": ...} or
{"messages": ...} beside any field of /v1/completions or /v1/chat/completions. CSV and Parquet have a column for each of
these. Output: a JSON line per request, in the order in which they end, each written whole.
Source: OpenAI API reference, "Batch".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils.tqdm import tqdm
from starlette.applications import Starlette

from qwen3fast.files import file_to_read, file_to_write
from qwen3fast.server.app import create_app
from qwen3fast.server.jobs import BatchJob, answered, is_answer, read_jobs
from qwen3fast.server.loading import add_model_arguments, load_models
from qwen3fast.server.options import ServerOptions
from qwen3fast.server.ray_batch import add_ray_arguments, answers

OPTIONS = ServerOptions(request_timeout_s=86_400.0, compile_timeout_s=60)
BEGINNINGS = (b'{"key": "', b'{"id": "batch_req')  # of lines of the output, see `BatchJob.answer`


class Output:
    """The output file: lines that are there already, and new ones, each on the disk before the next begins.

    done: the ids of requests with a reply. ignored: the names of ignored fields.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending; errors are taken out, and half a line at the end, of a run that was killed."""
        self.done: set[str] = set()
        self.ignored: set[str] = set()
        kept: list[tuple[int, int]] = []  # begin and end of replies
        with file_to_write(path).open("a+b") as file:
            file.seek(0)
            length = 0
            for raw in file:
                if not raw.endswith(b"\n") and any(raw[: len(begin)] == begin[: len(raw)] for begin in BEGINNINGS):
                    break
                try:
                    row = json.loads(raw)
                    key = row["custom_id"] if "response" in row else row["key"]  # only this command's lines have one
                    if is_answer(row):
                        self.done.add(row.get("id", key))
                        kept.append((length, length + len(raw)))
                except (ValueError, KeyError, TypeError) as err:
                    raise ValueError(
                        f"{path} has lines that are not replies of this command; choose another output file"
                    ) from err
                length += len(raw)
            file.truncate(length)
            if sum(end - begin for begin, end in kept) < length:
                with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as new:
                    for begin, end in kept:
                        file.seek(begin)
                        new.write(file.read(end - begin))
                shutil.copymode(path, new.name)
                Path(new.name).replace(path)
        self._file = path.open("ab")

    def write(self, row: dict[str, Any]) -> None:
        """Append a line, and warn of fields that its request had in vain.

        Raises: OSError naming the file; the next run cuts off what was written of the line.
        """
        for name in set(row.get("ignored_fields", "").split(", ")) - self.ignored - {""}:
            self.ignored.add(name)
            tqdm.write(f"warning: the field {name} is ignored: it is unknown, or not supported", file=sys.stderr)
        with self._named():
            self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file. Raises: as `write`."""
        with self._named():
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise OSError(err.errno, err.strerror, self._file.name) from err


async def run_jobs(app: Starlette, jobs: list[BatchJob], output: Output, at_once: int, bar: Any) -> int:
    """Answer all jobs, at most so many at once. Returns how many failed."""
    waiting = iter(jobs)
    failed = 0

    async def work() -> None:
        nonlocal failed
        for job in waiting:
            row = await answered(app, job)
            output.write(row)
            failed += not is_answer(row)
            bar.update()

    tasks = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return failed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `batch` to a parser."""
    parser.add_argument("input", type=Path, help="file of requests: .jsonl, .csv or .parquet")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file of replies, .jsonl; "
                        "those that it holds are kept")  # fmt: skip
    add_model_arguments(parser)
    add_ray_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer a file. Returns the exit status: 0, 1 if a line was bad or failed, 130 after Ctrl-C or SIGTERM.

    Raises: ValueError, FileNotFoundError, FileExistsError, ImportError.
    """
    file_to_read(args.input, "a file of requests: .jsonl, .csv or .parquet")
    with closing(Output(args.output)) as output:
        return _answer_file(args, output)


def _answer_file(args: argparse.Namespace, output: Output) -> int:
    jobs, bad = [], 0
    for found in read_jobs(args.input):
        if isinstance(found, BatchJob):
            jobs.append(found)
        else:
            bad += 1
            print(f"{args.input}:{found[0]}: {found[1]}", file=sys.stderr)
    rest = [job for job in jobs if job.id not in output.done]
    if len(rest) < len(jobs):
        print(f"{len(jobs) - len(rest)} of {len(jobs)} requests were answered before", file=sys.stderr)
    failed = 0
    if rest:
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(rest), desc="batch", unit="request")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            failed = (_run_on_ray if args.ray else _run_here)(args, rest, output, bar)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)
            bar.close()
    print(f"{len(rest) - failed} answered, {failed} failed, {bad} bad lines", file=sys.stderr)
    return 1 if failed or bad else 0


def _run_here(args: argparse.Namespace, jobs: list[BatchJob], output: Output, bar: Any) -> int:
    """Answer the jobs in this process. Returns how many failed."""
    app = create_app(load_models(args), OPTIONS)
    at_once = min(2 * args.max_batch_size, args.max_queue)  # the next ones are ready when a slot is free
    try:
        return asyncio.run(run_jobs(app, jobs, output, at_once, bar))
    finally:
        app.state.server.models.close()


def _run_on_ray(args: argparse.Namespace, jobs: list[BatchJob], output: Output, bar: Any) -> int:
    """Answer the jobs on a cluster. Returns how many failed."""
    failed = 0
    for row in answers(jobs, args, OPTIONS):
        output.write(row)
        failed += not is_answer(row)
        bar.update()
    return failed
