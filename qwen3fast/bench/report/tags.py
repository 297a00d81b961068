"""Tags on a figure's lines and bars: Matplotlib writes an artist's gid as the id of its group in the SVG."""

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

SERIES, BAR = "series", "bar"
STYLES = {"-": "solid", ":": "dotted"}  # CSS's names; all others are dashed


@dataclass(frozen=True)
class Series:
    """A line's name, and the look of its button. color: "#rrggbb"; style: solid, dashed or dotted."""

    name: str
    color: str
    style: str


def series_in(gid: str) -> str:
    """Return the name of a gid's series; empty if it has none."""
    kind, _, rest = gid.partition(":")
    return rest.partition(":")[2] if kind == SERIES else ""


def is_bar(gid: str) -> bool:
    """Return True for the gid of a bar."""
    return gid.startswith(f"{BAR}:")


def tag(figure: Figure) -> tuple[list[Series], dict[str, list[str]]]:
    """Give gids to lines, their names, and bars. Returns: the series, and gid -> the text of each point."""
    series, tips = dict[str, Series](), dict[str, list[str]]()
    for i, axes in enumerate(figure.axes):
        _tag_lines(axes, i, series, tips)
        for j, text in enumerate(axes.texts):
            names = [n for n, s in series.items() if text.get_text().startswith(n) and s.color == _hex(text)]
            if names:
                text.set_gid(f"{SERIES}:{i}.t{j}:{max(names, key=len)}")
        for j, (bar, words) in enumerate(_bars(figure, axes)):
            bar.set_gid(f"{BAR}:{i}.{j}")
            tips[f"{BAR}:{i}.{j}"] = [words]
    return list(series.values()), tips


def _tag_lines(axes: Axes, i: int, series: dict[str, Series], tips: dict[str, list[str]]) -> None:
    """Tag lines. A line without a name, such as a limit, joins the series before it if it has its color."""
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
            what = f"{axes.get_ylabel()}; {axes.get_xlabel()}"
            tips[gid] = [f"{name}: {float(y):.4g} {what}: {float(x):,g}" for x, y in points]


def _hex(artist: Line2D | Text) -> str:
    return to_hex(artist.get_color())


def _bars(figure: Figure, axes: Axes) -> Iterator[tuple[Rectangle, str]]:
    """Yield horizontal bars and their texts; a row is named on the bar's own axes or on the first ones."""
    what = axes.get_title(loc="left") or axes.get_xlabel()
    for container in axes.containers:
        if not isinstance(container, BarContainer) or container.orientation != "horizontal":
            continue
        for bar in container.patches:
            row = bar.get_y() + bar.get_height() / 2
            rows = [_row_names(a).get(round(row, 6), "") for a in (axes, figure.axes[0])]
            name = next((text for text in rows if text), "")
            yield bar, f"{name}: {bar.get_x() + bar.get_width():.4g} {what}"


def _row_names(axes: Axes) -> dict[float, str]:
    return {round(float(y), 6): t.get_text() for y, t in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
