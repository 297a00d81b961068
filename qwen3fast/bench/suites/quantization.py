"""What rounding weights and cache buys and costs: speed, memory, and the error of the logits.

Errors are |rounded - exact| / |exact| over all logits of a prompt's positions; how often the likeliest token stays the
same is beside them. On random weights, where no token is much likelier than others, that share is a worst case.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from matplotlib.figure import Figure

from qwen3fast.bench.harness import Task
from qwen3fast.bench.measure import make_prompts
from qwen3fast.bench.metrics import short
from qwen3fast.bench.options import split_format
from qwen3fast.bench.plot import INK, color_of, new_figure, style_axes
from qwen3fast.bench.record import Case, Record
from qwen3fast.bench.session import Session
from qwen3fast.bench.suites.roofline import MODE
from qwen3fast.bench.suites.suite import Suite
from qwen3fast.bench.table import Columns
from qwen3fast.model import Qwen3, rope_tables
from qwen3fast.model.kv_cache import StaticKVCache, parse_cache_dtype

ERROR_TOKENS = 128


@torch.no_grad()
def logits_through_cache(model: Qwen3, token_T: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """Logits of all positions, (T, V) float32, keys and values read from a cache in its dtype; eager and plain."""
    length, device = len(token_T), token_T.device
    dtype = parse_cache_dtype(kv_cache_dtype, model.model.norm.weight.dtype)
    cache = StaticKVCache(model.config, 1, length, dtype, device)
    cos_TD, sin_TD = rope_tables(model.config.head_dim, model.config.rope_theta, length, device, model.config.yarn)
    position_1T = torch.arange(length, device=device)[None]
    mask_1TL = torch.arange(length, device=device) <= position_1T[..., None]
    x_1TE = model.embed(token_T[None])
    for block, layer in zip(model.model.layers, cache.layers(), strict=True):
        x_1TE = block(x_1TE, cos_TD[None], sin_TD[None], position_1T, mask_1TL, layer)
    return model.logits(x_1TE)[0].float()


def run(session: Session) -> None:
    """Errors first, then speed at each context, all formats taking turns."""
    o = session.options
    [prompt] = make_prompts(session.config.vocab_size, ERROR_TOKENS, 1, seed=2)
    token_T = torch.tensor(prompt, device=session.device)
    exact_TV = logits_through_cache(session.model(None), token_T, "auto")
    benches = {f: session.workbench(f, (MODE,), o.contexts, 1, o.new_tokens) for f in o.formats}
    for format, bench in benches.items():
        session.prepare(bench, MODE, format)
        quantization, kv_cache_dtype = split_format(format)
        rounded_TV = logits_through_cache(session.model(quantization), token_T, kv_cache_dtype)
        error = float((rounded_TV - exact_TV).norm() / exact_TV.norm())
        same = float((rounded_TV.argmax(-1) == exact_TV.argmax(-1)).float().mean())
        case = Case(
            {"format": session.label(format), "what": "error"}, {"weight_bytes": float(bench.model.num_bytes())}
        )
        case.add({"logit_error": error, "same_token": same})
        session.record.cases.append(case)
    for context in o.contexts:
        tasks = [session.task(b, MODE, f, context, 1, o.new_tokens, what="speed") for f, b in benches.items()]
        session.harness.measure([Task(t.case, t.run) for t in tasks], o.repetitions, f"context {context}")


def formats(record: Record) -> Iterator[tuple[str, float, float, float]]:
    """(format, tokens/s at the shortest context, GB of weights, error of the logits) of each."""
    for case in record.cases:
        if "logit_error" not in case.metrics:
            continue
        name = str(case.labels["format"])
        speeds = {
            int(c.labels["context"]): c.metrics["decode_tok_s"].median
            for c in record.cases
            if c.labels["format"] == name and "decode_tok_s" in c.metrics
        }
        if speeds:
            error = case.metrics["logit_error"].median
            yield name, speeds[min(speeds)], case.facts["weight_bytes"] / 1e9, error


def draw(record: Record) -> Figure:
    """Three rows of bars with a common order of formats: speed, memory, error."""
    rows = list(formats(record))
    names = [name for name, *_ in rows]
    figure = new_figure(record, "What rounding buys and costs", f"{record.model['name']}, one request", (13.0, 5.4))
    panels = (("tokens per second", 1, short), ("GB of weights", 2, short), ("error of the logits", 3, "{:.1%}".format))
    for i, (title, column, as_text) in enumerate(panels):
        axes = figure.add_axes((0.1 + i * 0.295, 0.16, 0.245, 0.62))
        values = [float(row[column]) for row in rows]
        bars = axes.barh(range(len(rows)), values, height=0.62, color=[color_of(n, names) for n in names])
        axes.bar_label(bars, [as_text(v) for v in values], padding=4, size=9.5, color=INK)
        axes.set_yticks(range(len(rows)), names if i == 0 else [""] * len(rows))
        axes.invert_yaxis()
        style_axes(axes, "", "", title)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        axes.set_xlim(0, max(max(values), 1e-9) * 1.25)
    return figure


def summary(record: Record) -> list[str]:
    """Speed and memory of each format beside the first."""
    rows = list(formats(record))
    return [
        f"{name}: {speed / rows[0][1]:.1f} times the tokens/s of {rows[0][0]} with {short(size)} GB of weights instead "
        f"of {short(rows[0][2])}; logits differ by {error:.1%}."
        for name, speed, size, error in rows[1:]
    ]


SUITE = Suite(
    name="quantization",
    title="What rounding buys and costs",
    run=run,
    draw=draw,
    columns=Columns(
        ("format", "context"),
        ("decode_tok_s", "prefill_tok_s", "peak_memory_bytes", "logit_error", "same_token", "energy_j_token"),
    ),
    defaults={
        "formats": ("plain", "plain-kv8", "int8", "int8-kv8", "int4", "int4-kv8"),
        "contexts": (32, 1024), "new_tokens": 16, "repetitions": 3,
    },
    quick={"formats": ("plain", "int4"), "contexts": (32,), "new_tokens": 8, "repetitions": 1},
    summary=summary,
)  # fmt: skip
