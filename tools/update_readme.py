"""Bring the tables of README and docs up to date with the recorded results, or check that they are.

    python tools/update_readme.py            # rewrite
    python tools/update_readme.py --check    # exit 1 if anything is out of date

A block between `<!-- table: FILE -->` and `<!-- end -->` holds the table made from that JSON file; with a word after
the name of the file, such as `speed`, another table of the same record. A folder and a word stand for a table of
several records.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwen3fast.bench.metrics import METRICS
from qwen3fast.bench.plot import where_measured
from qwen3fast.bench.record import Case, Record, load_record
from qwen3fast.bench.suites import SUITES, cache
from qwen3fast.bench.suites.quantization import formats
from qwen3fast.bench.table import Columns, as_markdown, speedup, table_rows

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import tables
import targets

ROOT = Path(__file__).parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks" / "index.md")
BLOCK = re.compile(r"<!-- table: (?P<file>\S+)(?P<kind> \w+)? -->\n.*?<!-- end -->", re.DOTALL)
# The columns of each suite's table; baselines are the suites' own.
COLUMNS = {
    "roofline": Columns(("format", "context"), ("decode_tok_s", "share_of_bandwidth", "prefill_tok_s",
                                                "prefill_share_of_gemm")),
    "batch": Columns(("format", "batch_size"), ("decode_tok_s", "step_ms", "share_of_bandwidth")),
    "context": Columns(("format", "context", "allocated"), ("step_ms", "decode_tok_s")),
    "quality": Columns(("format",), ("perplexity", "kl_divergence", "kl_p99", "same_token")),
    "startup": Columns(("format", "compile", "caches"), ("first_token_s", "full_speed_s")),
    "loading": Columns(("case", "cache"), ("seconds", "load_s", "file_gb_s", "own_bytes", "mapped_bytes")),
    "ablation": Columns(("stage", "context"), ("decode_tok_s",)),
    "forms": Columns(("computation", "sizes", "form"), ("operator_ms",)),
    "serve": Columns(("format", "what", "clients"),
                     ("tok_s", "requests_s", "goodput", "ttft_s", "ttft_p99_s", "tpot_ms", "http_over_engine")),
    "llama-bench": Columns(("format", "depth", "test"), ("tok_s",)),
    "gpu": Columns(("part", "size", "weights", "mode", "options", "batch_size", "context"),
                   ("decode_tok_s", "share_of_bandwidth", "ttft_s", "prefill_tok_s")),
}  # fmt: skip


def compiled_table(record: Record) -> str:
    """Return what one token, or one chunk of a prompt, launches on the GPU most cases were compiled for."""
    names = [case.labels["gpu"] for case in record.cases]
    most = max(dict.fromkeys(names), key=names.count)
    shown = replace(record, cases=[case for case in record.cases if case.labels["gpu"] == most and _is_shown(case)])
    labels = ("gpu", "step", "model", "weights", "batch_size")
    metrics = ("triton_kernels", "library_calls", "eager_calls", "shared_bytes")
    return as_markdown(table_rows(shown, Columns(labels, metrics)), left=len(labels))


def _is_shown(case: Case) -> bool:
    """Return whether a case gets a row: a decode step launches as many kernels for 8 requests as for one."""
    return case.labels["batch_size"] == 1 or case.labels["step"] == "prompts"


def quantization_table(record: Record, with_errors: bool = True) -> str:
    """Return a row per format of the suite quantization: size, speed at each context and error of the logits."""
    contexts = sorted({int(c.labels["context"]) for c in record.cases if "context" in c.labels})
    heads = [f"decode tok/s at {n:,}" for n in contexts]
    errors = ["error of the logits", "same most likely token"] if with_errors else []
    rows = [["format", "GB of weights", *heads, *errors]]
    for name, _, gigabytes, error in formats(record):
        speeds = (tables.cell(tables.find(record, format=name, context=n), "decode_tok_s") for n in contexts)
        same = tables.cell(tables.find(record, format=name, what="error"), "same_token")
        rows.append([name, f"{gigabytes:.2f}", *speeds, *([f"{error:.2%}", same] if with_errors else [])])
    return as_markdown(rows, left=1)


def speed_table(record: Record) -> str:
    """Return the suite quantization's table without errors."""
    return quantization_table(record, with_errors=False)


def quality_bits_table(record: Record) -> str:
    """Return a row per format of the suite quality with its bits per weight (of all parameters, if kernels ran it)."""
    names = ("perplexity", "kl_divergence", "kl_p99", "same_token")
    rows = [["format", "bits per weight", *(METRICS[name].title for name in names)]]
    for case in record.cases:
        bits = case.facts.get("bits_per_weight") or case.facts["weight_bytes"] * 8 / record.model["parameters"]
        rows.append([str(case.labels["format"]), f"{bits:.2f}", *(tables.cell(case, name) for name in names)])
    return as_markdown(rows, left=1)


def targets_table(folder: Path) -> str:
    """Return what was asked of the speed and what the records in a folder show, a column per processor."""
    rows = targets.target_rows(targets.load_all(folder))
    return _with_bold(rows, left=len(rows[0]))


