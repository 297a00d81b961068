"""Bring the tables of the READMEs up to date with the recorded results, or check that they are.

    python tools/update_readme.py            # rewrite
    python tools/update_readme.py --check    # exit 1 if anything is out of date

A block between `<!-- table: FILE -->` and `<!-- end -->` holds the table made from that JSON file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwen3fast.bench.plot import where_measured
from qwen3fast.bench.record import Record, load_record
from qwen3fast.bench.suites import SUITES
from qwen3fast.bench.suites.quantization import formats
from qwen3fast.bench.table import Columns, as_markdown, speedup, table_rows

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tables

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
BLOCK = re.compile(r"<!-- table: (?P<file>\S+) -->\n.*?<!-- end -->", re.DOTALL)
# Of each suite, what a README has room for; baselines are the suites' own.
COLUMNS = {
    "roofline": Columns(("format", "context"), ("decode_tok_s", "share_of_bandwidth", "prefill_tok_s",
                                                "prefill_share_of_gemm")),
    "batch": Columns(("format", "batch_size"), ("decode_tok_s", "step_ms", "share_of_bandwidth")),
    "context": Columns(("format", "context", "allocated"), ("step_ms", "decode_tok_s")),
    "startup": Columns(("format", "compile", "caches"), ("first_token_s", "full_speed_s")),
    "loading": Columns(("case", "cache"), ("seconds", "load_s", "file_gb_s", "own_bytes", "mapped_bytes")),
    "ablation": Columns(("stage", "context"), ("decode_tok_s",)),
    "gpu": Columns(("size", "weights", "attention", "mode", "batch_size", "context"),
                   ("decode_tok_s", "share_of_bandwidth", "prefill_tok_s", "launches")),
}  # fmt: skip


def compiled_table(record: Record) -> str:
    """Of tools/compile_for_gpu.py: what a token launches, on the newest of its GPUs."""
    newest = record.cases[-1].labels["gpu"]
    shown = replace(record, cases=[case for case in record.cases if case.labels["gpu"] == newest])
    labels = ("gpu", "model", "weights", "attention", "batch_size")
    metrics = ("triton_kernels", "library_calls", "eager_calls", "shared_bytes")
    return as_markdown(table_rows(shown, Columns(labels, metrics)), left=4)


def quantization_table(record: Record) -> str:
    """Of the suite quantization: a row for each format, with its speed at each context and its error."""
    contexts = sorted({int(c.labels["context"]) for c in record.cases if "context" in c.labels})
    heads = [f"decode tok/s at {n:,}" for n in contexts]
    rows = [["format", "GB of weights", *heads, "error of the logits", "same likeliest token"]]
    for name, _, gigabytes, error in formats(record):
        speeds = (tables.cell(tables.find(record, format=name, context=n), "decode_tok_s") for n in contexts)
        same = tables.cell(tables.find(record, format=name, what="error"), "same_token")
        rows.append([name, f"{gigabytes:.2f}", *speeds, f"{error:.2%}", same])
    return as_markdown(rows, left=1)


def cache_table(record: Record) -> str:
    """Of the suite cache: a row for each length, tokens/s of every mode side by side; one batch size and format."""
    modes = [mode for (mode,) in tables.unique(record, "mode")]
    columns, last = SUITES["cache"].columns, modes[-1]
    rows = [["context", *(mode.replace("-", ", ") for mode in modes), "speed-up", "first token", "of bandwidth"]]
    for (context,) in tables.unique(record, "context"):
        cases = {mode: tables.find(record, mode=mode, context=context) for mode in modes}
        best = cases[last]
        factor = speedup(record, best, columns) if best is not None else None
        cells = [tables.cell(case, "decode_tok_s") for case in cases.values()]
        cells += ["" if factor is None else f"{factor:.1f}x"]
        rows.append([f"{context:,}", *cells, *(tables.cell(best, name) for name in ("ttft_s", "share_of_bandwidth"))])
    return as_markdown(rows, left=0)


def batching_table(record: Record) -> str:
    """Throughput by batch size, then latency by batch size and offered load."""
    offline, online = tables.offline_rows(record), tables.online_rows(record)
    return f"{as_markdown(offline, left=1)}\n\n{as_markdown(online, left=1)}"


PIVOTS: dict[str, Callable[[Record], str]] = {
    "cache": cache_table,
    "quantization": quantization_table,
    "compiled": compiled_table,
    "peers": lambda record: as_markdown(tables.peers_rows(record), left=2),
    "batching": batching_table,
    "moe": lambda record: as_markdown(tables.moe_rows(record), left=1),
    "operators": lambda record: as_markdown(tables.operators_rows(record), left=1),
    "quantization-tiny": lambda record: as_markdown(tables.quantization_rows(record), left=1),
}


def record_table(record: Record) -> str:
    """The table of a record of version 2.

    Raises: ValueError for a suite without one.
    """
    if record.suite in PIVOTS:
        return PIVOTS[record.suite](record)
    if record.suite not in COLUMNS:
        raise ValueError(f"no table for suite {record.suite!r}; known: {', '.join([*PIVOTS, *COLUMNS])}")
    columns = COLUMNS[record.suite]
    if record.suite in SUITES:
        suite = SUITES[record.suite]
        columns = replace(columns, baseline=suite.columns.baseline, speed=suite.columns.speed)
    rows = table_rows(record, columns)
    return as_markdown(rows, left=min(len(columns.labels), len(rows[0])))


def render(path: Path) -> str:
    """The table of a record's file, and where and when it was measured."""
    record = load_record(path)
    if record.suite == "compiled":
        versions = "; ".join(f"{name} {record.environment[name]}" for name in ("torch", "cuda", "triton"))
        return f"{record_table(record)}\n\nCompiled, not run; {versions}; {record.run['utc'][:10]}."
    extra = record.environment.get("transformers")
    return f"{record_table(record)}\n\n{where_measured(record)}{f'; transformers {extra}' if extra else ''}."


def update(text: str, root: Path = ROOT) -> str:
    """A README with every table made anew, from records by their path from `root`."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match['file']} -->\n{render(root / match['file'])}\n<!-- end -->"

    return BLOCK.sub(table, text)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is out of date")
    args = parser.parse_args()
    is_old = False
    for readme in READMES:
        old = readme.read_text(encoding="utf-8")
        new = update(old)
        is_old = is_old or new != old
        if not args.check:
            readme.write_text(new, encoding="utf-8")
    return int(args.check and is_old)


if __name__ == "__main__":
    raise SystemExit(main())
