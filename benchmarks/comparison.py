"""The end of a benchmark: record and table, of comparisons with other software a picture and what was noisy as well."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.registry import tell
from tables import Rows

from qwen3fast.bench.plot import save
from qwen3fast.bench.record import Record, write_json
from qwen3fast.bench.table import as_text


def finish(record: Record, output: Path, rows: Callable[[Record], Rows], draw: Callable[[Record], Any]) -> int:
    """Write the record to `output` and its picture beside it, and print its table, whose `rows` have two names each.

    Returns: the exit status, 130 if the comparison was interrupted, 1 if tokens were wrong.
    Raises: SystemExit if nothing was measured.
    """
    if record.interrupted:
        tell("interrupted: writing the rounds so far", sys.stderr)
    write_json(record.to_dict(), output)
    if not record.cases:
        raise SystemExit(f"nothing was measured; see {output}")
    tell(as_text(rows(record), left=2))
    for reason in record.noise:
        tell(f"noise: {reason}", sys.stderr)
    picture = output.with_suffix(".png")
    save(draw(record), picture)
    tell(f"wrote {output} and {picture}")
    return 130 if record.interrupted else int(not record.passed)


def finish_without_picture(record: Record, output: Path, rows: Callable[[Record], Rows], left: int) -> int:
    """Write the record to `output`, without cases that have no sample, and print its table.

    left: columns of names in `rows`. Returns: the exit status, 130 if the benchmark was interrupted.
    """
    record.cases = [case for case in record.cases if case.samples]
    write_json(record.to_dict(), output)
    print(as_text(rows(record), left=left))
    print(f"wrote {output}")
    return 130 if record.interrupted else 0
