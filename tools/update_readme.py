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
from statistics import median

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


def roofline_table(record: dict) -> str:
    """Of benchmarks/cpu_roofline.py: speed and share of the memory's speed."""
    rows = [["format", "context", "batch", "decode tok/s", "GB/s", "of bandwidth", "prefill tok/s", "of GEMM rate"]]
    for c in record["cases"]:
        speed, share = f"{c['decode_tok_s']:.1f}", f"{c['share_of_bandwidth']:.0%}"
        prefill = [f"{c['prefill_tok_s']:.0f}", f"{c['prefill_share_of_gemm']:.0%}"]
        shape = [c["format"], f"{c['context']:,}", str(c["batch_size"])]
        rows.append([*shape, speed, f"{c['gb_s']:.1f}", share, *prefill])
    return as_markdown(rows, left=0)


def startup_table(record: dict) -> str:
    """Of benchmarks/startup.py: seconds since the start of the process."""
    rows = [["format, compile", "caches", "first token", "full speed"]]
    for r in record["results"]:
        full = "not reached" if r["full_speed_s"] is None else f"{r['full_speed_s']:.1f} s"
        rows.append([f"{r['format']}, {r['compile']}", r["caches"], f"{r['first_token_s']:.1f} s", full])
    return as_markdown(rows, left=0)


def peers_table(record: dict) -> str:
    """Of benchmarks/compare_peers.py: tokens/s, decoding at each context and prefill."""
    columns = sorted({(c["steps"] == 0, c["length"]) for c in record["cases"]})
    speeds = {
        (c["format"], c["engine"], c["steps"] == 0, c["length"]): c[
            "prefill_tok_s" if c["steps"] == 0 else "decode_tok_s"
        ]
        for c in record["cases"]
    }
    heads = [f"{'prefill of' if is_prefill else 'decode at'} {length:,}" for is_prefill, length in columns]
    rows = [["format, engine", *heads]]
    for format, engine in dict.fromkeys((c["format"], c["engine"]) for c in record["cases"]):
        cells = (f"{speeds[(format, engine, *column)]:.1f}" for column in columns)
        rows.append([f"{format}, {engine}", *cells])
    return as_markdown(rows, left=0)


def operators_table(record: dict) -> str:
    """Of benchmarks/cpu_operators.py: milliseconds."""
    names = list(dict.fromkeys(name for c in record["cases"] for name in c["operators_ms"]))
    rows = [["", "whole", *names, "other"]]
    for c in record["cases"]:
        cells = (f"{c['operators_ms'][name]:.2f}" if name in c["operators_ms"] else "" for name in names)
        what = f"{c['phase']} {c['length']:,}, {c['format']}"
        rows.append([what, f"{c['whole_ms']:.2f}", *cells, f"{c['other_ms']:.2f}"])
    return as_markdown(rows, left=0)


def batching_table(record: dict) -> str:
    """Of benchmarks/batching.py: throughput by batch size, then latency by offered load."""
    sizes = sorted({case["batch_size"] for case in record["offline"]})
    names = list(dict.fromkeys(case["engine"] for case in record["offline"]))
    speeds = {(case["engine"], case["batch_size"]): case["tok_s"] for case in record["offline"]}
    rows = [["tokens/s", *(f"batch {size}" for size in sizes)]]
    for name in names:
        label = name if "transformers" in name else f"qwen3fast, {name}"
        rows.append([label, *(f"{speeds[name, n]:.1f}" if (name, n) in speeds else "" for n in sizes)])
    latency = [["load", "requests/s", "first token p50, p99", "between tokens p50, p99"]]
    for case in record["online"]:
        times = [f"{case[f'{k}_p50_s'] * 1e3:.0f}, {case[f'{k}_p99_s'] * 1e3:.0f} ms" for k in ("ttft", "itl")]
        latency.append([f"{case['engine']}, {case['load']:.0%}", f"{case['requests_s']:.2f}", *times])
    return f"{as_markdown(rows, left=0)}\n\n{as_markdown(latency, left=0)}"


