"""Bring the README's tables up to date with the recorded results, or check that they are.

    python tools/update_readme.py            # rewrite
    python tools/update_readme.py --check    # exit 1 if anything is out of date

A block between `<!-- table: FILE -->` and `<!-- end -->` holds the table made from that JSON file.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from qwen3fast.bench.table import as_markdown, table_rows

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"<!-- table: (?P<file>\S+) -->\n.*?<!-- end -->", re.DOTALL)
README_COLUMNS = (
    "context",
    "mode",
    "decode tok/s",
    "speed-up",
    "prefill tok/s",
    "first token",
    "p99 ms",
    "of bandwidth",
)


def render(record: dict) -> str:
    """The table of a record: of `python -m qwen3fast.bench` or of a program in benchmarks/."""
    if record.get("suite") == "cpu_roofline":
        rows = [["format", "context", "batch", "decode tok/s", "GB/s", "of bandwidth", "prefill tok/s"]]
        for c in record["cases"]:
            speed, share = f"{c['decode_tok_s']:.1f}", f"{c['share_of_bandwidth']:.0%}"
            shape = [c["format"], f"{c['context']:,}", str(c["batch_size"])]
            rows.append([*shape, speed, f"{c['gb_s']:.1f}", share, f"{c['prefill_tok_s']:.0f}"])
        text, memory = as_markdown(rows, left=0), record["bandwidth_gb_s"]
    elif "cases" in record:
        rows = table_rows(record)
        keep = [rows[0].index(name) for name in README_COLUMNS]
        text = as_markdown([[row[i] for i in keep] for row in rows], left=1)
        memory = record["read_bandwidth"]["median_gb_s"]
    else:
        names = list(record["results"][0]["decode_tok_s"])
        rows = [["context", *names, "compiled / transformers"]]
        for result in record["results"]:
            speeds = [f"{result['decode_tok_s'][name]:.1f} tok/s" for name in names]
            rows.append([f"{result['length']:,}", *speeds, f"{result['compiled_over_transformers']:.2f}x"])
        text = as_markdown(rows, left=-1)
        memory = record["read_bandwidth_gb_s"]
    where = record["environment"]
    cpu = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
    versions = f"torch {where['torch']}" + (
        f", transformers {where['transformers']}" if "transformers" in where else ""
    )
    return (
        f"{text}\n\n{cpu}; memory reads at {memory:.0f} GB/s in the same run; {versions}; {record['run']['utc'][:10]}."
    )


def update(text: str) -> str:
    """The README with every table made anew."""

    def table(match: re.Match[str]) -> str:
        record = json.loads((ROOT / match["file"]).read_text(encoding="utf-8"))
        return f"<!-- table: {match['file']} -->\n{render(record)}\n<!-- end -->"

    return BLOCK.sub(table, text)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is out of date")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = update(old)
    if args.check:
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
