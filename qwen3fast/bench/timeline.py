"""Records in the order of their commits, and all versions of one record in git."""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3fast.bench.compare import differences
from qwen3fast.bench.environment import git
from qwen3fast.bench.record import Record
from qwen3fast.bench.validate import UTC, parse_json

COMMIT = re.compile(r"[0-9a-f]{7,64}")  # all that git is asked for by a record's own word


@dataclass(frozen=True)
class Point:
    """A record in time: seconds since 1970 of its commit (or else of the run), and its name.

    The name is the commit's, with "*" if there were uncommitted changes.
    """

    record: Record
    time_s: float
    name: str

    @property
    def date(self) -> str:
        """The day of the commit, or else of the run."""
        return time.strftime("%Y-%m-%d", time.gmtime(self.time_s))


def versions_in_git(path: Path) -> tuple[list[Record], list[str]]:
    """Return all versions of a file in git's history, across renames, and why others were left out.

    Raises: ValueError if git has none.
    """
    folder = path.parent if path.parent.is_dir() else Path()
    names = ("-c", "core.quotePath=off", "log", "--follow", "--format=%x00%H", "--name-only")
    log = git(*names, "--", path.name, folder=folder)
    top = git("rev-parse", "--show-toplevel", folder=folder)
    if not log or top is None:
        raise ValueError(f"git has no version of {path}; expected a file that was committed")
    records, notes, commit = [], [], ""
    for line in filter(None, log.splitlines()):
        if line.startswith("\0"):  # which no file name has
            commit = line[1:]
            continue
        text = git("show", "--end-of-options", f"{commit}:{line}", folder=Path(top))
        where = f"{line} at {commit[:9]}"
        try:
            if text is None:
                raise ValueError(f"{where} was deleted")
            records.append(Record.from_dict(parse_json(text, where), where))
        except ValueError as err:  # such as one of an earlier version of the format
            notes.append(str(err))
    return records, notes


def in_order(records: Sequence[Record], force: bool = False) -> list[Point]:
    """Return the records by the time of their commits, and runs of one commit by their own time.

    Raises: ValueError for no records, for other suites, or for other machines or models (unless `force`).
    """
    if not records:
        raise ValueError("no record to show; name some, or use --git PATH")
    for other in records[1:]:
        apart = differences(records[0], other)
        if other.suite != records[0].suite or (apart and not force):
            raise ValueError(
                f"{records[0].run['utc']} and {other.run['utc']} do not belong together: {'; '.join(apart)}; --force "
                "shows other machines and models beside each other"
            )
    points = [Point(record, _commit_time(record), _name(record)) for record in records]
    return sorted(points, key=lambda point: (point.time_s, point.record.run["utc"]))


def _commit_time(record: Record) -> float:
    commit = _commit(record)
    shown = git("show", "-s", "--format=%ct", "--end-of-options", commit) if commit else None
    if shown and shown.isdecimal():
        return float(shown)
    return float(calendar.timegm(time.strptime(record.run["utc"], UTC)))


def _name(record: Record) -> str:
    return (commit[:7] if (commit := _commit(record)) else "no commit") + ("*" if record.run.get("git_dirty") else "")


def _commit(record: Record) -> str | None:
    """Return the commit if it is one: a record may hold any text, such as an option of git."""
    commit = record.run.get("git_commit")
    return commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None