def moe_table(record: dict) -> str:
    """Of benchmarks/moe.py: milliseconds a step of a mixture of experts between two dense models."""
    rows = [["format, experts", "parameters", "of them active", "mixture", "dense as active", "dense as all"]]
    rows[0] += ["mixture / active", "all / mixture"]
    for c in record["cases"]:
        mixture = c["models"]["experts"]
        sizes = [f"{mixture[name] / 1e6:,.0f} million" for name in ("parameters", "read_parameters")]
        steps = [f"{c['models'][name]['step_ms']:.2f} ms" for name in ("experts", "dense_active", "dense_all")]
        ratios = [f"{c[name]:.2f}x" for name in ("experts_over_dense_active", "dense_all_over_experts")]
        rows.append([f"{c['format']}, {c['num_experts']}", *sizes, *steps, *ratios])
    return as_markdown(rows, left=0)


def compiled_table(record: dict) -> str:
    """Of tools/compile_for_gpu.py: what a token launches, on the newest of the GPUs."""
    rows = [
        [
            "gpu, model, weights, attention",
            "batch",
            "Triton kernels",
            "library calls",
            "eager operations",
            "most shared memory",
        ]
    ]
    newest = record["steps"][-1]["gpu"]
    for c in [c for c in record["steps"] if c["gpu"] == newest]:
        kernels = [kernel for part in c["parts"].values() for kernel in part["kernels"]]
        counts = [c["triton_launches"], sum(c["library_calls"].values()), sum(c["eager_calls"].values())]
        most = max(kernel["shared_bytes"] for kernel in kernels)
        what = f"{c['gpu']}, {c['model']}, {c['weights']}, {c['attention']}"
        rows.append([what, str(c["batch_size"]), *map(str, counts), f"{most / 1024:.1f} KiB"])
    return as_markdown(rows, left=0)


def transformers_table(record: dict) -> str:
    """Of benchmarks/compare_transformers.py: tokens/s of each way, and ours over theirs."""
    names = list(record["results"][0]["decode_tok_s"])
    rows = [["context", *names, "compiled / transformers"]]
    for result in record["results"]:
        speeds = [f"{result['decode_tok_s'][name]:.1f} tok/s" for name in names]
        rows.append([f"{result['length']:,}", *speeds, f"{result['compiled_over_transformers']:.2f}x"])
    return as_markdown(rows, left=-1)


def bench_table(record: dict) -> str:
    """Of `python -m qwen3fast.bench`."""
    rows = table_rows(record)
    keep = [rows[0].index(name) for name in README_COLUMNS]
    return as_markdown([[row[i] for i in keep] for row in rows], left=1)


TABLES = {
    "cpu_roofline": roofline_table,
    "cpu_operators": operators_table,
    "startup": startup_table,
    "compare_peers": peers_table,
    "batching": batching_table,
    "moe": moe_table,
}


def render(record: dict) -> str:
    """The table of a record, and where and when it was measured."""
    if record.get("suite") == "compile_for_gpu":
        versions = "; ".join(f"{name} {version}" for name, version in record["environment"].items())
        return f"{compiled_table(record)}\n\nCompiled, not run; {versions}; {record['run']['utc'][:10]}."
    other = bench_table if "cases" in record else transformers_table
    text = TABLES.get(record.get("suite", ""), other)(record)
    memory = None
    if record.get("suite") == "cpu_operators":
        memory = median(case["bandwidth_gb_s"] for case in record["cases"])
    elif record.get("suite") != "batching":
        memory = (
            record.get("bandwidth_gb_s") or record.get("read_bandwidth_gb_s") or record["read_bandwidth"]["median_gb_s"]
        )
    where = record["environment"]
    cpu = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
    versions = f"torch {where['torch']}" + (
        f", transformers {where['transformers']}" if "transformers" in where else ""
    )
    reads = f"memory reads at {memory:.0f} GB/s in the same run; " if memory is not None else ""
    return f"{text}\n\n{cpu}; {reads}{versions}; {record['run']['utc'][:10]}."


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
