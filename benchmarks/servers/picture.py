"""The picture of a record of servers: tokens per second and time to the first token, a bar per server."""

from __future__ import annotations

from matplotlib.figure import Figure
from tables import OURS, cell, find, unique

from qwen3fast.bench.plot import PALETTE, draw_bars, new_figure
from qwen3fast.bench.record import Record

OTHERS = "#9aa5b1"
SHOWN = (("tok_s", "tokens per second, all clients"), ("ttft_s", "seconds to the first token"))


def draw(record: Record) -> Figure:
    """Draw a panel per metric and number of clients; our bars in color."""
    names = unique(record, "format", "server")
    panels = [(n, *shown) for (n,) in sorted(unique(record, "clients")) for shown in SHOWN]
    height, width = 1.9 + 0.34 * len(names), 3.4 + 3.2 * len(panels)
    subtitle = f"{record.model['name']}, the same weights and requests, taking turns; ours in color"
    figure = new_figure(record, "Beside other servers", subtitle, (width, height))
    colors = [PALETTE[0] if server == OURS else OTHERS for _, server in names]
    for i, (clients, metric, title) in enumerate(panels):
        axes = figure.add_axes(((3.2 + 3.2 * i) / width, 0.5 / height, 2.7 / width, (height - 1.65) / height))
        cases = [find(record, format=format, server=server, clients=clients) for format, server in names]
        values = [c.metrics[metric].median if c and metric in c.metrics else 0.0 for c in cases]
        labels = [f"{server}, {format}" if i == 0 else "" for format, server in names]
        title = f"{clients} client{'s' if clients > 1 else ''}: {title}"
        draw_bars(axes, values, [cell(c, metric) for c in cases], colors, labels, title)
        axes.title.set_fontsize(9)
    return figure
