"""Tags on what a figure draws: Matplotlib writes an artist's gid as the id of its group in the SVG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from qwen3fast.bench.record import Record
from qwen3fast.bench.report.values import Values

SERIES, BAR = "series", "bar"
STYLES = {"-": "solid", ":": "dotted"}  # CSS's names; all others are dashed


@dataclass(frozen=True)
class Series:
    """A line's name, and how its button shows it. color: "#rrggbb"; style: solid, dashed or dotted."""

    name: str
    color: str
    style: str


def series_in(gid: str) -> str:
    """The name of the series that a gid belongs to; empty of another."""
    kind, _, rest = gid.partition(":")
    return rest.partition(":")[2] if kind == SERIES else ""


def is_bar(gid: str) -> bool:
    """Whether a gid is that of a bar."""
    return gid.startswith(f"{BAR}:")


def tag(figure: Figure, record: Record) -> tuple[list[Series], dict[str, list[str]]]:
    """Give gids to lines, their names, and bars. Returns the series, and gid -> words for each point."""
    values, series, tips = Values(record), dict[str, Series](), dict[str, list[str]]()
    for i, axes in enumerate(figure.axes):
        _tag_lines(axes, i, values, series, tips)
        for j, text in enumerate(axes.texts):
            names = [n for n, s in series.items() if text.get_text().startswith(n) and s.color == _hex(text)]
            if names:
                text.set_gid(f"{SERIES}:{i}.t{j}:{max(names, key=len)}")
        for j, (bar, words) in enumerate(_bars(figure, axes, values)):
            bar.set_gid(f"{BAR}:{i}.{j}")
            tips[f"{BAR}:{i}.{j}"] = [words]
    return list(series.values()), tips


def _tag_lines(axes: Axes, i: int, values: Values, series: dict[str, Series], tips: dict[str, list[str]]) -> None:
    """A line without a name, such as a limit, goes with the one before it if it has its colour."""
    owner = Series("", "", "")
    for j, line in enumerate(axes.lines):
        label, color = str(line.get_label()), _hex(line)
        if label and not label.startswith("_"):
            owner = Series(label, color, STYLES.get(str(line.get_linestyle()), "dashed"))
            series.setdefault(label, owner)
        name = owner.name if color == owner.color else ""
        gid = f"{SERIES}:{i}.{j}:{name}" if name else f"line:{i}.{j}"
        line.set_gid(gid)
        if line.get_marker() not in ("", "None", " "):
            points = zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
            tips[gid] = [_point_words(axes, values, name, float(x), float(y)) for x, y in points]


def _hex(artist: Line2D | Text) -> str:
    return to_hex(artist.get_color())


def _point_words(axes: Axes, values: Values, name: str, x: float, y: float) -> str:
    plain = f"{name}: {y:.4g} {axes.get_ylabel()}; {axes.get_xlabel()}: {x:g}"
    return values.words(name, x, y) or plain


def _bars(figure: Figure, axes: Axes, values: Values) -> Iterator[tuple[Rectangle, str]]:
    """Horizontal bars and their words; one's row is named on its own axes or on the first ones."""
    what = axes.get_title(loc="left") or axes.get_xlabel()
    for container in axes.containers:
        if not isinstance(container, BarContainer) or container.orientation != "horizontal":
            continue
        for bar in container.patches:
            row = bar.get_y() + bar.get_height() / 2
            rows = [_row_names(a).get(round(row, 6), "") for a in (axes, figure.axes[0])]
            name = next((text for text in rows if text), "")
            end = bar.get_x() + bar.get_width()
            words = values.words(name, None, end, bar.get_width())
            yield bar, words or f"{name}: {bar.get_width():.4g} {what}"


def _row_names(axes: Axes) -> dict[float, str]:
    return {round(float(y), 6): t.get_text() for y, t in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
