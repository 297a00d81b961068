"""Figures as SVG: text stays text, and the same figure gives the same bytes."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure


def svg_text(figure: Figure, *, facecolor: str = "white", is_trimmed: bool = False) -> str:
    """Return a figure as SVG. facecolor: behind the axes, or "none". is_trimmed: cut off empty margins."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qwen3fast"}):
        figure.savefig(
            text, format="svg", facecolor=facecolor, metadata={"Date": None}, transparent=facecolor == "none",
            bbox_inches="tight" if is_trimmed else None, pad_inches=0.08,
        )  # fmt: skip
    return text.getvalue()