def sides_table(folder: Path) -> str:
    """Return our speed beside the best other engine's, side by side for the processors whose level was not pinned.

    Below: how often ours is higher and lower, at all lengths that were measured there, and the table's machines.
    """
    sides, where, verdicts = {}, [], dict[str, int]()
    for name, records in targets.load_all(folder).items():
        peers = [r for r in records if (r.suite, r.model_name) == ("peers", targets.MODEL)]
        shown = [r for r in peers if any(targets.beside(r, shape) for shape in targets.FRONT)]
        if shown and "cpu_level" not in shown[0].environment:
            sides[name] = targets.all_beside(peers)
            where.append(f"{name}: {where_measured(shown[0])}.")
            verdicts |= {f"{targets.shape_name(shape)}, {name}": b.verdict for shape, b in sides[name].items()}
    slower, level = ([case for case, verdict in verdicts.items() if verdict == sought] for sought in (-1, 0))
    wins = len(verdicts) - len(slower) - len(level)
    summary = f"qwen3fast is the fastest of these engines on these CPUs in {wins} of {len(verdicts)} cases, slower in "
    summary += f"{len(slower)}{_listed(slower)}, undecided (the interval includes 1) in {len(level)}{_listed(level)}."
    return "\n".join([_with_bold(targets.side_rows(sides), left=1), "", summary, " ".join(where)])


def _listed(names: list[str]) -> str:
    return f" ({'; '.join(names)})" if names else ""


def _with_bold(rows: tables.Rows, left: int) -> str:
    return as_markdown(rows, left=left).replace(r"\*\*", "**")  # the asterisks are ours, not a record's


def cache_table(record: Record) -> str:
    """Return a row per length of the suite cache, tokens/s of every mode side by side; one batch size and format.

    Below are its faults: lengths at which the first token comes later with the cache than without.
    """
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
    return "\n\n".join([as_markdown(rows, left=0), *cache.faults(record)])


def batching_table(record: Record) -> str:
    """Return throughput by batch size, then latency by batch size and offered load."""
    offline, online = tables.offline_rows(record), tables.online_rows(record)
    return f"{as_markdown(offline, left=1)}\n\n{as_markdown(online, left=1)}"


PIVOTS: dict[str, Callable[[Record], str]] = {
    "cache": cache_table,
    "quantization": quantization_table,
    "compiled": compiled_table,
    "peers": lambda record: as_markdown(tables.peers_rows(record), left=2),
    "batching": batching_table,
    "servers": lambda record: as_markdown(tables.servers_rows(record), left=2),
    "moe": lambda record: as_markdown(tables.moe_rows(record), left=1),
    "operators": lambda record: as_markdown(tables.operators_rows(record), left=1),
    "adapters": lambda record: as_markdown(tables.adapters_rows(record), left=3),
    "shared-cores": lambda record: as_markdown(tables.shared_cores_rows(record), left=3),
    "huge-pages": lambda record: as_markdown(tables.huge_pages_rows(record), left=1),
    "prequantized": lambda record: as_markdown(tables.prequantized_rows(record), left=2),
    "quantization-tiny": lambda record: as_markdown(tables.quantization_rows(record), left=1),
}
# Other tables of a suite, by the word behind the file's name.
KINDS: dict[tuple[str, str], Callable[[Record], str]] = {
    ("quantization", "speed"): speed_table,
    ("quality", "bits"): quality_bits_table,
}
# Tables of several records, by the word behind their folder.
FOLDERS: dict[str, Callable[[Path], str]] = {"targets": targets_table, "sides": sides_table}


def record_table(record: Record, kind: str = "") -> str:
    """Return the table of a record.

    Raises: ValueError for a suite or kind without one.
    """
    if kind:
        if (record.suite, kind) not in KINDS:
            raise ValueError(f"no table {kind!r} of suite {record.suite!r}; known: {', '.join(map(' '.join, KINDS))}")
        return KINDS[record.suite, kind](record)
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


def render(path: Path, kind: str = "") -> str:
    """Return the table of a record's file, and where and when it was measured; or of a folder of records."""
    if path.is_dir():
        if kind not in FOLDERS:
            raise ValueError(f"no table {kind!r} of a folder of records; known: {', '.join(FOLDERS)}")
        return FOLDERS[kind](path)
    record = load_record(path)
    if record.suite == "compiled":
        versions = "; ".join(f"{name} {record.environment[name]}" for name in ("torch", "cuda", "triton"))
        return f"{record_table(record)}\n\nCompiled, not run; {versions}; {record.run['utc'][:10]}."
    extra = record.environment.get("transformers")
    return f"{record_table(record, kind)}\n\n{where_measured(record)}{f'; transformers {extra}' if extra else ''}."


def update(text: str, root: Path = ROOT) -> str:
    """Return a document with every table made from its record, whose path is relative to `root`."""

    def table(match: re.Match[str]) -> str:
        kind = match["kind"] or ""
        return f"<!-- table: {match['file']}{kind} -->\n{render(root / match['file'], kind.strip())}\n<!-- end -->"

    return BLOCK.sub(table, text)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")
    args = parser.parse_args()
    is_old = False
    for document in DOCUMENTS:
        old = document.read_text(encoding="utf-8")
        new = update(old)
        is_old = is_old or new != old
        if not args.check:
            document.write_text(new, encoding="utf-8")
    return int(args.check and is_old)


if __name__ == "__main__":
    raise SystemExit(main())
