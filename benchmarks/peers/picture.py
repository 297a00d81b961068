"""The picture of a record of peers: a bar per engine, a panel per context of decoding and for prefill."""

from __future__ import annotations

from matplotlib.figure import Figure
from tables import OURS, peers_columns

from qwen3fast.bench.metrics import short
from qwen3fast.bench.plot import FAINT, PALETTE, draw_bars, new_figure
from qwen3fast.bench.record import Record

OTHERS = "#9aa5b1"
GAP = 0.7  # between formats, in bars


def draw(record: Record) -> Figure:
    """Draw our bars in color and the engines in the record's order, with gaps between formats."""
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
        engines = [engine for _, engine in names] if i == 0 else [""] * len(names)
        draw_bars(axes, values, [short(v) if v else "" for v in values], colors, engines, title, places)
        if i == 0:
            for format in formats:
                at = next(place for place, (name, _) in zip(places, names, strict=True) if name == format)
                axes.annotate(
                    format, xy=(0, at), xycoords=("axes fraction", "data"), xytext=(-180, 0),
                    textcoords="offset points", va="center", size=10, weight="bold", color=FAINT, annotation_clip=False,
                )  # fmt: skip
    return figure
