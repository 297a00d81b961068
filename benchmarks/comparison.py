"""The end of a comparison with other software: record, table and picture are written, and what was noisy is said."""

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
