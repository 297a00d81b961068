"""A record as a text table, and as the Markdown table of the README."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    ("context", "context"),
    ("batch", "batch"),
    ("mode", "mode"),
    ("decode tok/s", "decode"),
    ("prefill tok/s", "prefill"),
    ("first token", "ttft"),
    ("p50 ms", "p50"),
    ("p99 ms", "p99"),
    ("GB/s", "gb_s"),
    ("of bandwidth", "share"),
    ("peak memory", "memory"),
    ("speed-up", "speedup"),
)


def table_rows(record: dict[str, Any]) -> list[list[str]]:
    """One row of text cells for each case of a record's JSON form, header first.

    The speed-up is over the uncached eager mode at the same length and batch size (or uncached compiled without it).
    """
    rows = [[title for title, _ in COLUMNS]]
    for case in record["cases"]:
        m = case["metrics"]
        baseline = baseline_tok_s(record, case["length"], case["batch_size"])
        memory = case["peak_memory_bytes"]
        rows.append(
            [
                f"{case['length']:,}",
                str(case["batch_size"]),
                case["mode"],
                f"{m['decode_tok_s']:.2f}" if m["decode_tok_s"] < 10 else f"{m['decode_tok_s']:.1f}",
                f"{m['prefill_tok_s']:.0f}",
                f"{m['ttft_s']:.2f} s" if m["ttft_s"] >= 1 else f"{m['ttft_s'] * 1e3:.0f} ms",
                f"{m['step_p50_ms']:.1f}",
                f"{m['step_p99_ms']:.1f}",
                f"{m['effective_gb_s']:.1f}",
                f"{m['share_of_bandwidth']:.0%}",
                f"{memory / 1e9:.2f} GB" if memory else "-",
                f"{m['decode_tok_s'] / baseline:.1f}x" if baseline else "-",
            ]
        )
    return rows


def baseline_tok_s(record: dict[str, Any], length: int, batch_size: int) -> float | None:
    """Decode speed of the no-cache baseline at a length; None if it was not measured."""
    for mode in ("uncached-eager", "uncached-compiled"):
        for case in record["cases"]:
            if (case["mode"], case["length"], case["batch_size"]) == (mode, length, batch_size):
                return case["metrics"]["decode_tok_s"]
    return None


def as_text(rows: list[list[str]]) -> str:
    """Aligned columns; the mode to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: list[list[str]], left: int) -> str:
    """A Markdown table; column number `left` is aligned to the left, the others to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    divider = "|" + "|".join(" :--- " if i == left else " ---: " for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], divider, *lines[1:]])
