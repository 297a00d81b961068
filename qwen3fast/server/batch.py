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
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from huggingface_hub.utils.tqdm import tqdm
from starlette.applications import Starlette

from qwen3fast.files import file_to_read, file_to_write
from qwen3fast.server.app import create_app
from qwen3fast.server.jobs import HASHED, BatchJob, Room, answered, id_of_line, is_answer, read_jobs
from qwen3fast.server.loading import add_model_arguments, load_models
from qwen3fast.server.options import ServerOptions
from qwen3fast.server.ray_batch import Note, add_ray_arguments, run_on_ray

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

OPTIONS = ServerOptions(request_timeout_s=86_400.0, compile_timeout_s=60)
BEGINNINGS = (b'{"key": "', f'{{"id": "{HASHED}'.encode())  # of lines of the output, see `BatchJob.answer`


def _to_line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _lock(file: IO[bytes], path: Path) -> None:
    """Keep other processes from a file while it is open. Raises: ValueError if one of them writes it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = os.path.samestat(os.fstat(file.fileno()), path.stat())  # if not, it has just been replaced
    except OSError as err:  # others: a file system without locks
        is_free = not isinstance(err, BlockingIOError)
    if not is_free:
        raise ValueError(f"another process writes {path}; wait until it ends, or choose another output file")


class Output:
    """The output file: lines that are there already, and new ones, each on the disk before the next begins.

    rest: the jobs without a reply. ignored: the names of ignored fields.
    """

    def __init__(self, path: Path, jobs: list[BatchJob]) -> None:
        """Read the file, which is created if need be; `begin` changes it.

        Raises: ValueError for a file of something else, or that another process writes; OSError if it is not writable.
        """
        self.ignored: set[str] = set()
        self._has_begun = False
        self._path, self._file = file_to_write(path), path.open("a+b")
        try:
            _lock(self._file, self._path)
            self._read(jobs)
        except BaseException:
            self._file.close()
            raise

    def _read(self, jobs: list[BatchJob]) -> None:
        replies: dict[str, tuple[int, int, str]] = {}  # begin, end and custom_id or line number, by the request's id
        end = 0
        self._file.seek(0)
        for raw in self._file:
            begin, end = end, end + len(raw)
            is_whole = raw.endswith(b"\n")
            try:
                row = json.loads(raw)
                id, name = id_of_line(row)
            except (ValueError, KeyError, TypeError, RecursionError) as err:
                is_cut = not is_whole and isinstance(err, ValueError)  # no JSON, of a run that was killed
                if is_cut and any(x.startswith(raw[: len(x)]) for x in BEGINNINGS):
                    break
                raise ValueError(
                    f"{self._path} has lines that are not replies of this command; choose another output file"
                ) from err
            if is_whole and is_answer(row):
                replies.setdefault(id, (begin, end, name))
        self.rest = [job for job in jobs if job.id not in replies]
        self._kept: list[tuple[int, int, str | None]] = []  # begin, end, and the line number if it has changed
        for job in jobs:
            if job.id in replies:
                begin, end, name = replies[job.id]
                is_moved = not job.is_openai and name != str(job.line)
                self._kept.append((begin, end, str(job.line) if is_moved else None))
        self._kept.sort()
        if replies and not self._kept:
            reason = "holds replies, but none to these requests; choose another output file, or remove this one"
            raise ValueError(f"{self._path} {reason}")
        if len(replies) > len(self._kept):
            print(f"{len(replies) - len(self._kept)} replies to other requests will be removed", file=sys.stderr)

    def begin(self) -> None:
        """Remove all but the replies to the jobs from the file: half a line, errors, and replies to other requests.

        Raises: OSError naming the file, which keeps them then.
        """
        if self._has_begun:
            return
        ends = [0, *(end for _, end, _ in self._kept)]
        has_gaps = any(begin != end for end, (begin, *_) in zip(ends, self._kept, strict=False))
        with self._named():
            if has_gaps or any(line is not None for *_, line in self._kept):
                self._rewrite()
            else:
                self._file.truncate(ends[-1])
        self._has_begun = True

    def _rewrite(self) -> None:
        target = self._path.resolve()  # a link stays one
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            new = Path(folder) / target.name
            file = new.open("a+b")
            try:
                _lock(file, new)
                for begin, end, line in self._kept:
                    self._file.seek(begin)
                    raw = self._file.read(end - begin)
                    file.write(raw if line is None else _to_line(json.loads(raw) | {"key": line}))
                file.flush()
                os.fsync(file.fileno())  # a computer that fails keeps one of the two
                shutil.copymode(target, new)
                new.replace(target)
            except BaseException:
                file.close()
                raise
        self._file.close()
        self._file = file

    def write(self, row: dict[str, Any]) -> None:
        """Append a line, and warn of fields that its request had in vain.

        Raises: OSError naming the file, which then has nothing of the line.
        """
        for name in set(row.get("ignored_fields", "").split(", ")) - self.ignored - {""}:
            self.ignored.add(name)
            tqdm.write(f"warning: the field {name} is ignored: it is unknown, or not supported", file=sys.stderr)
        self.begin()
        left, file = memoryview(_to_line(row)), self._file.fileno()  # not buffered: others may write after an error
        end = os.fstat(file).st_size
        try:
            with self._named():
                while left:
                    left = left[os.write(file, left) :]
        except BaseException:
            os.ftruncate(file, end)
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise OSError(err.errno, err.strerror, str(self._path)) from err


async def run_jobs(app: Starlette, jobs: list[BatchJob], at_once: int, places: int, note: Note) -> None:
    """Answer all jobs, at most so many at once, and pass each output line on. places: of the queue, for replies."""
    waiting, room = iter(jobs), Room(places)

    async def work() -> None:
        for job in waiting:
            note(await answered(app, job, room))

    tasks = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `batch` to a parser."""
    parser.add_argument("input", type=Path, help="file of requests: .jsonl, .csv or .parquet")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file of replies, .jsonl; "
                        "replies to the input that it holds are kept")  # fmt: skip
    add_model_arguments(parser)
    add_ray_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer a file. Returns the exit status: 0, 1 if a line was bad or failed, 130 after Ctrl-C or SIGTERM.

    Raises: ValueError, FileNotFoundError, FileExistsError, ImportError.
    """
    source = file_to_read(args.input, "a file of requests: .jsonl, .csv or .parquet")
    if args.output.exists() and args.output.samefile(source):
        raise ValueError(f"{args.output} is the file of requests; choose another output file")
    jobs, bad = [], 0
    for found in read_jobs(args.input):
        if isinstance(found, BatchJob):
            jobs.append(found)
        else:
            bad += 1
            print(f"{args.input}:{found[0]}: {found[1]}", file=sys.stderr)
    with closing(Output(args.output, jobs)) as output:
        return _answer_jobs(args, len(jobs), bad, output)


def _answer_jobs(args: argparse.Namespace, total: int, bad: int, output: Output) -> int:
    rest, failed = output.rest, 0

    def note(row: dict[str, Any]) -> None:
        nonlocal failed
        output.write(row)
        failed += not is_answer(row)
        bar.update()

    if len(rest) < total:
        print(f"{total - len(rest)} of {total} requests were answered before", file=sys.stderr)
    if rest:
        bar = tqdm(total=total, initial=total - len(rest), desc="batch", unit="request")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            options = replace(OPTIONS, enable_thinking=args.enable_thinking)
            (run_on_ray if args.ray else _run_here)(rest, args, options, note)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            return 130
        finally:
            signal.signal(signal.SIGTERM, before)
            bar.close()
    output.begin()  # where nothing was written
    print(f"{len(rest) - failed} answered, {failed} failed, {bad} bad lines", file=sys.stderr)
    return 1 if failed or bad else 0


def _run_here(jobs: list[BatchJob], args: argparse.Namespace, options: ServerOptions, note: Note) -> None:
    """Answer the jobs in this process, and pass each output line on."""
    app = create_app(load_models(args), options)
    at_once = max(1, min(2 * args.max_batch_size, args.max_queue))  # the next ones are ready when a slot is free
    try:
        asyncio.run(run_jobs(app, jobs, at_once, args.max_queue, note))
    finally:
        app.state.server.models.close()
