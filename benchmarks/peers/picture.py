"""The picture of a record of peers: a bar for every engine, a panel for decoding at each context and for prefill."""

from __future__ import annotations

from matplotlib.figure import Figure
from tables import OURS, peers_columns

from qwen3fast.bench.plot import FAINT, INK, PALETTE, new_figure, style_axes
from qwen3fast.bench.record import Record

OTHERS = "#9aa5b1"
GAP = 0.7  # between formats, in bars


def draw(record: Record) -> Figure:
    """Ours in colour; engines in the order of the record, formats apart."""
    names = list(dict.fromkeys((str(c.labels["format"]), str(c.labels["engine"])) for c in record.cases))
    formats = list(dict.fromkeys(format for format, _ in names))
    places = [i + GAP * formats.index(format) for i, (format, _) in enumerate(names)]
    columns = peers_columns(record)
    height, width = 1.9 + 0.27 * (places[-1] + 1), 2.9 + 3.5 * len(columns)
    subtitle = f"{record.model['name']}, one request; each engine on the same weights, taking turns; longer is faster"
    figure = new_figure(record, "Beside other engines: tokens per second", subtitle, (width, height))
    for i, (title, speeds) in enumerate(columns.items()):
        axes = figure.add_axes(((2.7 + 3.5 * i) / width, 0.5 / height, 3.1 / width, (height - 1.65) / height))
        values = [speeds.get(name, 0.0) for name in names]
        colors = [PALETTE[0] if engine.startswith(OURS) else OTHERS for _, engine in names]
        bars = axes.barh(places, values, height=0.74, color=colors)
        axes.bar_label(bars, [f"{v:.3g}" if v else "" for v in values], padding=3, size=8.5, color=INK)
        axes.set_yticks(places, [engine for _, engine in names] if i == 0 else [""] * len(names), size=9)
        axes.invert_yaxis()
        style_axes(axes, "", "", title)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.set_xlim(0, 1.18 * max([*values, 1e-9]))
        if i == 0:
            for format in formats:
                at = next(place for place, (name, _) in zip(places, names, strict=True) if name == format)
                axes.annotate(
                    format, xy=(0, at), xycoords=("axes fraction", "data"), xytext=(-180, 0),
                    textcoords="offset points", va="center", size=10, weight="bold", color=FAINT, annotation_clip=False,
                )  # fmt: skip
    return figure
