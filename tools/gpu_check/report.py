"""A record as a table for the terminal, and a picture of all ways to decode."""

from __future__ import annotations

from pathlib import Path

from gpu_check.targets import as_lines, best, targets_of
from qwen3fast.bench.record import Record
from qwen3fast.bench.table import Columns, as_text, table_rows

COLUMNS = Columns(
    ("part", "size", "weights", "mode", "options", "batch_size", "context"),
    ("decode_tok_s", "share_of_bandwidth", "ttft_s", "prefill_tok_s"),
)
BARS = {  # in the picture, from top to bottom: mode -> name and color
    "uncached-eager": ("no cache, eager", "#cbd2d9"),
    "uncached-compiled": ("no cache, compiled", "#9aa5b1"),
    "transformers-eager": ("transformers, eager", "#97b86a"),
    "transformers-static": ("transformers, static cache, compiled", "#4d7c0f"),
    "eager": ("qwen3fast, eager", "#6ba9c4"),
    "compiled": ("qwen3fast, compiled", "#0b6e99"),
    "graphs": ("qwen3fast, compiled, CUDA graphs", "#c2410c"),
}


def as_report(record: Record) -> str:
    """Return a table of all cases, kernels, tests, targets, and what was left out or broke."""
    lines = [as_text(table_rows(record, COLUMNS), left=len(COLUMNS.labels))] if record.cases else []
    for name, notes in record.notes["variants"].items():
        if notes.get("step", {}).get("kernels"):
            step = notes["step"]
            text = (
                f"{step['kernels']:.0f} kernels per step, {step['kernel_us']:.0f} us, {step['launches']:.1f} launches"
            )
            lines.append(f"{name}: {text}; eager: {', '.join(step['eager_kernels'])[:200] or 'none'}")
        if "warmup_s" in notes:
            lines.append(f"{name}: warmup() took {notes['warmup_s']:.1f} s")
        if "exit_status" in notes:
            counts = f"{notes['passed']} passed, {notes['failed']} failed, {notes['skipped']} skipped"
            lines.append(f"{name}: {counts} in {notes['seconds']:.0f} s")
            lines += [f"  failed: {test}" for test in notes["failures"]]
            lines += [f"  {test}: {cause}" for test, cause in notes["causes"].items()]
    lines += as_lines(targets_of(record))
    lines += [f"left out: {what}" for what in record.notes["left_out"]]
    lines += [f"ERROR: {what}" for what in record.notes["errors"]]
    for name, check in record.checks.items():
        if not check["passed"]:
            gaps = f"{check['worst_gap']:.1%} below float32's best, {check['worst_gap_own_dtype']:.1%} below its own"
            lines.append(f"WRONG TOKENS: {name}: {gaps}; {check['tolerance']:.1%} allowed")
    return "\n".join(lines)


def draw(record: Record, path: Path) -> str:
    """Draw the decode speed of 0.6B in every mode at the first and the second context; needs matplotlib.

    Returns: why there is no picture, or "".
    """
    try:
        from qwen3fast.bench.plot import INK, new_figure, save
    except ImportError as err:
        return f"no picture: {err}"
    labels = {"size": "0.6b", "weights": "bf16", "batch_size": 1}
    speeds = {
        (mode, context): speed
        for mode in BARS
        for context in (32, 1000)
        if (speed := best("decode_tok_s", mode=mode, context=context, **labels)(record)) is not None
    }
    if not speeds:
        return "no picture: no case of 0.6b, one row, context 32 or 1,000"
    figure = new_figure(record, "Qwen3-0.6B, one request: tokens per second", "bfloat16, random weights, greedy")
    for i, context in enumerate((32, 1000)):
        axes = figure.add_axes((0.3 + 0.36 * i, 0.12, 0.31, 0.68))
        modes = [mode for mode in BARS if (mode, context) in speeds]
        heights = [speeds[mode, context] for mode in modes]
        bars = axes.barh(range(len(modes)), heights, color=[BARS[mode][1] for mode in modes])
        axes.bar_label(bars, [f"{height:,.0f}" for height in heights], size=8, color=INK, padding=3)
        axes.set_yticks(range(len(modes)), [BARS[mode][0] for mode in modes] if i == 0 else [""] * len(modes), size=8)
        axes.invert_yaxis()
        axes.set_title(f"after a prompt of {context:,} tokens", size=10)
        axes.set_xlim(0, 1.18 * max(heights, default=1))
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
    return ""
